"""Projections of some rows, 2 to 64, from packed weights in float16: launches kernels/linear_some.cu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ....arch import Activation
from ....errors import DeviceError
from ..context import Context
from ..formats import FORMATS, TILE_ROWS, QuantMatrix, format_of, tiles
from ..memory import Array
from ..variants import Variant
from .checks import activation_macros, expect_product

_WARPS = 8
_SPILLS = 96
"""Bytes that ptxas may spill, as it does on some GPUs: values of a pass, which are stored and loaded once for each."""
_TOKEN_TILES = (1, 2, 3, 4, 6, 8)
"""Columns of 8 tokens that a block can have."""
_SCALE_BYTES = {32: 1152, 16: 2176}
"""Of a tile's unit where scales meet sums, by the weights that share one: SCALE_BYTES + OFFSET_BYTES in the kernels."""

SUMMED_TILES = 2
"""Columns of 8 tokens up to which scales meet sums, not weights (``kernels/summed.cuh``); 0: never."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a block works: row warps, tiles of each, groups of 32 columns of a stage and stages of the ring; and how many
    blocks a multiprocessor has."""

    row_warps: int
    tiles: int
    groups: int
    ring: int
    blocks: int


@cache
def _macros(
    kind: str,
    token_tiles: int,
    shape: Shape,
    summed: bool,
    out: str,
    activation: Activation | None = None,
    gated: bool = False,
) -> Mapping[str, object]:
    return {
        **format_of(kind).macros(),
        "PH_TOKEN_TILES": token_tiles,
        "PH_TILES": shape.tiles,
        "PH_ROW_WARPS": shape.row_warps,
        "PH_STAGE_GROUPS": shape.groups,
        "PH_RING": shape.ring,
        "PH_CTAS": shape.blocks,
        "PH_SUMMED": summed,
        "PH_OUT_F32": out == "f32",
        **activation_macros(activation, gated),
    }


def _variant(
    kind: str,
    token_tiles: int,
    shape: Shape,
    out: str = "f32",
    activation: Activation | None = None,
    gated: bool = False,
) -> Variant:
    macros = _macros(kind, token_tiles, shape, token_tiles <= SUMMED_TILES, out, activation, gated)
    return Variant("linear_some.cu", ("ph_linear_some",), macros, hot=True, spills=_SPILLS)


def shape_for(kind: str, own: float, token_tiles: int, gated: bool = False) -> Shape:
    """How blocks work, as measured on an H100: the more tiles a multiprocessor has, the more warps share tokens.

    Few tokens leave registers for a second block on each multiprocessor, and room for longer stages. ``gated`` wants
    two tiles of a warp.
    """
    form = format_of(kind)
    if token_tiles > 4:
        return Shape(1 if own <= 2 else 2 if own <= 4 else 4, 1 if form.low + form.high > 6 else 2, 1, 4, 1)
    if own <= 2:
        return Shape(1, 2, *{1: (8, 2), 2: (4, 3)}.get(token_tiles, (2, 3)), 1)
    if own <= 4:
        return Shape(2, 2, *((8, 2) if token_tiles <= 2 else (4, 3)), 1)
    if token_tiles > 2:
        return Shape(8, 2, 4, 3, 1)
    bits = form.low + form.high  # which decide how much of two blocks registers hold
    if bits == 8:  # a byte is a weight with little work, so fewer warps may share tokens
        if token_tiles <= SUMMED_TILES:  # two blocks have too few registers for two tiles
            return Shape(2, 2, 8, 2, 1) if gated else Shape(2, 1, 8, 2, 2)
        return Shape(2, 2, 8, 2, 2 if token_tiles == 1 else 1)
    if bits < 5 or (bits == 5 and token_tiles == 1):
        return Shape(4, 2, 8, 2, 2)
    return Shape(4, 2, 8, 2, 1) if gated or bits == 5 else Shape(4, 1, 8, 2, 2)


def choose(kind: str, own: float, count: int, shared_limit: int, gated: bool = False) -> tuple[int, int, Shape] | None:
    """For ``count`` rows of activations: parts, columns of 8 tokens of each, and how blocks work on them.

    ``own`` is how many tiles a multiprocessor has. What does not fit into a block's shared memory becomes shorter
    stages, then fewer blocks, then fewer tokens to a block. None where a gate cannot be had.
    """
    for most in (8, 4, 2, 1):
        parts = -(-count // (8 * most))
        token_tiles = next(n for n in _TOKEN_TILES if 8 * n * parts >= count)
        shape = shape_for(kind, own, token_tiles, gated)
        if gated and shape.tiles % 2:
            return None
        for groups, ring, blocks in ((shape.groups, shape.ring, 2), (1, 4, 2), (1, 2, 2), (1, 2, 1)):
            shape = replace(shape, groups=groups, ring=ring, blocks=min(shape.blocks, blocks))
            shared = shared_bytes(kind, shape, token_tiles)
            if shape.blocks * (shared + part_bytes(token_tiles) + 1024) <= shared_limit + 1024:
                return parts, token_tiles, shape
    raise DeviceError(f"linear_some: {shared_limit:,} bytes of shared memory are too few")


def shared_bytes(kind: str, shape: Shape, token_tiles: int) -> int:
    """Dynamic shared memory of a block: rings and, where they meet sums, the scales of each warp's tiles."""
    rings = _WARPS // shape.row_warps * shape.ring * shape.groups * 512 * token_tiles
    scales = _SCALE_BYTES[format_of(kind).group] if token_tiles <= SUMMED_TILES else 0
    return rings + _WARPS * shape.tiles * scales


def part_bytes(token_tiles: int) -> int:
    """Static shared memory of a block: of the sums that meet."""
    return 4 * _WARPS * 16 * (8 * min(token_tiles, 4) + 1)


VARIANTS = (
    *(
        _variant(kind, token_tiles, shape_for(kind, own, token_tiles), out)
        for kind, out in (("Q4_K", "f32"), ("Q6_K", "f16"), ("Q8_0", "f16"))
        for token_tiles in _TOKEN_TILES
        for own in (1, 3, 30)
    ),
    *(_variant(kind, token_tiles, shape_for(kind, 30, token_tiles)) for kind in FORMATS for token_tiles in (1, 2)),
    *(
        _variant(kind, token_tiles, shape_for(kind, 30, token_tiles, True), "f16", "silu", True)
        for kind in ("Q4_K", "Q6_K", "Q8_0")
        for token_tiles in (1, 2, 4)
    ),
    _variant("Q4_K", 8, shape_for("Q4_K", 30, 8, True), "f16", "gelu_tanh"),
)


def linear_some(
    ctx: Context,
    x: Array,
    w: QuantMatrix,
    out: Array,
    out_column: int = 0,
    *,
    bias: Array | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
    activation: Activation | None = None,
    gated: bool = False,
    shape: Shape | None = None,
) -> bool:
    """out[:, out_column:out_column + N] = scale · (x wᵀ + bias), added to what is there if ``accumulate``.

    ``x`` f16 [M, K], ``w`` [N, K], ``out`` [M, ≥ out_column + N] f16 or f32, ``bias`` f32 [N]. With an ``activation``:
    that of x wᵀ + bias or, where ``gated``, of the first half of its columns times the second half: N / 2 values.
    Weights are rounded to float16 once, as if they had been unpacked. Any M, but W is read once for every 64 rows.
    Bit-equal from run to run. False, with nothing done, where a gate cannot be had: a half that ends inside a tile, or
    too few registers. Raises DeviceError naming shapes that do not go together.
    """
    op = "linear_some"
    own_rows = expect_product(op, x, w, out, out_column, bias, accumulate, scale, activation, gated)
    count = x.shape[0]
    if not count:
        return True
    chosen = choose(w.kind, tiles(w.rows) / ctx.device.sms, count, ctx.device.shared_limit, gated)
    if chosen is None or (gated and own_rows % TILE_ROWS):
        return False
    parts, token_tiles, best = chosen
    shape = shape or best
    grid = min(ctx.device.sms * shape.blocks, tiles(own_rows))
    ctx.launch(
        "linear_some.cu",
        "ph_linear_some",
        (grid, parts, 1),
        32 * _WARPS,
        w.data,
        x,
        Array(out.ptr + out_column * out.itemsize, out.shape, out.dtype),
        np.uint64(0) if bias is None else bias,
        count,
        w.rows,
        w.cols,
        np.int64(w.data.shape[1]),
        np.int64(out.shape[1]),
        scale,
        accumulate,
        shared=shared_bytes(w.kind, shape, token_tiles),
        macros=_macros(w.kind, token_tiles, shape, token_tiles <= SUMMED_TILES, out.dtype, activation, gated),
        early=True,
    )
    return True
