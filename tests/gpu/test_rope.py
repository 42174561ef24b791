"""Norms of heads, rotation and the way into the paged cache, against the CPU runtime and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tolerance
from polyhead.arch import Attention, FusedQKV, LayerNorm, Linear, Norm, RMSNorm, Rope
from polyhead.errors import DeviceError
from polyhead.runtime.cpu import ops as cpu
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops.rope import store_kv
from polyhead.runtime.rope import tables

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]

RMS, LAYER, BARE = RMSNorm("w", 1e-6), LayerNorm("w", "b", 1e-5), LayerNorm("w", None, 1e-5)


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    dim: int
    rope: Rope | None
    block_size: int = 16
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    dtype: str = "f16"
    kv_dtype: str = "f16"

    def spec(self) -> Attention:
        return Attention(
            self.heads, self.kv_heads, self.dim, FusedQKV(Linear("a")), Linear("b"), self.rope, self.q_norm, self.k_norm
        )


CASES = [
    Case(2, 1, 2, Rope(10000.0, 2, "interleaved"), block_size=1),
    Case(3, 3, 6, Rope(10000.0, 4, "half"), block_size=3),
    Case(3, 3, 6, Rope(10000.0, 6, "half"), block_size=3, dtype="bf16", kv_dtype="bf16"),
    Case(4, 2, 10, Rope(10000.0, 6, "interleaved"), block_size=3, q_norm=LAYER, k_norm=RMS),
    Case(9, 3, 64, Rope(10000.0, 64, "interleaved")),
    Case(12, 12, 64, None),
    Case(4, 2, 80, Rope(10000.0, 32, "half"), q_norm=BARE, k_norm=LAYER, kv_dtype="bf16"),
    Case(8, 2, 128, Rope(1e6, 128, "half"), q_norm=RMS, k_norm=RMS, dtype="bf16", kv_dtype="bf16"),
    Case(5, 1, 256, Rope(1e4, 256, "half"), q_norm=RMS, k_norm=RMS),
    Case(2, 2, 256, Rope(1e4, 64, "interleaved"), dtype="bf16"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.heads}-{c.kv_heads}x{c.dim}-{c.dtype}")
def test_rotation_and_cache_agree_with_the_cpu(case: Case, ctx: Context, put: Put, get: Get) -> None:
    rng = np.random.default_rng(case.dim)
    spec, dim, size = case.spec(), case.dim, case.block_size
    # Three sequences of 1, 9 and 30 tokens so far, of which 1, 4 and 5 rows are new, then a row of padding.
    positions = np.array([0, *range(5, 9), *range(25, 30), -1], np.int32)
    sequences = np.array([0, *[1] * 4, *[2] * 5, 0], np.int32)
    width = -(-30 // size)
    blocks = 3 * width + 2
    block_tables = rng.permutation(blocks)[: 3 * width].reshape(3, width).astype(np.int32)
    qkv = put(rng.standard_normal((len(positions), (case.heads + 2 * case.kv_heads) * dim)), case.dtype)
    caches = [put(rng.standard_normal((blocks, case.kv_heads, size, dim)), case.kv_dtype) for _ in range(2)]
    before = [get(array) for array in (qkv, *caches)]
    weights = [rng.standard_normal(dim).astype(np.float32) for _ in range(4)]
    turn = tables(spec.rope, 64) if spec.rope else None
    norms = [
        norm and (norm, put(weights[2 * i]), put(weights[2 * i + 1]) if getattr(norm, "bias", None) else None)
        for i, norm in enumerate((spec.q_norm, spec.k_norm))
    ]
    on_device = tuple(map(put, turn)) if turn else None
    places = put(positions), put(sequences), put(block_tables)
    store_kv(ctx, qkv, spec, on_device, norms, *places, *caches)

    rows = len(positions) - 1
    heads = before[0][:rows].astype(np.float32).reshape(rows, -1, dim)
    parts = [heads[:, : case.heads], heads[:, case.heads : -case.kv_heads], heads[:, -case.kv_heads :]]
    for i, norm in enumerate((spec.q_norm, spec.k_norm)):
        if norm is not None:
            bias = weights[2 * i + 1] if isinstance(norm, LayerNorm) and norm.bias else None
            cpu.normalise(parts[i], norm, weights[2 * i], bias, parts[i])
        if turn is not None and spec.rope is not None:
            cos, sin = turn[0][positions[:rows]], turn[1][positions[:rows]]
            cpu.rotate(parts[i], cos, sin, spec.rope.pairing == "interleaved")
    found = get(qkv)
    half = 2.0 ** (-11 if case.dtype == "f16" else -8)
    assert np.allclose(found[:rows].reshape(heads.shape), heads, rtol=1.01 * half, atol=1e-5)
    assert np.array_equal(found[rows], before[0][rows]), "padding was touched"

    # Caches: what was written is k and v, and not one other value has changed.
    for name, cache, old, part in (("k", caches[0], before[1], parts[1]), ("v", caches[1], before[2], parts[2])):
        block = block_tables[sequences[:rows], positions[:rows] // size]
        written = get(cache)
        half = 2.0 ** (-11 if case.kv_dtype == "f16" else -8)
        assert np.allclose(written[block, :, positions[:rows] % size], part, rtol=1.01 * half, atol=1e-5), name
        written[block, :, positions[:rows] % size] = old[block, :, positions[:rows] % size]
        assert np.array_equal(written, old), f"{name} was written elsewhere"


def test_of_one_type_the_cache_holds_exactly_what_stands_in_qkv(ctx: Context, put: Put, get: Get) -> None:
    case = Case(2, 2, 64, Rope(10000.0, 64, "half"), k_norm=RMS)
    rng = np.random.default_rng(0)
    qkv = put(rng.standard_normal((1, 6 * 64)), "f16")
    caches = [put(np.zeros((1, 2, 16, 64)), "f16") for _ in range(2)]
    zero = put(np.zeros(1, np.int32))
    assert case.rope is not None
    turn = tuple(map(put, tables(case.rope, 8)))
    norms = [None, (RMS, put(rng.standard_normal(64).astype(np.float32)), None)]
    places = put(np.array([5], np.int32)), zero, zero.reshape(1, 1)
    store_kv(ctx, qkv, case.spec(), turn, norms, *places, *caches)
    _, k, v = get(qkv).reshape(3, 2, 64)
    assert np.array_equal(get(caches[0])[0, :, 5], k)
    assert np.array_equal(get(caches[1])[0, :, 5], v)


def test_rotation_keeps_lengths_and_turns_by_position(ctx: Context, put: Put, get: Get) -> None:
    case = Case(1, 1, 64, Rope(10000.0, 64, "interleaved"))
    rng = np.random.default_rng(0)
    same = np.tile(rng.standard_normal((1, 3 * 64)), (40, 1))
    qkv = put(same, "f16")
    caches = [put(np.zeros((3, 1, 16, 64)), "f16") for _ in range(2)]
    assert case.rope is not None
    turn = tuple(map(put, tables(case.rope, 40)))
    at = put(np.arange(40, dtype=np.int32)), put(np.zeros(40, np.int32)), put(np.array([[2, 0, 1]], np.int32))
    store_kv(ctx, qkv, case.spec(), turn, [None, None], *at, *caches)
    q, k, v = get(qkv).astype(np.float64).reshape(40, 3, 64).transpose(1, 0, 2)
    assert tolerance.error(np.linalg.norm(q, axis=1), np.full(40, np.linalg.norm(q[0]))) < tolerance.CUDA_NORM
    # q at i times k at j depends on i - j alone (Su et al. 2021).
    products = q @ k.T
    for shift in (0, 1, 17):
        diagonal = np.diagonal(products, -shift)
        assert np.ptp(diagonal) < 2e-2 * np.linalg.norm(q[0]) * np.linalg.norm(k[0])
    assert (v == v[0]).all()


def test_what_the_spec_and_the_arguments_disagree_on_is_named(ctx: Context, put: Put, poisoned: Put) -> None:
    spec = Case(1, 1, 64, Rope(10000.0, 64, "interleaved")).spec()
    cache, one = poisoned((1, 1, 16, 64), "f16"), put(np.zeros(1, np.int32))
    with pytest.raises(DeviceError, match="rope is in only one"):
        store_kv(ctx, poisoned((1, 192), "f16"), spec, None, [None, None], one, one, one.reshape(1, 1), cache, cache)
    with pytest.raises(DeviceError, match=r"qkv is f16\[1, 190\]"):
        store_kv(ctx, poisoned((1, 190), "f16"), spec, None, [None, None], one, one, one.reshape(1, 1), cache, cache)
