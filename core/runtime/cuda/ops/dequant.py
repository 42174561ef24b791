"""Tiles to a row-major matrix, for library products and tests: launches kernels/dequant.cu."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from ..context import Context
from ..formats import TILE_ROWS, Matrix, QuantMatrix, format_of, units
from ..memory import Array
from ..variants import Variant
from .checks import FLOATS, expect, expect_array

_WARPS = 4  # each writes one unit


@cache
def _macros(kind: str, dtype: str) -> Mapping[str, object]:
    return {**format_of(kind).macros(), "PH_ACT_BF16": dtype == "bf16", "PH_OUT_F32": dtype == "f32"}


VARIANTS = tuple(
    Variant("dequant.cu", ("ph_dequantise",), _macros(kind, dtype), hot=True)
    for kind, dtype in (("Q4_K", "f16"), ("Q3_K", "f16"), ("Q6_K", "f32"), ("Q8_0", "bf16"), ("IQ4_XS", "f16"))
)


def dequantise(ctx: Context, matrix: Matrix, out: Array, row_start: int = 0) -> None:
    """out [rows, cols] = rows ``row_start:row_start + rows`` of a quantised matrix.

    In f32 the values are exactly those of the blocks; in f16 or bf16 they are rounded to nearest. Raises DeviceError
    for a dense matrix (its data can be used as it is) and for rows that are not there.
    """
    if not isinstance(matrix, QuantMatrix):
        expect("dequantise", False, lambda: f"{matrix} is not quantised")
        return
    expect_array("dequantise", "out", out, FLOATS, (None, matrix.cols))
    rows = out.shape[0]
    expect(
        "dequantise",
        0 <= row_start <= matrix.rows - rows,
        lambda: f"rows {row_start}:{row_start + rows} are not in {matrix}",
    )
    expect("dequantise", out.ptr % 16 == 0, lambda: f"out {out} is not aligned to 16 bytes")
    if rows == 0:
        return
    count = (row_start + rows - 1) // TILE_ROWS - row_start // TILE_ROWS + 1
    grid = (count, -(-units(matrix.cols) // _WARPS), 1)
    stride = np.int64(matrix.data.shape[1])
    args = (matrix.data, out, row_start, rows, matrix.cols, stride)
    ctx.launch("dequant.cu", "ph_dequantise", grid, 32 * _WARPS, *args, macros=_macros(matrix.kind, out.dtype))
