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
from polyhead.runtime.cuda.kv_cache import decode_e4m3
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
    Case(3, 3, 6, Rope(10000.0, 4, "half"), block_size=3, kv_dtype="u8"),
    Case(4, 2, 80, Rope(10000.0, 32, "half"), q_norm=BARE, k_norm=LAYER, kv_dtype="u8"),
    Case(8, 2, 128, Rope(1e6, 128, "half"), q_norm=RMS, k_norm=RMS, dtype="bf16", kv_dtype="u8"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.heads}-{c.kv_heads}x{c.dim}-{c.dtype}-{c.kv_dtype}")
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
    shape, fp8 = (blocks, case.kv_heads, size, dim), case.kv_dtype == "u8"
    caches = [put(rng.integers(0, 120, shape) if fp8 else rng.standard_normal(shape), case.kv_dtype) for _ in range(2)]
    scales = (put(np.ones(shape[:3], np.float32)), put(np.ones(shape[:3], np.float32))) if fp8 else None

    def stored(i: int) -> Any:
        return decode_e4m3(get(caches[i])) * get(scales[i])[..., None] if scales else get(caches[i])

    before = [get(qkv), stored(0), stored(1)]
    weights = [rng.standard_normal(dim).astype(np.float32) for _ in range(4)]
    turn = tables(spec.rope, 64) if spec.rope else None
    norms = [
        norm and (norm, put(weights[2 * i]), put(weights[2 * i + 1]) if getattr(norm, "bias", None) else None)
        for i, norm in enumerate((spec.q_norm, spec.k_norm))
    ]
    on_device = tuple(map(put, turn)) if turn else None
    places = put(positions), put(sequences), put(block_tables)
    store_kv(ctx, qkv, spec, on_device, norms, *places, *caches, scales)

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
    for i, (name, part) in enumerate((("k", parts[1]), ("v", parts[2]))):
        block = block_tables[sequences[:rows], positions[:rows] // size]
        written, old = stored(i), before[1 + i]
        half = 2.0 ** -{"f16": 11, "bf16": 8, "u8": 4}[case.kv_dtype]
        # Below 2^-6 e4m3 codes are 2^-9 apart, where the head's largest component is 448.
        least = np.abs(part).max(axis=-1, keepdims=True) / 448 * 2.0**-10 if fp8 else 0.0
        off = np.abs(written[block, :, positions[:rows] % size] - part)
        assert (off <= 1.01 * half * np.abs(part) + least + 1e-5).all(), name
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


def encode_e4m3(values: Any) -> Any:
    """The nearest code, of two the even one; 448 is the largest. Written down as a search through all values."""
    grid = decode_e4m3(np.arange(127, dtype=np.uint8)).astype(np.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    size = np.abs(values.astype(np.float64))
    below, upto = np.searchsorted(middle, size, "left"), np.searchsorted(middle, size, "right")
    return np.where(below % 2 == 0, below, upto).astype(np.uint8) | np.where(np.signbit(values), 0x80, 0).astype(
        np.uint8
    )


def store_fp8(ctx: Context, put: Put, poisoned: Put, get: Get, values: Any, dtype: str) -> tuple[Any, ...]:
    """Codes and scales of K and V that ``values`` [rows, K and V, kv_heads, dim] leave in one block."""
    rows, _, kv_heads, dim = values.shape
    case = Case(kv_heads, kv_heads, dim, None, block_size=rows)
    qkv = put(np.concatenate([np.zeros((rows, kv_heads * dim)), values.reshape(rows, -1)], axis=1), dtype)
    caches = [poisoned((1, kv_heads, rows, dim), "u8") for _ in range(2)]
    scales = poisoned((1, kv_heads, rows), "f32"), poisoned((1, kv_heads, rows), "f32")
    places = put(np.arange(rows, dtype=np.int32)), put(np.zeros(rows, np.int32)), put(np.zeros((1, 1), np.int32))
    store_kv(ctx, qkv, case.spec(), None, [None, None], *places, *caches, scales)
    stored = get(qkv)[:, kv_heads * dim :].astype(np.float32).reshape(values.shape).transpose(1, 2, 0, 3)
    return stored, np.stack([get(cache)[0] for cache in caches]), np.stack([get(of)[0] for of in scales])


@pytest.mark.parametrize(("dim", "dtype"), [(2, "f16"), (10, "bf16"), (64, "f16"), (80, "f16"), (256, "bf16")])
def test_fp8_codes_are_the_nearest_of_what_the_largest_component_allows(
    dim: int, dtype: str, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    rng = np.random.default_rng(dim)
    values = rng.standard_normal((40, 2, 3, dim)) * 10.0 ** rng.uniform(-4, 3, (40, 2, 3, 1))
    values[:20] *= 10.0 ** rng.uniform(-4, 0, (20, 2, 3, dim))  # small beside the largest
    values[7] = 0
    stored, codes, scales = store_fp8(ctx, put, poisoned, get, values, dtype)
    expected = np.abs(stored).max(axis=-1) / np.float32(448)
    expected[expected == 0] = 1
    assert np.array_equal(scales, expected)
    assert np.array_equal(codes, encode_e4m3(stored / expected[..., None]))


def test_every_fp8_code_is_stored_as_itself(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    codes = np.arange(256, dtype=np.uint8)
    codes[[0x7F, 0xFF]] = 0x7E  # NaN becomes the largest
    powers = 2.0 ** np.arange(-5, 5)
    values = decode_e4m3(codes).astype(np.float64) * powers[:, None, None, None]
    _, found, scales = store_fp8(ctx, put, poisoned, get, np.repeat(values, 2, axis=1), "f16")
    assert np.array_equal(found, np.broadcast_to(codes, found.shape))
    assert np.array_equal(scales, np.broadcast_to(powers, scales.shape))


def test_what_is_not_finite_makes_the_scale_so(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    values = np.ones((3, 2, 1, 64))
    values[0, 0, 0, 5], values[1, 1, 0, 63] = np.inf, np.nan
    _, _, scales = store_fp8(ctx, put, poisoned, get, values, "f16")
    assert np.array_equal(np.isfinite(scales[:, 0]), [[False, True, True], [True, False, True]])
