"""Opening a file with a large vocabulary is quick, and needs no heavy package."""

from __future__ import annotations

import random
import subprocess
import sys
import time

from polyhead.gguf import open_gguf

TOKENS, MERGES = 128_000, 280_000


def test_a_large_vocabulary_opens_and_decodes_in_time(make):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeĠé漢", k=rng.randint(1, 12))).encode() for _ in range(TOKENS)]
    metadata = [
        make.texts("tokenizer.ggml.tokens", words),
        make.numbers("tokenizer.ggml.scores", "float32", [0.0] * TOKENS),
        make.numbers("tokenizer.ggml.token_type", "int32", [1] * TOKENS),
        make.texts("tokenizer.ggml.merges", [words[i % TOKENS] + b" " + words[i * 7 % TOKENS] for i in range(MERGES)]),
    ]
    path = make.write(make.file(metadata, [make.f32(f"blk.{i}.weight", [1, 2]) for i in range(500)]))
    start = time.perf_counter()
    with open_gguf(path) as file:
        opened = time.perf_counter()
        tokens = file.metadata["tokenizer.ggml.tokens"].strings()
        merges = file.metadata["tokenizer.ggml.merges"].strings()
        decoded = time.perf_counter()
    print(f"open {opened - start:.3f} s, decode {decoded - opened:.3f} s, {path.stat().st_size / 1e6:.1f} MB")
    assert tokens == [word.decode() for word in words]
    assert len(merges) == MERGES
    # Generous: 0.1 s and 0.15 s where this was written.
    assert opened - start < 2
    assert decoded - opened < 2


def test_reading_common_types_never_imports_the_gguf_package(make):
    path = make.write(
        make.file(tensors=[("w", (32,), 3, None, bytes(20)), ("q", (32,), 8, None, bytes(34)), make.f32("f", [1])])
    )
    code = (
        "import sys; from polyhead.gguf import open_gguf; file = open_gguf(sys.argv[1]); "
        "[file.dequantise(name) for name in file.tensors]; print('gguf' in sys.modules, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
