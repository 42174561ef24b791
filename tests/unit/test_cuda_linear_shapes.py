"""How blocks of the kernels for packed weights are shaped: what they ask for must be there, on any GPU."""

from __future__ import annotations

import pytest
from polyhead.runtime.cuda.formats import FORMATS, QuantMatrix
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops import linear_one
from polyhead.runtime.cuda.ops.linear import SOME_ROWS, WIDE_ROWS
from polyhead.runtime.cuda.ops.linear_wide import SHAPES, room_bytes, shape_for
from polyhead.runtime.cuda.ops.some_shapes import TOKEN_TILES, choose, part_bytes, scale_bytes, shared_bytes

#: Bytes of shared memory of a block: compute capability 7.5, 8.6 and 12.0, 8.0, 9.0.
LIMITS = (64 << 10, 99 << 10, 163 << 10, 227 << 10)
OWN = (0.01, 1, 2, 3, 5, 13.6, 60, 500)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("gated", [False, True])
def test_some_rows_fit_into_shared_memory(limit: int, gated: bool) -> None:
    for kind in FORMATS:
        for own in OWN:
            for count in (*range(1, SOME_ROWS + 1), 65, 100, 130, 1000):
                for units in (1, 16, 56):
                    parts, token_tiles, shape = choose(kind, own, count, limit, gated, units)
                    assert parts * 8 * token_tiles >= count
                    assert shared_bytes(kind, shape, token_tiles) + part_bytes(token_tiles) <= limit
                    assert 8 % shape.row_warps == 8 % shape.groups == 0
                    assert shape.ring >= 2
                    assert not gated or shape.tiles % 2 == 0


def test_where_scales_meet_sums_blocks_have_room_for_them() -> None:
    for kind, form in FORMATS.items():
        summed = [n for n in TOKEN_TILES if scale_bytes(kind, n)]
        assert {1, 2} <= set(summed) < set(TOKEN_TILES)
        for token_tiles in summed:
            _, _, shape = choose(kind, 13.6, 8 * token_tiles, LIMITS[3])
            activations = 8 // shape.row_warps * shape.ring * shape.groups * 32 * 2 * 8 * token_tiles
            scales = 4 * 16 * 256 // form.group  # of a tile's unit, and as much for what meets the activations' sums
            assert shared_bytes(kind, shape, token_tiles) >= activations + 8 * shape.tiles * 2 * scales


def test_on_a_large_gpu_every_way_is_as_measured() -> None:
    assert choose("Q4_K", 1.9, 64, LIMITS[3])[:2] == (1, 8)
    assert choose("Q4_K", 13.6, 8, LIMITS[3])[2].blocks == 2
    assert choose("Q4_K", 1.9, 16, LIMITS[3], units=16) != choose("Q4_K", 1.9, 16, LIMITS[3], units=56)
    assert choose("Q4_K", 1.9, 64, LIMITS[1])[2].ring < choose("Q4_K", 1.9, 64, LIMITS[3])[2].ring


@pytest.mark.parametrize("limit", LIMITS[1:])
@pytest.mark.parametrize(("normed", "gated"), [(True, True), (True, False), (False, False)])
def test_one_row_of_a_large_matrix_has_a_ring_on_every_gpu(limit: int, normed: bool, gated: bool) -> None:
    for kind in FORMATS:
        for rows, cols in ((28672, 4096), (4096, 14336), (4096, 4096), (128256, 8192), (64, 256)):
            if normed and cols > 8192:
                continue
            w = QuantMatrix(kind, rows, cols, Array(0, QuantMatrix.shape_of(kind, rows, cols), "u8"))
            shape = linear_one.shape_for(w, 84, limit, normed=normed, gated=gated)
            assert shape.ring >= 2, (kind, rows, cols)
            assert shape.shared <= limit - 256
            assert shape.shared >= shape.warps * shape.ring * w.format.unit_bytes


def test_large_matrices_have_more_warps_where_these_fit() -> None:
    w = QuantMatrix("Q8_0", 28672, 4096, Array(0, QuantMatrix.shape_of("Q8_0", 28672, 4096), "u8"))
    large, small = (linear_one.shape_for(w, 84, limit, normed=True, gated=True) for limit in (LIMITS[3], LIMITS[1]))
    assert (large.warps, small.warps) == (12, 8)


def test_wide_rows_fit_into_shared_memory_and_registers() -> None:
    for shape in SHAPES:
        k_groups = shape.groups // shape.row_groups
        assert k_groups * shape.row_groups == shape.groups in (2, 3, 4)
        assert (
            k_groups * shape.ring * shape.stage * 64 * shape.tokens + 4 * 4 * shape.groups * 16 * 33 <= LIMITS[3] - 256
        )
        assert shape.tokens // 2 <= 128, "accumulators of a thread"


def test_the_room_for_rearranged_rows_suffices_and_grows_with_them() -> None:
    last = 0
    for count in range(1, WIDE_ROWS + 1):
        room = room_bytes(count, 4000)
        for own in OWN:
            tokens = shape_for(own, count).tokens
            assert -(-count // tokens) * tokens * 2 * 4096 <= room
        assert room >= last, "a plan for the most rows is one for fewer"
        last = room
