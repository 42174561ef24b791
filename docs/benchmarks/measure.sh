#!/usr/bin/env bash
# Measures what docs/benchmarks.md and docs/performance.md report, on the machine's first GPU, each stage in minutes:
#
#     docs/benchmarks/measure.sh h100 docs/benchmarks [tests decode prefill depth batches serving guesses]
#
# The first word begins the names of the files that are written, the second is their folder; without stages it runs all.
# It needs `polyhead` and `python` of an environment with the extra dev. "tests" runs the GPU tests, writes their record,
# tests/gpu/last_run.json, and runs the tests of docs/plugins/polyhead-*; "guesses" fetches a model of 98 MB. Afterwards:
# docs/benchmarks/roofline.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stages="tests decode prefill depth batches serving guesses"
usage="usage: $0 PREFIX FOLDER [STAGE…]; stages: $stages"
if [[ $# -lt 2 ]]; then
    echo "$usage" >&2
    exit 2
fi
prefix=$1
folder=$2
shift 2
read -ra all <<<"$stages"
[[ $# -gt 0 ]] || set -- "${all[@]}"
for stage in "$@"; do
    if [[ ! $stage =~ ^[a-z]+$ || " $stages " != *" $stage "* ]]; then
        echo "$0: there is no stage $stage; $usage" >&2
        exit 2
    fi
done
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

bench() { # NAME ARGUMENT…: the figures into a file
    local file=$folder/$prefix-$1.json
    shift
    polyhead bench "$@" --device cuda -q -o json >"$file.part" || { local code=$? && rm "$file.part" && exit "$code"; }
    mv "$file.part" "$file"
    echo "$file: $*"
}

for stage in "$@"; do
    case $stage in
    tests)
        (cd "$here/../.." && python -m pytest -q tests/gpu --record tests/gpu/last_run.json)
        for package in "$here"/../plugins/polyhead-*/; do
            (cd "$package" && PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} python -m pytest -q -p no:cacheprovider)
        done
        ;;
    decode)
        bench llama-8b --shape llama-8b --quant F16,Q8_0,Q4_K_M
        bench llama-1b --shape llama-1b --quant F16,Q4_K_M
        bench gpt2-xl --shape gpt2-xl:F16
        bench gpt-6144 --shape gpt-6144:F16
        ;;
    prefill)
        bench llama-8b-prompt-4096 --shape llama-8b --quant F16,Q4_K_M -p 4096 -n 0 --set runtime.max_tokens_per_step=2048
        bench llama-1b-prompt-4096 --shape llama-1b:F16 -p 4096 -n 0 --set runtime.max_tokens_per_step=4096
        ;;
    depth)
        for depth in 4096 16384; do
            bench "llama-8b-depth-$depth" --shape llama-8b:Q4_K_M -p 0 -n 64 -d "$depth"
            bench "llama-8b-depth-$depth-fp8" --shape llama-8b:Q4_K_M -p 0 -n 64 -d "$depth" --set runtime.kv_dtype=fp8
        done
        ;;
    batches)
        bench llama-8b-batches --shape llama-8b --quant F16,Q4_K_M -p 0 -n 64 -b 8,32,64
        bench llama-8b-rows --shape llama-8b --quant Q8_0,Q4_K_M -p 0 -n 64 -b 1,2,4,8,16
        bench llama-8b-static throughput --shape llama-8b --quant F16,Q4_K_M -b 8,32,128 --set runtime.max_batch=128
        bench llama-1b-static throughput --shape llama-1b:F16 -b 8,32,128 --set runtime.max_batch=128
        ;;
    serving)
        bench llama-8b-requests throughput --shape llama-8b --quant F16,Q4_K_M --requests 256 --set runtime.max_batch=256
        bench llama-1b-requests throughput --shape llama-1b:F16 --requests 256 --set runtime.max_batch=256
        ;;
    guesses) # a real model, which repeats itself as texts do
        load=(--requests 8 --input 100:400 --output 200:400)
        bench smollm2-requests throughput "$here/../../configs/smollm2-135m.yaml" "${load[@]}"
        bench smollm2-requests-ngram throughput "$here/../../configs/smollm2-135m.yaml" "${load[@]}" --set runtime.speculation=ngram
        ;;
    esac
done
