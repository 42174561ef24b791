"""Projections of some rows, 2 to a few hundred, from packed weights in float16: launches kernels/linear_some.cu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..context import Context
from ..formats import FORMATS, QuantMatrix, format_of, tiles
from ..memory import Array
from ..variants import Variant
from .checks import FLOATS, expect, expect_array

_WARPS = 8
_TOKEN_TILES = (1, 2, 3, 4, 6, 8)
"""Columns of 8 tokens that a block can have."""
_MOST_RING = 8
_PART_BYTES = 4 * _WARPS * 16 * 33  # of the sums that meet


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
def _macros(kind: str, token_tiles: int, shape: Shape, out: str) -> Mapping[str, object]:
    return {
        **format_of(kind).macros(),
        "PH_TOKEN_TILES": token_tiles,
        "PH_TILES": shape.tiles,
        "PH_ROW_WARPS": shape.row_warps,
        "PH_STAGE_GROUPS": shape.groups,
        "PH_RING": shape.ring,
        "PH_CTAS": shape.blocks,
        "PH_OUT_F32": out == "f32",
    }


def _variant(kind: str, token_tiles: int, shape: Shape, out: str = "f32") -> Variant:
    return Variant("linear_some.cu", ("ph_linear_some",), _macros(kind, token_tiles, shape, out), hot=True)


def shape_for(kind: str, own: float, token_tiles: int) -> Shape:
    """How blocks work, as measured on an H100: the more tiles a multiprocessor has, the more warps share tokens.

    Few tokens leave registers for a second block on each multiprocessor, and room for longer stages.
    """
    if token_tiles > 4:
        return Shape(1 if own <= 2 else 2 if own <= 4 else 4, 2, 1, 4, 1)
    if own <= 2:
        return Shape(1, 2, *{1: (8, 2), 2: (4, 3)}.get(token_tiles, (2, 3)), 1)
    if own <= 4:
        return Shape(2, 2, *((8, 2) if token_tiles <= 2 else (4, 3)), 1)
    if token_tiles > 2:
        return Shape(8, 2, 4, 3, 1)
    form = format_of(kind)
    return Shape(4, 1 if form.low + form.high > 5 else 2, 8, 2, 2)  # what registers hold of two blocks


VARIANTS = (
    *(
        _variant(kind, token_tiles, shape_for(kind, own, token_tiles), out)
        for kind, out in (("Q4_K", "f32"), ("Q6_K", "f16"), ("Q8_0", "f16"))
        for token_tiles in _TOKEN_TILES
        for own in (1, 3, 30)
    ),
    *(_variant(kind, 1, shape_for(kind, 30, 1)) for kind in FORMATS),
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
    shape: Shape | None = None,
) -> None:
    """out[:, out_column:out_column + N] = scale · (x wᵀ + bias), added to what is there if ``accumulate``.

    ``x`` f16 [M, K], ``w`` [N, K], ``out`` [M, ≥ out_column + N] f16 or f32, ``bias`` f32 [N]. Weights are rounded to
    float16 once, as if they had been unpacked. Any M, but W is read once for every 64 rows. Bit-equal from run to run.
    Raises DeviceError naming shapes that do not go together.
    """
    op = "linear_some"
    expect_array(op, "x", x, ("f16",), (None, w.cols))
    expect_array(op, "out", out, FLOATS, (x.shape[0], None))
    width = out.shape[1]
    expect(op, 0 <= out_column <= width - w.rows, lambda: f"{w.rows} columns from {out_column} on are not in {out}")
    expect(op, out.dtype in ("f32", x.dtype), lambda: f"out is {out}, but x {x}")
    expect(op, x.ptr % 16 == 0, lambda: f"x {x} is not aligned to 16 bytes")
    if bias is not None:
        expect_array(op, "bias", bias, ("f32",), (w.rows,))
    if not x.shape[0]:
        return
    parts = -(-x.shape[0] // (8 * _TOKEN_TILES[-1]))
    token_tiles = next(n for n in _TOKEN_TILES if 8 * n * parts >= x.shape[0])
    shape = shape or shape_for(w.kind, tiles(w.rows) / ctx.device.sms, token_tiles)
    grid = min(ctx.device.sms * shape.blocks, tiles(w.rows))
    ctx.launch(
        "linear_some.cu",
        "ph_linear_some",
        (grid, parts, 1),
        32 * _WARPS,
        w.data,
        x,
        Array(out.ptr + out_column * out.itemsize, (x.shape[0], width), out.dtype),
        np.uint64(0) if bias is None else bias,
        x.shape[0],
        w.rows,
        w.cols,
        np.int64(w.data.shape[1]),
        np.int64(width),
        scale,
        accumulate,
        shared=_WARPS // shape.row_warps * shape.ring * shape.groups * 512 * token_tiles,
        macros=_macros(w.kind, token_tiles, shape, out.dtype),
        early=True,
    )
