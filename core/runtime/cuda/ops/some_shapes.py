"""How blocks of kernels/linear_some.cu work, for a format, the tiles of a multiprocessor and some rows of activations.

Knows nothing of launching. The table is what was fastest of all shapes that fit, or near it, on an H100: matrices of
models of 8e9 and 1e9 weights in Q4_K, Q6_K and Q8_0, one launch after the other as in a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....errors import DeviceError
from ..formats import format_of

WARPS = 8
TOKEN_TILES = (1, 2, 3, 4, 6, 8)
"""Columns of 8 tokens that a block can have."""
_SCALE_BYTES = {32: 1152, 16: 2176}
"""Shared memory for the scales of a tile's unit where they meet sums, by the weights that share one."""
_SHORT = 16
"""Units of 256 columns up to which too few are left for each of 8 warps behind one another."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a block works: row warps, tiles of each, groups of 32 columns of a stage and stages of the ring; and how many
    blocks a multiprocessor has."""

    row_warps: int
    tiles: int
    groups: int
    ring: int
    blocks: int


def _row(*shapes: tuple[int, int, int, int, int]) -> dict[int, Shape]:
    """Shapes for each of TOKEN_TILES."""
    return {n: Shape(*shape) for n, shape in zip(TOKEN_TILES, shapes, strict=True)}


# Up to one tile of a multiprocessor, up to two (of few columns; of more), three, four; and many, by the bits of a code,
# which decide how many tiles of a warp, or blocks, registers hold.
_ONE = _row((1, 1, 4, 3, 1), (1, 1, 4, 3, 1), (1, 1, 4, 3, 1), (1, 1, 2, 3, 1), (1, 1, 1, 4, 1), (1, 1, 1, 4, 1))
_TWO = _row((1, 2, 8, 2, 1), (1, 2, 4, 3, 1), (1, 2, 4, 3, 1), (1, 2, 4, 3, 1), (1, 2, 1, 4, 1), (1, 2, 1, 4, 1))
_TWO_SHORT = _row((1, 1, 8, 2, 2), (2, 1, 8, 2, 1), (2, 1, 8, 2, 1), (2, 1, 8, 2, 1), (1, 2, 1, 4, 1), (1, 2, 1, 4, 1))
_THREE = _row((1, 3, 8, 2, 1), (1, 3, 4, 2, 1), (2, 2, 4, 3, 1), (1, 3, 2, 3, 1), (1, 3, 2, 3, 1), (2, 2, 2, 3, 1))
_FOUR = _row((2, 2, 8, 2, 1), (2, 2, 8, 2, 1), (2, 2, 4, 3, 1), (2, 2, 4, 3, 1), (2, 2, 2, 3, 1), (2, 2, 2, 3, 1))
_MANY = {
    4: _row((4, 2, 8, 2, 2), (4, 2, 4, 3, 1), (4, 2, 4, 3, 1), (4, 2, 4, 3, 1), (4, 2, 4, 3, 1), (4, 2, 4, 3, 1)),
    6: _row((4, 1, 8, 2, 2), (4, 1, 8, 2, 2), (4, 1, 8, 2, 2), (4, 1, 8, 2, 2), (8, 1, 4, 2, 2), (4, 1, 4, 2, 2)),
    8: _row((4, 1, 8, 2, 2), (4, 1, 8, 2, 2), (4, 1, 8, 2, 2), (8, 1, 8, 2, 2), (4, 2, 2, 3, 1), (4, 2, 2, 3, 1)),
}
_MANY_GATED = {
    4: _row((2, 2, 4, 3, 2), *((4, 2, 4, 3, 1),) * 5),
    6: _row((4, 2, 8, 2, 1), *((4, 2, 4, 3, 1),) * 5),
    8: _row((1, 2, 4, 3, 1), (1, 2, 4, 3, 1), (4, 2, 4, 3, 1), (4, 2, 4, 3, 1), (4, 2, 2, 3, 1), (4, 2, 2, 3, 1)),
}
_WIDE = Shape(8, 2, 4, 3, 1)  # the same for 32 and 48 tokens, where there are more than 8 tiles of few bits


def shape_for(kind: str, own: float, token_tiles: int, gated: bool = False, units: int = 1000) -> Shape:
    """How blocks work where a multiprocessor has ``own`` tiles of ``units`` units. ``gated`` wants two of a warp."""
    form = format_of(kind)
    bits = form.low + form.high
    if own <= 2:
        row = _TWO if gated else _ONE if own <= 1 else _TWO_SHORT if units <= _SHORT else _TWO
    elif own <= 4:
        row = _THREE if own <= 3 and bits <= 4 and not gated else _FOUR
    elif own > 8 and bits <= 5 and token_tiles in (4, 6):
        return _WIDE
    else:
        row = (_MANY_GATED if gated else _MANY)[4 if bits <= 5 else 6 if bits < 8 else 8]
    return row[token_tiles]


def choose(
    kind: str, own: float, count: int, shared_limit: int, gated: bool = False, units: int = 1000
) -> tuple[int, int, Shape]:
    """For ``count`` rows of activations: parts, columns of 8 tokens of each, and how blocks work on them.

    ``own`` is how many tiles a multiprocessor has, ``units`` how many units of 256 columns a tile. What does not fit
    into a block's shared memory becomes shorter stages, then fewer blocks, then fewer tokens to a block.
    """
    for most in (8, 4, 2, 1):
        parts = -(-count // (8 * most))
        token_tiles = next(n for n in TOKEN_TILES if 8 * n * parts >= count)
        shape = shape_for(kind, own, token_tiles, gated, units)
        for groups, ring, blocks in ((shape.groups, shape.ring, 2), (1, 4, 2), (1, 2, 2), (1, 2, 1)):
            shape = replace(shape, groups=groups, ring=ring, blocks=min(shape.blocks, blocks))
            shared = shared_bytes(kind, shape, token_tiles)
            if shape.blocks * (shared + part_bytes(token_tiles) + 1024) <= shared_limit + 1024:
                return parts, token_tiles, shape
    raise DeviceError(f"linear_some: {shared_limit:,} bytes of shared memory are too few")


def shared_bytes(kind: str, shape: Shape, token_tiles: int) -> int:
    """Dynamic shared memory of a block: rings and, where they meet sums, the scales of each warp's tiles."""
    rings = WARPS // shape.row_warps * shape.ring * shape.groups * 512 * token_tiles
    return rings + WARPS * shape.tiles * scale_bytes(kind, token_tiles)


def scale_bytes(kind: str, token_tiles: int) -> int:
    """Shared memory for the scales of a tile's unit; 0 where they meet weights, in registers.

    Scales meet sums (``kernels/summed.cuh``) where that takes fewer instructions: for few tokens, and where codes have
    few bits and 32 weights one scale, for some more.
    """
    form = format_of(kind)
    most = 3 if form.group == 32 and form.low + form.high < 8 else 2
    return _SCALE_BYTES[form.group] if token_tiles <= most else 0


def part_bytes(token_tiles: int) -> int:
    """Static shared memory of a block: of the sums that meet, and of each warp's two numbers of tiles."""
    return 4 * WARPS * (16 * (8 * min(token_tiles, 4) + 1) + 2)
