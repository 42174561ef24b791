"""How blocks of the kernels for packed weights are shaped: what they ask for must be there, on any GPU."""

from __future__ import annotations

import pytest
from polyhead.runtime.cuda.formats import FORMATS
from polyhead.runtime.cuda.ops.linear import SOME_ROWS, WIDE_ROWS
from polyhead.runtime.cuda.ops.linear_some import SUMMED_TILES, choose, part_bytes, shared_bytes
from polyhead.runtime.cuda.ops.linear_wide import SHAPES, room_bytes, shape_for

#: Bytes of shared memory of a block: compute capability 7.5, 8.6 and 12.0, 8.0, 9.0.
LIMITS = (64 << 10, 99 << 10, 163 << 10, 227 << 10)
OWN = (0.01, 1, 2, 3, 5, 13.6, 60, 500)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("gated", [False, True])
def test_some_rows_fit_into_shared_memory(limit: int, gated: bool) -> None:
    for kind in FORMATS:
        for own in OWN:
            for count in (*range(1, SOME_ROWS + 1), 65, 100, 130, 1000):
                chosen = choose(kind, own, count, limit, gated)
                if chosen is None:
                    assert gated
                    continue
                parts, token_tiles, shape = chosen
                assert parts * 8 * token_tiles >= count
                assert shared_bytes(kind, shape, token_tiles) + part_bytes(token_tiles) <= limit
                assert 8 % shape.row_warps == 8 % shape.groups == 0
                assert shape.ring >= 2
                assert not gated or shape.tiles % 2 == 0


def test_where_scales_meet_sums_blocks_have_room_for_them() -> None:
    for kind, form in FORMATS.items():
        for token_tiles in range(1, SUMMED_TILES + 1):
            _, _, shape = choose(kind, 13.6, 8 * token_tiles, LIMITS[3])
            activations = 8 // shape.row_warps * shape.ring * shape.groups * 32 * 2 * 8 * token_tiles
            scales = 4 * 16 * 256 // form.group  # of a tile's unit, and as much for what meets the activations' sums
            assert shared_bytes(kind, shape, token_tiles) >= activations + 8 * shape.tiles * 2 * scales


def test_on_a_large_gpu_every_way_is_as_measured() -> None:
    assert choose("Q4_K", 1.9, 64, LIMITS[3])[:2] == (1, 8)
    assert choose("Q4_K", 13.6, 8, LIMITS[3])[2].blocks == 2
    assert choose("Q4_K", 1.9, 64, LIMITS[1])[2].ring < choose("Q4_K", 1.9, 64, LIMITS[3])[2].ring


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
