"""A stranger's package with an architecture and a layer that polyhead lacks: installed by pip, found, run, correct.

The package is tests/plugins/top_k_experts. It is never imported here: everything happens in a process that sees it
only as pip installed it, and its logits are compared with a float64 computation that shares no code with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tolerance

PACKAGE = Path(__file__).parent / "top_k_experts"
LAYERS, HIDDEN, HEADS, HEAD_DIM, EXPERTS, USED, SIZE, VOCAB = 2, 32, 3, 8, 5, 2, 64, 120
IDS = [5, 17, 2, 80, 33, 33, 9, 61, 4, 12, 71]
EPS, THETA = 1e-5, 100.0

# Runs in the other process: for each job an LLM, its logits, and how a few greedy tokens come out.
DRIVER = """
import json, sys
import numpy as np
from polyhead import LLM, PolyheadError, SamplingParams
jobs, out = json.loads(sys.argv[1]), {}
for name, job in jobs.items():
    try:
        with LLM({"model": job["path"], "device": "cpu", **job.get("config", {})}) as llm:
            for key, ids in job["ids"].items():
                out[f"{name}/{key}"] = llm.logits(ids)
            greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
            out[f"{name}/greedy"] = np.array(llm.generate([job["ids"]["all"]], greedy)[0].token_ids)
    except PolyheadError as error:
        out[f"{name}/error"] = np.array(f"{type(error).__name__}: {error}")
np.savez(sys.argv[2], **out)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the package."""
    folder = tmp_path_factory.mktemp("experts")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder / "site"), str(folder / "source")], check=True, timeout=120)
    return folder / "site"


def environment(site: Path) -> dict[str, str]:
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)

    def matrix(*shape: int, gain: float = 1.4) -> np.ndarray:
        return rng.normal(0.0, gain / np.sqrt(shape[-1]), shape).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return rng.normal(1.0, 0.3, size).astype(np.float32)

    out = {"token_embd.weight": matrix(VOCAB, HIDDEN, gain=4.0)}
    for layer in range(LAYERS):
        out |= {
            f"blk.{layer}.{name}.weight": array
            for name, array in {
                "attn_norm": norm(HIDDEN),
                "attn_q": matrix(HEADS * HEAD_DIM, HIDDEN),
                "attn_k": matrix(HEAD_DIM, HIDDEN),
                "attn_v": matrix(HEAD_DIM, HIDDEN),
                "attn_output": matrix(HIDDEN, HEADS * HEAD_DIM),
                "ffn_norm": norm(HIDDEN),
                "ffn_gate_inp": matrix(EXPERTS, HIDDEN, gain=2.0),
                "ffn_up_exps": matrix(EXPERTS, SIZE, HIDDEN),
                "ffn_down_exps": matrix(EXPERTS, HIDDEN, SIZE),
            }.items()
        }
    return {**out, "output_norm.weight": norm(HIDDEN), "output.weight": matrix(VOCAB, HIDDEN, gain=2.0)}


def write(path: Path, arrays: Mapping[str, np.ndarray], **metadata: int) -> Path:
    """A GGUF file whose experts' up matrices are stored as Q8_0, everything else as float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "top-k-experts")
    integers = {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.key_length": HEAD_DIM,
        "expert_count": EXPERTS,
        "expert_used_count": USED,
        "expert_feed_forward_length": SIZE,
        **metadata,
    }
    for key, value in integers.items():
        writer.add_uint32(f"top-k-experts.{key}", value)
    writer.add_float32("top-k-experts.attention.layer_norm_rms_epsilon", EPS)
    writer.add_float32("top-k-experts.rope.freq_base", THETA)
    words, types, merges = tiny_models.vocabulary(VOCAB)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_array("tokenizer.ggml.tokens", words)
    writer.add_array("tokenizer.ggml.token_type", types)
    writer.add_array("tokenizer.ggml.merges", merges)
    writer.add_uint32("tokenizer.ggml.eos_token_id", words.index("<|endoftext|>"))
    for name, array in arrays.items():
        if "up_exps" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def results(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], np.ndarray]:
    """Everything that the other process found, by job and key."""
    folder = tmp_path_factory.mktemp("models")
    arrays = tensors()
    whole = str(write(folder / "whole.gguf", arrays))
    jobs = {
        "whole": {"path": whole, "ids": {"all": IDS, "changed": [*IDS[:6], 1, 2, 3, 4, 5]}},
        "one by one": {"path": whole, "ids": {"all": IDS}, "config": {"runtime": {"max_tokens_per_step": 1}}},
        "chunked": {"path": whole, "ids": {"all": IDS}, "config": {"runtime": {"max_tokens_per_step": 4}}},
        "one expert": {"path": str(write(folder / "one.gguf", arrays, expert_used_count=1)), "ids": {"all": IDS}},
        "too many": {"path": str(write(folder / "many.gguf", arrays, expert_used_count=6)), "ids": {"all": IDS}},
        "unknown key": {"path": str(write(folder / "key.gguf", arrays, expert_shared_count=1)), "ids": {"all": IDS}},
        "lacking": {
            "path": str(write(folder / "lack.gguf", {n: a for n, a in arrays.items() if n != _LACKING})),
            "ids": {"all": IDS},
        },
    }
    for index, name in enumerate(arrays):
        zeroed = write(folder / f"zero{index}.gguf", {**arrays, name: np.zeros_like(arrays[name])})
        jobs[f"zero {name}"] = {"path": str(zeroed), "ids": {"all": IDS}}
    out = folder / "out.npz"
    command = [sys.executable, "-c", DRIVER, json.dumps(jobs), str(out)]
    subprocess.run(command, check=True, timeout=120, env=environment(site))
    with np.load(out) as found:
        kept = dict(found)
    return kept.__getitem__


_LACKING = "blk.1.ffn_down_exps.weight"


def naive(ids: list[int], used: int = USED) -> np.ndarray:
    """The model in float64: one row, one head, one expert at a time."""
    import gguf

    w = {name: array.astype(np.float64) for name, array in tensors().items()}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in [name for name in w if "up_exps" in name]:
        stored = gguf.quants.quantize(w[name].astype(np.float32), kind)
        w[name] = gguf.quants.dequantize(stored, kind).astype(np.float64).reshape(w[name].shape)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w[name]

    def turn(head: np.ndarray) -> np.ndarray:
        angle = np.outer(np.arange(len(head)), THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        a, b = np.split(head, 2, axis=1)
        return np.hstack([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])

    x = w["token_embd.weight"][ids]
    for layer in range(LAYERS):
        name = f"blk.{layer}.{{}}.weight".format
        h = norm(x, name("attn_norm"))
        k, v = turn(h @ w[name("attn_k")].T), h @ w[name("attn_v")].T
        heads = []
        for q in np.split(h @ w[name("attn_q")].T, HEADS, axis=1):
            scores = turn(q) @ k.T / np.sqrt(HEAD_DIM)
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            shares = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(shares / shares.sum(1, keepdims=True) @ v)
        x = x + np.hstack(heads) @ w[name("attn_output")].T
        h = norm(x, name("ffn_norm"))
        for row, scores in enumerate(h @ w[name("ffn_gate_inp")].T):
            chosen = sorted(range(EXPERTS), key=lambda e: -scores[e])[:used]
            total = sum(np.exp(scores[e]) for e in chosen)
            for e in chosen:
                inner = np.maximum(w[name("ffn_up_exps")][e] @ h[row], 0) ** 2
                x[row] += np.exp(scores[e]) / total * (w[name("ffn_down_exps")][e] @ inner)
    return norm(x, "output_norm.weight") @ w["output.weight"].T


def test_logits_equal_a_float64_computation(results):
    assert tolerance.error(results("whole/all"), naive(IDS)) < tolerance.CPU_LOGITS
    assert tolerance.error(results("one expert/all"), naive(IDS, used=1)) < tolerance.CPU_LOGITS
    assert tolerance.error(results("one expert/all"), results("whole/all")) > 0.01


def test_a_changed_future_token_leaves_earlier_outputs_bit_equal(results):
    np.testing.assert_array_equal(results("whole/changed")[:6], results("whole/all")[:6])
    assert (results("whole/changed")[6:] != results("whole/all")[6:]).any(axis=1).all()


@pytest.mark.parametrize("how", ["one by one", "chunked"])
def test_prefill_equals_decode(results, how):
    assert tolerance.error(results(f"{how}/all"), results("whole/all")) < 1e-6
    np.testing.assert_array_equal(results(f"{how}/greedy"), results("whole/greedy"))


def test_greedy_tokens_are_those_of_the_float64_computation(results):
    ids = list(IDS)
    for token in results("whole/greedy"):
        assert naive(ids)[-1].argmax() == token
        ids.append(int(token))


@pytest.mark.parametrize("name", tensors())
def test_every_tensor_matters(results, name):
    assert tolerance.error(results(f"zero {name}/all"), results("whole/all")) > 1e-3


def test_errors_name_tensor_key_and_plugin(results):
    lacking = str(results("lacking/error"))
    assert lacking.startswith("TensorError")
    assert f"missing: {_LACKING} [{EXPERTS}, {HIDDEN}, {SIZE}], which blocks[1].mlp.down reads" in lacking
    assert str(results("too many/error")) == "ConfigError: TopKExperts: used is 6, expected 1 to 5"
    unknown = str(results("unknown key/error"))
    assert "top_k_experts (polyhead-top-k-experts 0.3)" in unknown
    assert "model.ignore_metadata: [top-k-experts.expert_shared_count]" in unknown


def test_the_command_line_runs_it(site, tmp_path):
    path = write(tmp_path / "whole.gguf", tensors())
    command = [sys.executable, "-m", "polyhead.cli", "run", str(path), "-p", "!", "-n", "4", "--json"]
    command += ["--temperature", "0", "--device", "cpu", "--set", "chat=false", "--set", "sampling.ignore_eos=true"]
    done = subprocess.run(command, check=True, timeout=60, env=environment(site), stdout=subprocess.PIPE)
    ids = [tiny_models.vocabulary(VOCAB)[0].index("!")]
    for _ in range(4):
        ids.append(int(naive(ids)[-1].argmax()))
    assert json.loads(done.stdout)["token_ids"] == ids[1:]


def test_without_the_package_the_error_says_that_one_can_add_it(tmp_path):
    from polyhead import LLM
    from polyhead.errors import PluginError

    path = write(tmp_path / "whole.gguf", tensors())
    with pytest.raises(PluginError, match=r"general\.architecture 'top-k-experts'(.|\n)*pip package can add it"):
        LLM({"model": str(path), "device": "cpu"})
