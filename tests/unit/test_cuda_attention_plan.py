"""What attention plans on the host: how contexts are split, scratch memory, tiles of work. Needs no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from polyhead.arch import Attention, FusedQKV, Linear
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.ops import attention as op


def test_scratch_suffices_for_every_batch_and_context() -> None:
    for heads, kv_heads, dim, window in ((9, 3, 64, None), (32, 8, 128, 100), (71, 1, 64, None), (4, 4, 2, 4096)):
        spec = Attention(heads, kv_heads, dim, FusedQKV(Linear("a")), Linear("b"), window=window)
        room = op.scratch_bytes(spec, 48, 132)
        for rows in range(1, 49):
            for bound in (1, 64, 65, 100, 1000, 5000, 33000, 131072):
                tokens = op.choose_split(spec, rows, bound, 132)
                assert op.partial_bytes(spec, rows, bound, tokens) <= room
                assert op.count_splits(spec, bound, tokens) <= op.MAX_SPLITS


def test_prefill_work_covers_every_row_once() -> None:
    starts, lens = np.array([0, 1, 65, 65, 200], np.int32), np.array([9, 64, 5, 400], np.int32)
    work = op.prefill_work(starts, lens)
    rows = sorted(row for s, first in work for row in range(first, min(first + op.TILE, starts[s + 1])))
    assert rows == list(range(200))
    assert work[0].tolist() == [3, 193]


def test_a_window_touches_no_more_splits_than_counted() -> None:
    for window in (1, 2, 63, 64, 65, 100, 1000):
        spec = Attention(2, 1, 64, FusedQKV(Linear("a")), Linear("b"), window=window)
        most = op.count_splits(spec, 5000, 64)
        for context in range(1, 5001, 7):
            first = max(0, context - window) // 64
            assert (context - 1) // 64 - first + 1 <= most


def test_long_contexts_fill_the_device_and_short_ones_are_not_cut_to_pieces() -> None:
    spec = Attention(32, 8, 128, FusedQKV(Linear("a")), Linear("b"))
    tokens = op.choose_split(spec, 1, 32768, 132)
    assert 8 * op.count_splits(spec, 32768, tokens) >= 132
    assert op.choose_split(spec, 1, 64, 132) == 64
    assert op.choose_split(spec, 64, 32768, 132) == 32768


def test_a_fixed_split_needs_a_bound_on_the_context() -> None:
    spec = Attention(2, 1, 64, FusedQKV(Linear("a")), Linear("b"))
    with pytest.raises(DeviceError, match="without max_context"):
        op.scratch_bytes(spec, 1, 132, split_tokens=64)
