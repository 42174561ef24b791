"""Paged attention on the GPU against float64 and the CPU runtime, and the properties that batching relies on.

Caches are full of NaN wherever no token was written, block tables are scattered, outputs poisoned: what is read or
written beside its place shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tolerance
from polyhead.arch import Attention, FusedQKV, Linear
from polyhead.errors import DeviceError
from polyhead.runtime.contract import Batch
from polyhead.runtime.cpu import attention as cpu
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.graph import Graph
from polyhead.runtime.cuda.kv_cache import decode_e4m3
from polyhead.runtime.cuda.memory import Array, Pool
from polyhead.runtime.cuda.ops import attention as op

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]


@dataclass(frozen=True)
class Case:
    """An attention, and how it is stored."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    dtype: str = "f16"
    kv_dtype: str = "f16"
    scale: float | None = None

    def spec(self) -> Attention:
        return Attention(
            self.heads,
            self.kv_heads,
            self.dim,
            FusedQKV(Linear("a")),
            Linear("b"),
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
        )

    def limit(self) -> float:
        """Probabilities are rounded to the cache's type, or the activations' if that is fp8; so is the result."""
        return tolerance.CUDA_BLOCK * (2 if "bf16" in (self.dtype, self.kv_dtype) else 0.5)


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
by_shape = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.heads}-{c.kv_heads}x{c.dim}-b{c.block_size}-w{c.window}-{c.dtype}-{c.kv_dtype}"
)


class Batched:
    """Sequences of given (new rows, context) in a scattered cache, on the host and on the device."""

    def __init__(self, case: Case, chunks: Sequence[tuple[int, int]], put: Put, seed: int = 0, spare: int = 0) -> None:
        self.case, self.chunks, self.spec = case, chunks, case.spec()
        rng = np.random.default_rng(seed)
        size, heads, dim = case.block_size, case.kv_heads, case.dim
        width = max(-(-context // size) for _, context in chunks) + spare
        blocks = len(chunks) * width + 3
        self.tables = rng.permutation(blocks)[: len(chunks) * width].reshape(len(chunks), width).astype(np.int32)
        self.lens = np.array([context for _, context in chunks], np.int32)
        self.starts = np.concatenate([[0], np.cumsum([rows for rows, _ in chunks])]).astype(np.int32)
        k, v = (np.full((blocks, heads, size, dim), np.nan, np.float32) for _ in range(2))
        for table, context in zip(self.tables, self.lens, strict=True):
            at = np.arange(context)
            for cache in (k, v):
                cache[table[at // size], :, at % size] = rng.standard_normal((context, heads, dim))
        # In fp8 each row of the cache has a scale between 2^-13 and 1; where no token was written it is NaN.
        self.scales: Any = None
        if case.kv_dtype == "u8":
            written = np.isfinite(k[..., 0])
            k, v = (rng.integers(0, 256, k.shape).astype(np.uint8) for _ in range(2))
            for codes in (k, v):
                codes[codes & 0x7F == 0x7F] = 0  # NaN, which is never stored
            factors = [2.0 ** rng.uniform(-13, 0, written.shape) for _ in range(2)]
            factors[0] /= 64  # codes have a standard deviation of 100
            self.scales = tuple(put(np.where(written, of, np.nan).astype(np.float32)) for of in factors)
        self.k, self.v = put(k, case.kv_dtype), put(v, case.kv_dtype)
        rows = int(self.starts[-1])
        self.qkv = put(rng.standard_normal((rows, (case.heads + 2 * heads) * dim)) * 1.5, case.dtype)
        self.device = {
            name: put(array) for name, array in (("tables", self.tables), ("lens", self.lens), ("starts", self.starts))
        }

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    def values(self, get: Get) -> tuple[Any, Any]:
        """What the caches stand for, float64."""
        k, v = (get(cache) for cache in (self.k, self.v))
        if self.scales is not None:
            k, v = (
                decode_e4m3(codes).astype(np.float64) * get(of)[..., None]
                for codes, of in zip((k, v), self.scales, strict=True)
            )
        return k.astype(np.float64), v.astype(np.float64)

    def expected(self, get: Get) -> Any:
        """Float64, written straightforwardly: a query at a time."""
        case, spec = self.case, self.spec
        q = get(self.qkv).astype(np.float64)[:, : spec.q_size].reshape(self.rows, case.heads, case.dim)
        k, v = self.values(get)
        out = np.empty_like(q)
        group, scale = case.heads // case.kv_heads, spec.scale or 1 / math.sqrt(case.dim)
        for s, (rows, context) in enumerate(self.chunks):
            for i in range(rows):
                row, position = self.starts[s] + i, context - rows + i
                first = 0 if case.window is None else max(0, position - case.window + 1)
                at = np.arange(first, position + 1)
                block, offset = self.tables[s][at // case.block_size], at % case.block_size
                keys = np.repeat(k[block, :, offset], group, axis=1)
                scores = np.einsum("hd,khd->hk", q[row], keys) * scale
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                out[row] = np.einsum("hk,khd->hd", weights, np.repeat(v[block, :, offset], group, axis=1))
        return out.reshape(self.rows, -1)

    def prefill(self, ctx: Context, put: Put, poisoned: Put, get: Get) -> Any:
        """The result [rows, heads * dim], after checking that the row behind it was left alone."""
        out = poisoned((self.rows + 1, self.spec.q_size), self.case.dtype)
        work = put(op.prefill_work(self.starts, self.lens))
        d = self.device
        result = out.slice_rows(0, self.rows)
        op.attend_prefill(
            ctx, self.qkv, self.k, self.v, result, d["starts"], d["lens"], d["tables"], work, self.spec,
            scales=self.scales,
        )  # fmt: skip
        found = get(out)
        assert np.isnan(found[-1]).all()
        return found[:-1]

    def decode(self, ctx: Context, put: Put, poisoned: Put, get: Get, split: int | None = None, **more: Any) -> Any:
        """As prefill, for chunks of one row; also checks that the counters are zero again."""
        out = poisoned((self.rows + 1, self.spec.q_size), self.case.dtype)
        rows = len(self.chunks)
        reach = self.tables.shape[1] * self.case.block_size
        bound = {"max_context": reach, "split_tokens": split} if split else {}
        size = op.scratch_bytes(self.spec, rows, ctx.device.sms, **bound)
        scratch, counters = poisoned(size, "u8"), put(np.zeros(op.counters(self.spec, rows), np.int32))
        d = self.device
        result = out.slice_rows(0, self.rows)
        for _ in range(2):  # the second finds what the first left behind
            op.attend_decode(
                ctx, self.qkv, self.k, self.v, result, d["lens"], d["tables"], self.spec, scratch, counters,
                split_tokens=split, scales=self.scales, **more,
            )  # fmt: skip
        found = get(out)
        assert not get(counters).any()
        assert np.isnan(found[-1]).all()
        return found[:-1]


CONTEXTS = (1, 2, 15, 16, 17, 63, 64, 65, 200, 2000)


@by_shape
@pytest.mark.parametrize("split", [None, 64, 256], ids=lambda s: f"split-{s}")
def test_decode_agrees_with_float64(
    case: Case, split: int | None, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(case, [(1, context) for context in CONTEXTS], put, spare=2)
    assert tolerance.error(batch.decode(ctx, put, poisoned, get, split), batch.expected(get)) < case.limit()


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
        q = get(batch.qkv).astype(np.float32)[:, : batch.spec.q_size].reshape(batch.rows, case.heads, case.dim)
        expected = np.empty_like(q)
        cache: Any = _HostCache(get(batch.k), get(batch.v))
        cpu.attend(q, cache, 0, cpu.lay_out(contract, case.block_size), batch.spec, expected)
        run = batch.decode if all(n == 1 for n, _ in chunks) else batch.prefill
        assert tolerance.error(run(ctx, put, poisoned, get), expected.reshape(batch.rows, -1)) < case.limit()


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


def test_decode_with_a_fixed_split_is_bit_equal_alone_and_in_a_batch(
    ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(9, 3, 64), [(1, context) for context in (700, 5, 128, 1000)], put)
    together = batch.decode(ctx, put, poisoned, get, 128)
    values = get(batch.qkv)
    for s, context in enumerate(batch.lens):
        alone = Batched(batch.case, [(1, int(context))], put)
        alone.k, alone.v, alone.qkv = batch.k, batch.v, put(values[s : s + 1], "f16")
        alone.device["tables"] = put(batch.tables[s : s + 1])
        alone.tables = batch.tables[s : s + 1]
        assert np.array_equal(alone.decode(ctx, put, poisoned, get, 128)[0], together[s])


@pytest.mark.parametrize("kv_dtype", ["f16", "u8"])
def test_decode_and_prefill_agree_on_single_rows(
    kv_dtype: str, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(8, 2, 128, kv_dtype=kv_dtype), [(1, context) for context in (1, 77, 640)], put)
    decoded, prefilled = (run(ctx, put, poisoned, get) for run in (batch.decode, batch.prefill))
    assert tolerance.error(decoded, prefilled) < tolerance.CUDA_NORM


def test_grouped_heads_equal_repeated_keys_and_values(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    batch = Batched(Case(6, 2, 64), [(1, 300)], put)
    wide = Batched(Case(6, 6, 64), [(1, 300)], put)
    wide.k, wide.v = (put(np.repeat(get(cache), 3, axis=1), "f16") for cache in (batch.k, batch.v))
    values = get(wide.qkv)
    values[:, : batch.spec.q_size] = get(batch.qkv)[:, : batch.spec.q_size]
    wide.qkv = put(values, "f16")
    found, expected = (part.decode(ctx, put, poisoned, get, 64) for part in (wide, batch))
    assert np.array_equal(found, expected)


def test_a_window_as_long_as_the_context_changes_nothing(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    case = Case(4, 2, 64)
    for chunks in ([(1, 100), (1, 500)], [(50, 100), (80, 80)]):
        results = []
        for window in (None, 500):
            batch = Batched(replace(case, window=window), chunks, put)
            run = batch.decode if chunks[0][0] == 1 else batch.prefill
            results.append(run(ctx, put, poisoned, get))
        assert tolerance.error(results[1], results[0]) < tolerance.CUDA_NORM


def test_a_list_of_work_picks_the_decodes_of_a_mixed_batch(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    batch = Batched(Case(6, 3, 64), [(5, 40), (1, 90), (3, 3), (1, 7)], put)
    work = put(np.array([[1, 5], [3, 9], [-1, 0]], np.int32))
    found = batch.decode(ctx, put, poisoned, get, work=work)
    expected = batch.expected(get)
    for row in range(batch.rows):
        if row in (5, 9):
            assert tolerance.error(found[row], expected[row]) < tolerance.CUDA_BLOCK
        else:
            assert np.isnan(found[row]).all()


def test_padding_is_skipped(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    batch = Batched(Case(6, 3, 64), [(1, 40), (1, 90)], put)
    expected = batch.expected(get)
    batch.device["lens"] = put(np.array([0, 90], np.int32))
    found = batch.decode(ctx, put, poisoned, get)
    assert (found[0] == 0).all()
    assert tolerance.error(found[1], expected[1]) < tolerance.CUDA_BLOCK
    batch = Batched(Case(6, 3, 64), [(3, 40), (2, 90)], put)
    out, d = poisoned((5, batch.spec.q_size), "f16"), batch.device
    work = put(np.array([[-1, 0], [1, 3], [-1, 5]], np.int32))
    op.attend_prefill(ctx, batch.qkv, batch.k, batch.v, out, d["starts"], d["lens"], d["tables"], work, batch.spec)
    found = get(out)
    assert np.isnan(found[:3]).all()
    assert tolerance.error(found[3:], batch.expected(get)[3:]) < tolerance.CUDA_BLOCK


def test_a_captured_decode_follows_contexts_that_grow(
    ctx: Context, pool: Pool, put: Put, poisoned: Put, get: Get
) -> None:
    contexts = [(3, 100), (64, 400), (129, 1000)]
    full = Batched(Case(9, 3, 64), [(1, long) for _, long in contexts], put)
    rows = len(contexts)
    out = poisoned((rows, full.spec.q_size), "f16")
    scratch = poisoned(op.scratch_bytes(full.spec, rows, ctx.device.sms), "u8")
    counters = put(np.zeros(op.counters(full.spec, rows), np.int32))
    d = full.device

    def work() -> None:
        op.attend_decode(ctx, full.qkv, full.k, full.v, out, d["lens"], d["tables"], full.spec, scratch, counters)

    work()
    graph = Graph(ctx, work)
    for lens in ([short for short, _ in contexts], [long for _, long in contexts], [3, 400, 129]):
        full.chunks, full.lens = [(1, n) for n in lens], np.array(lens, np.int32)
        ctx.device.upload(d["lens"], full.lens)
        ctx.device.fill(out, 0xFF)
        graph.launch()
        assert tolerance.error(get(out), full.expected(get)) < tolerance.CUDA_BLOCK
        assert not get(counters).any()


def test_what_does_not_go_together_is_named(ctx: Context, put: Put, poisoned: Put) -> None:
    batch = Batched(Case(4, 2, 64), [(1, 40)], put)
    d, out = batch.device, poisoned((1, 256), "f16")
    common = (ctx, batch.qkv, batch.k, batch.v)
    counters = put(np.zeros(2, np.int32))
    with pytest.raises(DeviceError, match="max_context is 4000"):
        op.attend_decode(
            *common, out, d["lens"], d["tables"], batch.spec, poisoned(1 << 20, "u8"), counters, max_context=4000
        )
    with pytest.raises(DeviceError, match=r"scratch is u8\[0\]"):
        op.attend_decode(
            *common, out, d["lens"], put(np.zeros((1, 90), np.int32)), batch.spec, poisoned(0, "u8"), counters
        )
    with pytest.raises(DeviceError, match=r"out is f16\[1, 128\]"):
        op.attend_decode(
            *common, poisoned((1, 128), "f16"), d["lens"], d["tables"], batch.spec, poisoned(0, "u8"), counters
        )


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_of_one_token_every_fp8_code_comes_back_exactly(
    dtype: str, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(1, 1, 256, dtype=dtype, kv_dtype="u8"), [(1, 1)], put)
    codes = np.arange(256, dtype=np.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    batch.v = put(np.broadcast_to(codes, batch.v.shape).copy())
    batch.scales = tuple(put(np.full(batch.v.shape[:3], of, np.float32)) for of in (1.0, 0.25))
    for run in (batch.decode, batch.prefill):
        assert np.array_equal(run(ctx, put, poisoned, get)[0], decode_e4m3(codes) / 4)


def test_fp8_values_as_large_and_as_small_as_float16_has_them_survive(
    ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    for chunks in ([(1, 70), (1, 300)], [(40, 70), (3, 300)]):
        batch = Batched(Case(4, 2, 64, kv_dtype="u8"), chunks, put)
        run = batch.decode if chunks[0][0] == 1 else batch.prefill
        for largest in (65504.0, 2.0**-14):
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
