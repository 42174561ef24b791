"""What attention plans on the host: blocks and splits of decode, scratch memory, tiles of work. Needs no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from polyhead.arch import Attention, FusedQKV, Linear
from polyhead.runtime.cuda.ops import attention as op
from polyhead.runtime.cuda.ops import attention_plan as plans

HOPPER, CONSUMER = (132, 227 << 10), (170, 99 << 10)  # multiprocessors, bytes of shared memory for a block


def spec_of(heads: int, kv_heads: int, dim: int, window: int | None = None) -> Attention:
    return Attention(heads, kv_heads, dim, FusedQKV(Linear("a")), Linear("b"), window=window)


def pieces(plan: plans.DecodePlan, context: int, window: int | None) -> int:
    """As the kernel counts them."""
    tiles = -(-context // 16) - (0 if window is None else max(0, context - window) // 16)
    each = tiles if tiles * 16 <= plan.single else max(plan.least // 16, -(-tiles // plan.most))
    return -(-tiles // each)


@pytest.mark.parametrize("fixed", [False, True])
def test_scratch_and_grid_suffice_for_every_batch_and_context(fixed: bool) -> None:
    for spec in (spec_of(9, 3, 64), spec_of(32, 8, 128, 100), spec_of(71, 1, 64), spec_of(4, 4, 2, 4096)):
        for sms, shared in (HOPPER, CONSUMER):
            room = plans.scratch_bytes(spec, 48, sms, fixed=fixed)
            for rows in (1, 2, 3, 8, 17, 48):
                plan = plans.choose_plan(spec, rows, sms, shared, 2, fixed=fixed)
                for bound in (1, 64, 65, 100, 513, 1000, 5000, 33000, 131072):
                    splits = plan.splits(spec, bound)
                    assert splits <= plans.MAX_SPLITS
                    assert plans.counters(spec, rows) * splits * plans.partial_bytes(spec) <= room
                    for context in {1, bound // 3 + 1, max(1, bound - 7), bound}:
                        assert pieces(plan, context, spec.window) <= splits


def test_a_window_touches_no_more_pieces_than_counted() -> None:
    plan = plans.DecodePlan(4, 2, single=16, least=16, most=128)
    for window in (1, 2, 16, 17, 18, 63, 100, 1000):
        most = plan.splits(spec_of(2, 1, 64, window), 5000)
        assert max(pieces(plan, context, window) for context in range(1, 5001, 7)) <= most


def test_a_fixed_plan_does_not_know_the_batch() -> None:
    spec = spec_of(32, 8, 128)
    found = {plans.choose_plan(spec, rows, *HOPPER, 2, fixed=True) for rows in (1, 2, 31, 200)}
    assert len(found) == 1
    # It serves any batch, so it is not the one that fits a single sequence best.
    assert found.pop().warps < plans.choose_plan(spec, 1, *HOPPER, 2).warps


def test_long_contexts_fill_the_device_and_short_ones_are_not_cut_to_pieces() -> None:
    spec = spec_of(32, 8, 128)
    alone, many = (plans.choose_plan(spec, rows, *HOPPER, 2) for rows in (1, 64))
    assert 8 * alone.splits(spec, 4096) >= 0.9 * 132
    assert alone.splits(spec, 256) == many.splits(spec, 256) == 1
    assert many.splits(spec, 2048) == 1
    assert 8 * many.splits(spec, 131072) >= 32  # one long context among many short ones is not read by a few blocks


def test_one_sequence_has_a_block_for_each_multiprocessor_as_large_as_fits() -> None:
    for value_bytes in (1, 2):
        alone, several = (plans.choose_plan(spec_of(32, 8, 128), rows, *HOPPER, value_bytes) for rows in (1, 8))
        assert alone.warps > several.warps
        assert 8 * alone.splits(spec_of(32, 8, 128), 1 << 15) <= 132
        assert plans.choose_plan(spec_of(32, 8, 256), 1, *HOPPER, value_bytes).warps <= 8, "registers"


def test_where_the_largest_block_does_not_fit_there_is_room_beside_the_next() -> None:
    shared = 163 << 10
    plan = plans.choose_plan(spec_of(32, 8, 128), 1, 108, shared, 2)
    assert plan.warps <= 8
    assert plans.decode_shared_bytes(128, 2, plan.warps, plan.stages) <= shared // 2 - 2048


@pytest.mark.parametrize("value_bytes", [1, 2])
def test_blocks_fit_the_shared_memory_of_every_gpu(value_bytes: int) -> None:
    for dim in range(2, 257, 2):
        for sms, shared in (HOPPER, CONSUMER, (72, 64 << 10)):
            plan = plans.choose_plan(spec_of(8, 2, dim), 1, sms, shared, value_bytes)
            dynamic = plans.decode_shared_bytes(dim, value_bytes, plan.warps, plan.stages)
            assert dynamic + 4 * dim * plan.warps + 20 * dim + 4096 < shared


def test_prefill_work_covers_every_row_once() -> None:
    starts, lens = np.array([0, 1, 65, 65, 200], np.int32), np.array([9, 64, 5, 400], np.int32)
    work = op.prefill_work(starts, lens)
    rows = sorted(row for s, first in work for row in range(first, min(first + op.TILE, starts[s + 1])))
    assert rows == list(range(200))
    assert work[0].tolist() == [3, 193]


def test_prefill_work_leaves_out_the_sequences_before_the_first_asked_for() -> None:
    starts, lens = np.array([0, 1, 2, 70, 71], np.int32), np.array([9, 500, 68, 30], np.int32)
    assert op.prefill_work(starts, lens, 2).tolist() == [[2, 66], [2, 2], [3, 70]]
    assert op.prefill_work(starts, lens, 4).shape == (0, 2)
