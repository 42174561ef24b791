"""Projections of many rows from packed weights, through Hopper's wgmma: launches kernels/linear_wide.cu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..context import Context
from ..device import CudaDevice
from ..formats import FORMATS, QuantMatrix, format_of, tiles, units
from ..memory import Array
from ..variants import Variant
from .checks import FLOATS, expect, expect_array

_GATHER_THREADS = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """How blocks work: tokens of each, warpgroups, how many of these stand side by side in rows, groups of 32 columns
    of a stage, stages of the ring, and blocks of a multiprocessor."""

    tokens: int
    groups: int
    row_groups: int
    stage: int
    ring: int
    blocks: int


@cache
def _macros(kind: str, shape: Shape, out: str) -> Mapping[str, object]:
    return {
        **format_of(kind).macros(),
        "PH_TOKENS": shape.tokens,
        "PH_GROUPS": shape.groups,
        "PH_ROW_GROUPS": shape.row_groups,
        "PH_STAGE_GROUPS": shape.stage,
        "PH_RING": shape.ring,
        "PH_CTAS": shape.blocks,
        "PH_OUT_F32": out == "f32",
    }


@cache
def _gather_macros(group: int, tokens: int) -> Mapping[str, object]:
    return {"PH_GROUP": group, "PH_TOKENS": tokens}


def _variant(kind: str, shape: Shape, out: str = "f32") -> Variant:
    return Variant("linear_wide.cu", ("ph_linear_wide",), _macros(kind, shape, out), hot=True)


VARIANTS = (
    *(_variant(kind, Shape(128, 2, 1, 2, 4, 1)) for kind in FORMATS),
    *(_variant(kind, Shape(64, 2, 1, 2, 4, 1), "f16") for kind in ("Q4_K", "Q6_K")),
    *(Variant("gather_wide.cu", ("ph_gather_wide",), _gather_macros(group, 128)) for group in (16, 32)),
)


def fits_wide(device: CudaDevice, x: Array) -> bool:
    """Whether there are the instructions for it, and float16 activations."""
    return device.cc == (9, 0) and x.dtype == "f16" and x.ptr % 16 == 0


def shape_for(sms: int, w: QuantMatrix, count: int) -> Shape:
    """How blocks work on a matrix for ``count`` rows of activations."""
    return Shape(128 if count > 64 and tiles(w.rows) // 4 * -(-count // 128) >= sms else 64, 2, 1, 2, 4, 1)


def room_bytes(count: int, cols: int) -> int:
    """Scratch for ``count`` rows of activations of ``cols`` columns, rearranged."""
    return 512 * units(cols) * -(-count // 128) * 128


def linear_wide(
    ctx: Context,
    x: Array,
    w: QuantMatrix,
    out: Array,
    out_column: int,
    room: Array,
    *,
    bias: Array | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
    shape: Shape | None = None,
) -> None:
    """out[:, out_column:out_column + N] = scale · (x wᵀ + bias), added to what is there if ``accumulate``.

    ``x`` f16 [M, K], ``w`` [N, K], ``out`` [M, ≥ out_column + N] f16 or f32, ``bias`` f32 [N]; scratch: ``room``,
    room_bytes(M, K). Weights are rounded to float16 once, as if they had been unpacked. Bit-equal from run to run.
    Raises DeviceError naming shapes that do not go together.
    """
    op = "linear_wide"
    expect_array(op, "x", x, ("f16",), (None, w.cols))
    expect_array(op, "out", out, FLOATS, (x.shape[0], None))
    count, width = x.shape[0], out.shape[1]
    expect(op, 0 <= out_column <= width - w.rows, f"{w.rows} columns from {out_column} on are not in {out}")
    expect(op, out.dtype in ("f32", "f16"), f"out is {out}, but x {x}")
    expect(op, x.ptr % 16 == 0, f"x {x} is not aligned to 16 bytes")
    expect(op, room.nbytes >= room_bytes(count, w.cols), f"{room} is too little room for {x}")
    if bias is not None:
        expect_array(op, "bias", bias, ("f32",), (w.rows,))
    if not count:
        return
    shape = shape or shape_for(ctx.device.sms, w, count)
    parts = -(-count // shape.tokens)
    padded = parts * shape.tokens
    ctx.launch(
        "gather_wide.cu",
        "ph_gather_wide",
        (-(-padded // _GATHER_THREADS), 8 * units(w.cols), 1),
        _GATHER_THREADS,
        x,
        room,
        count,
        padded,
        w.cols,
        macros=_gather_macros(w.format.group, shape.tokens),
        early=True,
    )
    rows = -(-tiles(w.rows) // (4 * shape.row_groups))
    grid = max(1, min(rows, ctx.device.sms * shape.blocks // parts))
    ctx.launch(
        "linear_wide.cu",
        "ph_linear_wide",
        (grid, parts, 1),
        128 * shape.groups,
        w.data,
        room,
        Array(out.ptr + out_column * out.itemsize, (count, width), out.dtype),
        np.uint64(0) if bias is None else bias,
        count,
        w.rows,
        w.cols,
        np.int64(w.data.shape[1]),
        np.int64(width),
        scale,
        accumulate,
        shared=shape.groups // shape.row_groups * shape.ring * shape.stage * 64 * shape.tokens,
        macros=_macros(w.kind, shape, out.dtype),
        early=True,
    )
