"""Projections of up to 32 rows, which read every weight once: launches kernels/gemv_tiles.cu and gemv_rows.cu.

One row alone is linear_one.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from ..context import Context
from ..formats import FORMATS, TILE_ROWS, DenseMatrix, Matrix, QuantMatrix, format_of, tiles, units
from ..memory import Array
from ..variants import Variant
from .checks import FLOATS, HALVES, expect, expect_array
from .linear_one import fits, linear_one

#: The most rows of one launch; more are done in parts.
MOST_ROWS = 32

_WARPS = 8
_CHUNK = 128  # columns of a warp's turn in ph_dense_few


@cache
def _tile_macros(kind: str, token_tiles: int, act: str, out: str) -> Mapping[str, object]:
    # Units that a warp holds or waits for, and blocks for which registers are left on a multiprocessor.
    stages, blocks = {1: (1, 2), 2: (2, 1)}.get(token_tiles, (1, 1))
    return {
        **format_of(kind).macros(),
        "PH_TOKEN_TILES": token_tiles,
        "PH_STAGES": stages,
        "PH_CTAS": blocks,
        "PH_ACT_BF16": act == "bf16",
        "PH_OUT_F32": out == "f32",
    }


@cache
def _row_macros(token_tiles: int, act: str, out: str, scalar: bool) -> Mapping[str, object]:
    return {
        "PH_TOKEN_TILES": token_tiles,
        "PH_SCALAR": scalar,
        "PH_ACT_BF16": act == "bf16",
        "PH_OUT_F32": out == "f32",
    }


def _tiles_variant(kind: str, token_tiles: int, act: str, out: str = "f32") -> Variant:
    return Variant("gemv_tiles.cu", ("ph_linear_few",), _tile_macros(kind, token_tiles, act, out))


def _rows_variant(token_tiles: int, act: str, out: str = "f32", scalar: bool = False) -> Variant:
    return Variant("gemv_rows.cu", ("ph_dense_few",), _row_macros(token_tiles, act, out, scalar))


VARIANTS = (
    *(_tiles_variant(kind, 1, "f16") for kind in FORMATS),
    *(_tiles_variant(kind, 1, "bf16", "bf16") for kind in ("Q3_K", "Q4_K", "Q8_0", "IQ4_XS")),
    *(_tiles_variant("Q4_K", token_tiles, "f16") for token_tiles in (2, 3, 4)),
    *(_rows_variant(token_tiles, "f16") for token_tiles in (1, 4)),
    _rows_variant(1, "bf16", "bf16"),
    _rows_variant(1, "f16", scalar=True),
)


def linear_few(
    ctx: Context,
    x: Array,
    w: Matrix,
    out: Array,
    out_column: int = 0,
    *,
    bias: Array | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
    invariant: bool = False,
) -> None:
    """out[:, out_column:out_column + N] = scale · (x wᵀ + bias), added to what is there if ``accumulate``.

    ``x`` f16 or bf16 [M, K], ``w`` [N, K], ``out`` [M, ≥ out_column + N] in x's dtype or f32, ``bias`` f32 [N]. Any M,
    but W is read once for every 32 rows. Needs no scratch memory; bit-equal from run to run. From two rows on a row's
    result is bit-equal whatever rows stand beside it; ``invariant`` has a single row computed in the same way, which
    is slower. Raises DeviceError naming shapes that do not go together.
    """
    if x.shape[0] == 1 and not invariant and x.ptr % 16 == 0 and fits(ctx.device, w):
        linear_one(ctx, x, w, out, out_column, bias=bias, accumulate=accumulate, scale=scale)
        return
    expect_array("linear_few", "x", x, HALVES, (None, w.cols))
    expect_array("linear_few", "out", out, FLOATS, (x.shape[0], None))
    width = out.shape[1]
    expect(
        "linear_few",
        0 <= out_column <= width - w.rows,
        lambda: f"{w.rows} columns from {out_column} on are not in {out}",
    )
    expect("linear_few", out.dtype in ("f32", x.dtype), lambda: f"out is {out}, but x {x}")
    if isinstance(w, DenseMatrix):
        expect("linear_few", w.data.dtype == x.dtype, lambda: f"the weights are {w}, but x {x}")
    else:
        expect("linear_few", x.ptr % 16 == 0, lambda: f"x {x} is not aligned to 16 bytes")
    if bias is not None:
        expect_array("linear_few", "bias", bias, ("f32",), (w.rows,))
    run = _tiles if isinstance(w, QuantMatrix) else _rows
    for start in range(0, x.shape[0], MOST_ROWS):
        part = x.slice_rows(start, min(start + MOST_ROWS, x.shape[0]))
        target = Array(out.ptr + (start * width + out_column) * out.itemsize, (part.shape[0], width), out.dtype)
        tail = (np.uint64(0) if bias is None else bias, scale, accumulate)
        run(ctx, part, w, target, -(-part.shape[0] // 8), tail)


def _tiles(ctx: Context, x: Array, w: Matrix, out: Array, token_tiles: int, tail: tuple[object, object, bool]) -> None:
    assert isinstance(w, QuantMatrix)
    bias, scale, accumulate = tail
    # As many warps whatever the number of tokens: the order of a sum must not depend on it.
    block = 32 * min(_WARPS, units(w.cols))
    stride, ld = np.int64(w.data.shape[1]), np.int64(out.shape[1])
    macros = _tile_macros(w.kind, token_tiles, x.dtype, out.dtype)
    args = (w.data, x, out, bias, x.shape[0], w.rows, w.cols, stride, ld, scale, accumulate)
    ctx.launch("gemv_tiles.cu", "ph_linear_few", tiles(w.rows), block, *args, macros=macros, early=True)


def _rows(ctx: Context, x: Array, w: Matrix, out: Array, token_tiles: int, tail: tuple[object, object, bool]) -> None:
    assert isinstance(w, DenseMatrix)
    bias, scale, accumulate = tail
    scalar = w.cols % 8 != 0 or w.data.ptr % 16 != 0 or x.ptr % 16 != 0
    macros = _row_macros(token_tiles, x.dtype, out.dtype, scalar)
    block = 32 * min(_WARPS, -(-w.cols // _CHUNK))
    args = (w.data, x, out, bias, x.shape[0], w.rows, w.cols, np.int64(out.shape[1]), scale, accumulate)
    ctx.launch("gemv_rows.cu", "ph_dense_few", -(-w.rows // TILE_ROWS), block, *args, macros=macros, early=True)
