"""GGUF blocks to tiles on the device: launches kernels/repack.cu."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from ..context import Context
from ..formats import QuantMatrix, format_of, raw_bytes, tiles, units
from ..memory import Array
from ..variants import Variant
from .checks import expect, expect_array

_WARPS = 4  # each makes one unit


@cache
def _macros(kind: str) -> Mapping[str, object]:
    form = format_of(kind)
    return {**form.macros(), **form.raw_macros()}


# One format for each way of storing codes or scales.
_EVERY_WAY = ("Q8_0", "Q4_1", "Q5_0", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4")

VARIANTS = tuple(Variant("repack.cu", ("ph_repack",), _macros(kind)) for kind in _EVERY_WAY)


def repack(ctx: Context, kind: str, raw: Array, out: QuantMatrix) -> None:
    """out = the rows of blocks in ``raw``: u8, of GGML type ``kind``, as the file has them, row after row.

    Every byte of ``out`` is written, padding as zeros. To load a matrix in parts give slices of it
    (``QuantMatrix.slice_rows``). Raises DeviceError where type, shape or number of bytes disagree.
    """
    expect("repack", kind == out.kind, lambda: f"{kind} blocks do not make {out}")
    wanted = raw_bytes(kind, out.rows, out.cols)
    expect_array("repack", "raw", raw, ("u8",), raw.shape)
    expect("repack", raw.nbytes == wanted, lambda: f"{out} is {wanted:,} bytes of blocks, not {raw.nbytes:,}")
    grid = (tiles(out.rows), -(-units(out.cols) // _WARPS), 1)
    stride = np.int64(out.data.shape[1])
    ctx.launch(
        "repack.cu", "ph_repack", grid, 32 * _WARPS, raw, out.data, out.rows, out.cols, stride, macros=_macros(kind)
    )
