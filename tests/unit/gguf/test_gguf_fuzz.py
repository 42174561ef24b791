"""Damaged files: whatever happens to a header, opening either works or raises a ModelFileError, soon and without
taking more memory than the file explains; and what opens can be read to its last byte."""

from __future__ import annotations

import collections
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
from polyhead.errors import (
    CorruptFileError,
    ModelFileError,
    NotGGUFError,
    TruncatedFileError,
    UnsupportedTypeError,
)
from polyhead.gguf import GGUFArray, GGUFFile, open_gguf

ROUNDS = 2400
# 0x20...: sums of a few of these pass 64 bits
EXTREMES = [0, 1, 2, 8, 9, 31, 255, 1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 60, 1 << 61, 1 << 63, 2**64 - 8, 2**64 - 1]


def sample(make):
    """A small file with every kind of value and several types of tensors."""
    rng = np.random.default_rng(0)
    metadata = [
        make.text("general.architecture", "llama"),
        make.number("general.alignment", "uint32", 32),
        make.number("split.count", "uint16", 1),
        *(make.number(f"n.{kind}", kind, 1) for kind in ("uint8", "int16", "uint64", "float32", "float64", "bool")),
        make.texts("tokens", [b"a", b"", b"\xff", "größe".encode(), b" " * 30]),
        make.numbers("types", "int32", [1, 2, 3]),
        make.numbers("flags", "bool", [1, 0]),
        make.numbers("wide", "float64", [0.5]),
    ]
    tensors = [
        ("token_embd.weight", (64, 3), 2, None, rng.bytes(108)),
        ("norm", (16,), 0, None, rng.bytes(64)),
        ("half", (3, 2, 2), 1, None, rng.bytes(24)),
        ("q", (256, 2), 14, None, rng.bytes(420)),
        ("numbers", (4,), 26, None, rng.bytes(16)),
    ]
    return make.file(metadata, tensors)


def mutate(content, rng):
    """One to three changes, most of them in the header."""
    data = bytearray(content)
    header = content.index(b"numbers") + 40
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(min(header, len(data)) or 1)
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
            case 2:
                del data[rng.randrange(len(data) + 1) :]
            case 3:
                data[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
            case 4:
                at = rng.choice([4, 8, 16, 24])
                data[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
            case 5:
                source = rng.randrange(header)
                data[at : at + rng.randrange(64)] = content[source : source + rng.randrange(64)]
            case 6:
                data[at : at + 4] = struct.pack("<I", rng.choice(EXTREMES) & 0xFFFFFFFF)
    return bytes(data)


def read_everything(file):
    for value in file.metadata.values():
        if isinstance(value, GGUFArray):
            assert len(list(value)) == len(value)
            if value.kind == "str":
                assert list(map(len, value.raw())) == [len(t.encode("utf-8", "surrogateescape")) for t in value]
    for name, info in file.tensors.items():
        assert file.data(name).nbytes == info.nbytes
        file.data(name).sum()
        if info.supported:
            assert file.dequantise(name).shape == info.shape


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_damaged_files_open_or_raise_a_model_file_error(make, traced):
    content = sample(make)
    with open_gguf(make.write(content)) as file:
        assert len(file.metadata) == 13
        assert len(file.tensors) == 5
        read_everything(file)
    rng = random.Random(20240229)
    outcomes: collections.Counter[type] = collections.Counter()
    slowest, longest, started = 0.0, 0, time.perf_counter()
    for number in range(ROUNDS):
        damaged = mutate(content, rng)
        path = make.write(damaged)
        tracemalloc.reset_peak()
        before, began = tracemalloc.get_traced_memory()[0], time.perf_counter()
        try:
            file = open_gguf(path)
        except ModelFileError as error:
            outcomes[type(error)] += 1
            longest = max(longest, len(str(error)))
            file = None
        slowest = max(slowest, time.perf_counter() - began)
        # The objects of a few keys and tensors, and no more bytes than the file has.
        assert tracemalloc.get_traced_memory()[1] - before < 100_000 + 3 * len(damaged), number
        if file:
            with file:
                outcomes[GGUFFile] += 1
                read_everything(file)
    print(f"{ROUNDS} files in {time.perf_counter() - started:.1f} s, slowest {slowest * 1e3:.1f} ms, {outcomes}")
    assert slowest < 1
    assert longest < 1500
    # The damage was of every sort: else the test would show little.
    for kind in (CorruptFileError, TruncatedFileError, UnsupportedTypeError, NotGGUFError, GGUFFile):
        assert outcomes[kind] >= 20


def test_an_array_of_many_empty_strings_costs_little_more_than_its_bytes(make, traced):
    path = make.write(make.file([make.texts("t", [b""] * 200_000)]))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with open_gguf(path) as file:
        assert tracemalloc.get_traced_memory()[1] - before < 3 * path.stat().st_size + 100_000
        assert len(file.metadata["t"]) == 200_000
