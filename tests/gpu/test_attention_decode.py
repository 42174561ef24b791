"""A decode step's attention on the GPU: float64, the cache beside store_kv's, plans, padding, graphs.

Batched.decode checks at every call that the cache is what store_kv makes of it, bit by bit, and that nothing else was
touched.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tolerance
from attention_batch import Batched, Case, Get, Put
from polyhead.arch import LayerNorm, RMSNorm, Rope
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.graph import Graph
from polyhead.runtime.cuda.memory import Pool
from polyhead.runtime.cuda.ops import attention as op
from polyhead.runtime.cuda.ops.attention import DecodePlan

pytestmark = pytest.mark.gpu

RMS, LAYER, BARE = RMSNorm("w", 1e-6), LayerNorm("w", "b", 1e-5), LayerNorm("w", None, 1e-5)


def interleaved(dim: int) -> Rope:
    return Rope(10000.0, dim, "interleaved")


def half(dim: int) -> Rope:
    return Rope(10000.0, dim, "half")


CASES = [
    Case(2, 2, 2, block_size=1, rope=interleaved(2)),
    Case(6, 3, 6, block_size=3, window=1, rope=half(6)),
    Case(4, 2, 10, block_size=3, softcap=5.0, scale=1.0, rope=half(6), q_norm=LAYER, k_norm=RMS),
    Case(3, 1, 10, block_size=1, window=3, kv_dtype="bf16"),
    Case(4, 1, 16, window=100, rope=interleaved(8)),
    Case(2, 2, 24, rope=half(24), q_norm=RMS),
    Case(4, 2, 40, block_size=3, rope=interleaved(40)),
    Case(4, 4, 48, rope=half(16)),
    Case(9, 3, 64, rope=interleaved(64)),
    Case(25, 25, 64),
    Case(12, 12, 64, window=3),
    Case(4, 4, 80, softcap=50.0, rope=half(32), q_norm=BARE, k_norm=LAYER),
    Case(6, 2, 96, window=100, rope=half(96)),
    Case(4, 2, 112),
    Case(8, 8, 128, block_size=3, dtype="bf16", kv_dtype="bf16", rope=half(128), q_norm=RMS, k_norm=RMS),
    Case(32, 8, 128, rope=interleaved(128)),
    Case(16, 2, 128, softcap=20.0, window=70, rope=half(64)),
    Case(20, 2, 64, rope=half(64)),  # ten query heads of a KV head: two blocks
    Case(17, 1, 64, dtype="bf16", rope=interleaved(64)),
    Case(3, 1, 192, window=33),
    Case(8, 1, 256, dtype="bf16", kv_dtype="bf16", rope=half(256)),
    Case(4, 2, 256, block_size=1, window=100, softcap=30.0, rope=interleaved(64)),
    Case(2, 2, 2, block_size=1, kv_dtype="u8"),
    Case(4, 2, 10, block_size=3, softcap=5.0, scale=1.0, kv_dtype="u8", rope=half(6), k_norm=RMS),
    Case(4, 1, 16, window=100, kv_dtype="u8", dtype="bf16"),
    Case(3, 3, 20, kv_dtype="u8", rope=interleaved(20)),
    Case(4, 2, 40, block_size=3, kv_dtype="u8", rope=interleaved(40)),
    Case(9, 3, 64, kv_dtype="u8", rope=half(64)),
    Case(4, 4, 80, softcap=50.0, kv_dtype="u8"),
    Case(6, 2, 96, window=100, kv_dtype="u8", dtype="bf16", rope=half(96)),
    Case(32, 8, 128, kv_dtype="u8", rope=interleaved(128)),
    Case(20, 2, 128, block_size=3, kv_dtype="u8", rope=half(128), q_norm=RMS, k_norm=RMS),
    Case(3, 1, 192, window=33, kv_dtype="u8", dtype="bf16"),
    Case(4, 2, 256, block_size=1, window=100, softcap=30.0, kv_dtype="u8", rope=half(64)),
    Case(2, 1, 256, kv_dtype="u8", dtype="bf16"),
]
CONTEXTS = (1, 2, 15, 16, 17, 63, 64, 65, 129, 200, 1100)
PLANS = {
    "chosen": None,
    "pieces": DecodePlan(4, 2, single=32, least=64, most=128),
    "few": DecodePlan(8, 1, single=100, least=16, most=3),
    "narrow": DecodePlan(2, 1, single=16, least=16, most=128),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_agrees_with_float64(
    case: Case, plan: DecodePlan | None, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(case, [(1, context) for context in CONTEXTS], put, spare=2)
    found = batch.decode(ctx, put, poisoned, get, **({"plan": plan} if plan else {}))
    assert tolerance.error(found, batch.expected(get)) < case.limit()


@pytest.mark.parametrize("kv_dtype", ["f16", "u8"])
def test_a_long_context_agrees_with_float64(kv_dtype: str, ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    batch = Batched(Case(8, 2, 128, kv_dtype=kv_dtype, rope=half(128)), [(1, 4096), (1, 4097), (1, 3)], put)
    assert tolerance.error(batch.decode(ctx, put, poisoned, get), batch.expected(get)) < batch.case.limit()


def test_more_partial_results_than_shared_memory_holds_are_added_up(
    ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(8, 1, 256), [(1, 2048)], put)
    found = batch.decode(ctx, put, poisoned, get, plan=DecodePlan(2, 1, 16, 16, 128))
    assert tolerance.error(found, batch.expected(get)) < batch.case.limit()


@pytest.mark.parametrize("kv_dtype", ["f16", "u8"])
def test_with_a_fixed_split_a_row_is_bit_equal_alone_and_in_any_company(
    kv_dtype: str, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    case = Case(9, 3, 64, kv_dtype=kv_dtype, rope=interleaved(64))
    batch = Batched(case, [(1, context) for context in (700, 5, 128, 1000)], put)
    together = batch.decode(ctx, put, poisoned, get, fixed_split=True)
    values = get(batch.qkv)
    for s, context in enumerate(batch.lens):
        alone = Batched(case, [(1, int(context))], put)
        alone.k, alone.v, alone.scales, alone.turn = batch.k, batch.v, batch.scales, batch.turn
        alone.qkv = put(values[s : s + 1], "f16")
        alone.tables = batch.tables[s : s + 1, : -(-int(context) // 16)]  # as narrow as it may be
        alone.device["tables"] = put(alone.tables)
        assert np.array_equal(alone.decode(ctx, put, poisoned, get, fixed_split=True)[0], together[s])


def test_the_same_launch_twice_gives_the_same_bits(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    batch = Batched(Case(32, 8, 128, rope=half(128)), [(1, 900), (1, 1500)], put)
    first, second = (batch.decode(ctx, put, poisoned, get) for _ in range(2))
    assert np.array_equal(first, second)


def test_grouped_heads_equal_repeated_keys_and_values(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    batch, wide = (Batched(Case(6, kv_heads, 64, rope=half(64)), [(1, 300)], put) for kv_heads in (2, 6))
    wide.k, wide.v = (put(np.repeat(get(cache), 3, axis=1), "f16") for cache in (batch.k, batch.v))
    q, k, v = np.split(get(batch.qkv).reshape(1, 10, 64), [6, 8], axis=1)
    wide.qkv = put(np.concatenate([q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1)], axis=1).reshape(1, -1), "f16")
    plan = PLANS["pieces"]
    found, expected = (part.decode(ctx, put, poisoned, get, plan=plan) for part in (wide, batch))
    assert np.array_equal(found, expected)


def test_prefill_of_the_newest_row_agrees(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    for kv_dtype in ("f16", "u8"):
        case = Case(20, 2, 128, kv_dtype=kv_dtype, rope=half(128), q_norm=RMS, k_norm=RMS)
        batch = Batched(case, [(1, context) for context in (1, 77, 640)], put)
        decoded, prefilled = (run(ctx, put, poisoned, get) for run in (batch.decode, batch.prefill))
        assert tolerance.error(decoded, prefilled) < tolerance.CUDA_NORM


@pytest.mark.parametrize("lengths", [True, False], ids=["by-length", "by-position"])
def test_padding_gets_zeros_and_leaves_the_cache_alone(
    lengths: bool, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(6, 3, 64), [(1, 40), (1, 90)], put)
    batch.positions[0] = -1
    batch.device["positions"] = put(batch.positions)
    if lengths:
        batch.device["lens"] = put(np.array([0, 90], np.int32))
    found = batch.decode(ctx, put, poisoned, get)
    assert (found[0] == 0).all()
    assert tolerance.error(found[1], batch.expected(get)[1]) < tolerance.CUDA_BLOCK


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
        op.attend_decode(
            ctx, full.qkv, full.k, full.v, out, d["lens"], d["tables"], full.spec, scratch, counters,
            turn=None, norms=[None, None], positions=d["positions"],
        )  # fmt: skip

    work()
    graph = Graph(ctx, work)
    for lens in ([short for short, _ in contexts], [long for _, long in contexts], [3, 400, 129]):
        full.chunks, full.lens = [(1, n) for n in lens], np.array(lens, np.int32)
        ctx.device.upload(d["lens"], full.lens)
        ctx.device.upload(d["positions"], full.lens - 1)
        ctx.device.fill(out, 0xFF)
        graph.launch()
        assert tolerance.error(get(out), full.expected(get)) < tolerance.CUDA_BLOCK
        assert not get(counters).any()


def test_steps_one_after_the_other_read_what_the_ones_before_stored(
    ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    batch = Batched(Case(8, 2, 64, kv_dtype="u8", rope=half(64)), [(1, 40)], put)
    for step in range(10):  # over the end of a block
        batch.lens, batch.positions = np.array([31 + step], np.int32), np.array([30 + step], np.int32)
        batch.chunks = [(1, 31 + step)]
        batch.qkv = put(np.random.default_rng(step).standard_normal((1, 12 * 64)), "f16")
        for name, values in (("lens", batch.lens), ("positions", batch.positions)):
            batch.device[name] = put(values)
        found = batch.decode(ctx, put, poisoned, get)
        assert tolerance.error(found, batch.expected(get)) < tolerance.CUDA_BLOCK


def test_a_query_that_is_turned_another_way_changes_the_result(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    results = []
    for rope in (None, interleaved(64), half(64), half(32)):
        batch = Batched(replace(Case(4, 2, 64), rope=rope), [(1, 50)], put)
        results.append(batch.decode(ctx, put, poisoned, get))
    for i, one in enumerate(results):
        assert all(tolerance.error(one, other) > 0.01 for other in results[:i])


def test_what_does_not_go_together_is_named(ctx: Context, put: Put, poisoned: Put) -> None:
    batch = Batched(Case(4, 2, 64, rope=half(64)), [(1, 40)], put)
    d = batch.device

    def attend(out: int = 256, tables: int = 3, room: int = 1 << 20, **more: object) -> None:
        op.attend_decode(
            ctx, batch.qkv, batch.k, batch.v, poisoned((1, out), "f16"), d["lens"],
            put(np.zeros((1, tables), np.int32)), batch.spec, poisoned(room, "u8"), put(np.zeros(2, np.int32)),
            **{"turn": batch.turn, "norms": [None, None], "positions": d["positions"], **more},
        )  # fmt: skip

    with pytest.raises(DeviceError, match=r"scratch is u8\[0\]"):
        attend(tables=90, room=0)
    with pytest.raises(DeviceError, match=r"out is f16\[1, 128\]"):
        attend(out=128)
    with pytest.raises(DeviceError, match="rope is in only one"):
        attend(turn=None)
    with pytest.raises(DeviceError, match="k_norm differs"):
        attend(norms=[None, (RMS, poisoned(64, "f32"), None)])
    with pytest.raises(DeviceError, match=r"positions is i32\[2\]"):
        attend(positions=put(np.zeros(2, np.int32)))
    with pytest.raises(DeviceError, match="2 sequences, but qkv is"):
        op.attend_decode(
            ctx, batch.qkv, batch.k, batch.v, poisoned((1, 256), "f16"), put(np.ones(2, np.int32)),
            put(np.zeros((2, 3), np.int32)), batch.spec, poisoned(0, "u8"), put(np.zeros(4, np.int32)),
            turn=batch.turn, norms=[None, None], positions=d["positions"],
        )  # fmt: skip
