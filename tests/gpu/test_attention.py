"""Paged attention on the GPU: prefill against float64 and the CPU runtime, and the properties that batching relies on.

Decode has a file of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tolerance
from attention_batch import Batched, Case, Get, Put
from polyhead.errors import DeviceError
from polyhead.runtime.contract import Batch
from polyhead.runtime.cpu import attention as cpu
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.kv_cache import decode_e4m3
from polyhead.runtime.cuda.ops import attention as op

pytestmark = pytest.mark.gpu

CASES = [
    Case(2, 2, 2, block_size=1),
    Case(6, 3, 6, block_size=3, window=1),
    Case(4, 2, 10, block_size=3, softcap=5.0, scale=1.0),
    Case(3, 1, 10, block_size=1, window=3, kv_dtype="bf16"),
    Case(4, 1, 16, window=100),
    Case(2, 2, 24, block_size=16),
    Case(4, 2, 40, block_size=3),
    Case(9, 3, 64),
    Case(12, 12, 64, window=3),
    Case(4, 4, 80, softcap=50.0),
    Case(6, 2, 96, window=100),
    Case(8, 8, 128, block_size=3, dtype="bf16", kv_dtype="bf16"),
    Case(16, 2, 128, softcap=20.0, window=70),
    Case(20, 2, 64),  # ten query heads of a KV head: two blocks
    Case(17, 1, 64, dtype="bf16"),
    Case(3, 1, 192, window=33),
    Case(8, 1, 256, dtype="bf16", kv_dtype="bf16"),
    Case(4, 2, 256, block_size=1, window=100, softcap=30.0),
    Case(2, 2, 2, block_size=1, kv_dtype="u8"),
    Case(4, 2, 10, block_size=3, softcap=5.0, scale=1.0, kv_dtype="u8"),
    Case(4, 1, 16, window=100, kv_dtype="u8", dtype="bf16"),
    Case(4, 2, 40, block_size=3, kv_dtype="u8"),
    Case(9, 3, 64, kv_dtype="u8"),
    Case(4, 4, 80, softcap=50.0, kv_dtype="u8"),
    Case(6, 2, 96, window=100, kv_dtype="u8", dtype="bf16"),
    Case(16, 2, 128, softcap=20.0, window=70, kv_dtype="u8"),
    Case(20, 2, 128, block_size=3, kv_dtype="u8"),
    Case(3, 1, 192, window=33, kv_dtype="u8", dtype="bf16"),
    Case(4, 2, 256, block_size=1, window=100, softcap=30.0, kv_dtype="u8"),
    Case(2, 1, 256, kv_dtype="u8", dtype="bf16"),
]
by_shape = pytest.mark.parametrize("case", CASES, ids=str)


@by_shape
def test_prefill_agrees_with_float64(case: Case, ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    chunks = [(1, 1), (1, 130), (5, 5), (64, 64), (65, 200), (17, 333), (130, 130), (3, 1000)]
    batch = Batched(case, chunks, put)
    assert tolerance.error(batch.prefill(ctx, put, poisoned, get), batch.expected(get)) < case.limit()


@pytest.mark.parametrize("case", [CASES[7], CASES[12]], ids=["plain", "windowed"])
def test_both_agree_with_the_cpu_runtime(case: Case, ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    for chunks in ([(1, 40), (1, 300)], [(70, 100), (1, 9), (30, 30)]):
        batch = Batched(case, chunks, put, seed=3)
        tokens = np.zeros(batch.rows, np.int32)
        positions = np.concatenate([np.arange(c - n, c) for n, c in chunks]).astype(np.int32)
        contract = Batch(tokens, positions, batch.starts, batch.lens, batch.tables, tokens[:1])
        run = batch.decode if all(n == 1 for n, _ in chunks) else batch.prefill
        found = run(ctx, put, poisoned, get)
        q = get(batch.qkv).astype(np.float32)[:, : batch.spec.q_size].reshape(batch.rows, case.heads, case.dim)
        expected = np.empty_like(q)
        cache: Any = _HostCache(get(batch.k), get(batch.v))
        cpu.attend(q, cache, 0, cpu.lay_out(contract, case.block_size), batch.spec, expected)
        assert tolerance.error(found, expected.reshape(batch.rows, -1)) < case.limit()


class _HostCache:
    """What the CPU's attention reads, from the device's layout. Its masks need finite values behind them."""

    def __init__(self, k: Any, v: Any) -> None:
        slots = k.shape[0] * k.shape[2]
        self.k, self.v = (
            np.nan_to_num(x.astype(np.float32).swapaxes(1, 2).reshape(slots, *x.shape[1::2])) for x in (k, v)
        )

    def read(self, layer: int, slots: Any) -> tuple[Any, Any]:
        return self.k[slots], self.v[slots]


def test_large_scores_neither_overflow_nor_lose_the_maximum(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    case = Case(4, 2, 64, scale=10.0)
    for chunks in ([(1, 70), (1, 300)], [(40, 70), (3, 300)]):
        batch = Batched(case, chunks, put)
        run = batch.decode if chunks[0][0] == 1 else batch.prefill
        assert tolerance.error(run(ctx, put, poisoned, get), batch.expected(get)) < case.limit()


@pytest.mark.parametrize(("window", "kv_dtype"), [(None, "f16"), (50, "f16"), (None, "u8"), (50, "u8")])
def test_prefill_of_a_sequence_is_bit_equal_in_any_chunks_and_company(
    window: int | None, kv_dtype: str, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(6, 2, 64, window=window, kv_dtype=kv_dtype), [(150, 190), (30, 77)], put)
    whole = batch.prefill(ctx, put, poisoned, get)
    values, d = get(batch.qkv), batch.device
    for first, last in [(0, 1), (1, 40), (40, 64), (64, 150)]:
        out = poisoned((last - first, batch.spec.q_size), "f16")
        starts, lens = np.array([0, last - first], np.int32), np.array([40 + last], np.int32)
        op.attend_prefill(
            ctx, put(values[first:last], "f16"), batch.k, batch.v, out, put(starts), put(lens),
            d["tables"].slice_rows(0, 1), put(op.prefill_work(starts, lens)), batch.spec, scales=batch.scales,
        )  # fmt: skip
        assert np.array_equal(get(out), whole[first:last])


def test_a_changed_future_token_leaves_earlier_outputs_bit_equal(
    ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(4, 2, 64), [(100, 100)], put)
    before = batch.prefill(ctx, put, poisoned, get)
    k, v = get(batch.k), get(batch.v)
    for cache in (k, v):
        cache[batch.tables[0, 60 // 16], :, 60 % 16] += 3
    batch.k, batch.v = put(k, "f16"), put(v, "f16")
    after = batch.prefill(ctx, put, poisoned, get)
    assert np.array_equal(before[:60], after[:60])
    assert (before[60:] != after[60:]).any(axis=1).all()


@pytest.mark.parametrize("kv_dtype", ["f16", "u8"])
def test_decode_and_prefill_agree_on_single_rows(
    kv_dtype: str, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(8, 2, 128, kv_dtype=kv_dtype), [(1, context) for context in (1, 77, 640)], put)
    decoded, prefilled = (run(ctx, put, poisoned, get) for run in (batch.decode, batch.prefill))
    assert tolerance.error(decoded, prefilled) < tolerance.CUDA_NORM


def test_a_window_as_long_as_the_context_changes_nothing(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    case = Case(4, 2, 64)
    for chunks in ([(1, 100), (1, 500)], [(50, 100), (80, 80)]):
        results = []
        for window in (None, 500):
            batch = Batched(replace(case, window=window), chunks, put)
            run = batch.decode if chunks[0][0] == 1 else batch.prefill
            results.append(run(ctx, put, poisoned, get))
        assert tolerance.error(results[1], results[0]) < tolerance.CUDA_NORM


def test_padding_is_skipped(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    batch = Batched(Case(6, 3, 64), [(3, 40), (2, 90)], put)
    out, d = poisoned((5, batch.spec.q_size), "f16"), batch.device
    work = put(np.array([[-1, 0], [1, 3], [-1, 5]], np.int32))
    op.attend_prefill(ctx, batch.qkv, batch.k, batch.v, out, d["starts"], d["lens"], d["tables"], work, batch.spec)
    found = get(out)
    assert np.isnan(found[:3]).all()
    assert tolerance.error(found[3:], batch.expected(get)[3:]) < tolerance.CUDA_BLOCK


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_of_one_token_every_fp8_code_comes_back_exactly(
    dtype: str, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(1, 1, 256, dtype=dtype, kv_dtype="u8"), [(1, 1)], put)
    codes = np.arange(256, dtype=np.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    values = get(batch.qkv)
    values[:, 512:] = decode_e4m3(codes) / 4
    batch.qkv = put(values, dtype)
    for run in (batch.decode, batch.prefill):  # the second reads what the first has stored
        assert np.array_equal(run(ctx, put, poisoned, get)[0], decode_e4m3(codes) / 4)


def test_fp8_values_as_large_and_as_small_as_float16_has_them_survive(
    ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    for chunks in ([(1, 70), (1, 300)], [(40, 70), (3, 300)]):
        batch = Batched(Case(4, 2, 64, kv_dtype="u8"), chunks, put)
        run = batch.decode if chunks[0][0] == 1 else batch.prefill
        for largest in (65504.0, 2.0**-14):
            values = get(batch.qkv)
            values[:, -2 * 64 :] = np.random.default_rng(0).uniform(-largest, largest, (batch.rows, 2 * 64))
            batch.qkv = batch.queries = put(values, "f16")  # the decodes' newest
            batch.scales = batch.scales[0], put(np.full(batch.v.shape[:3], largest / 448, np.float32))
            floor = 2.0**-24  # float16 has no smaller number; so it cannot tell less than half of it in the result
            found, expected = run(ctx, put, poisoned, get).astype(np.float64), batch.expected(get)
            assert np.abs(found - expected).max() < 3 * floor + largest * tolerance.CUDA_BLOCK / 4


def test_changed_future_fp8_tokens_and_scales_leave_earlier_outputs_bit_equal(
    ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(4, 2, 64, kv_dtype="u8"), [(100, 100)], put)
    before = batch.prefill(ctx, put, poisoned, get)
    k_scales, v_scales = (get(of) for of in batch.scales)
    at = np.arange(60, 100)
    for of in (k_scales, v_scales):
        of[batch.tables[0, at // 16], :, at % 16] *= 100
    batch.scales = put(k_scales), put(v_scales)
    after = batch.prefill(ctx, put, poisoned, get)
    assert np.array_equal(before[:60], after[:60])
    assert (before[60:] != after[60:]).any(axis=1).all()


def test_fp8_without_scales_is_named(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    batch = Batched(Case(4, 2, 64, kv_dtype="u8"), [(3, 40)], put)
    scales, batch.scales = batch.scales, None
    with pytest.raises(DeviceError, match="scales go with u8"):
        batch.prefill(ctx, put, poisoned, get)
    batch.scales = scales[0], poisoned((1, 2, 16), "f32")
    with pytest.raises(DeviceError, match=r"v_scales is f32\[1, 2, 16\]"):
        batch.prefill(ctx, put, poisoned, get)
