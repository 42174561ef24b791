"""Projections of many rows from packed weights, through Hopper's wgmma: launches kernels/linear_wide.cu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from ....arch import Activation
from ..context import Context
from ..device import CudaDevice
from ..formats import FORMATS, TILE_ROWS, QuantMatrix, format_of, tiles, units
from ..memory import Array
from ..variants import Variant
from .checks import activation_macros, expect, expect_product

_GATHER_THREADS = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """How blocks work: tokens of each, warpgroups that compute, how many of these stand side by side in rows, groups of
    32 columns of a stage, stages of the ring."""

    tokens: int
    groups: int
    row_groups: int
    stage: int
    ring: int


@cache
def _macros(
    kind: str, shape: Shape, out: str, activation: Activation | None = None, gated: bool = False
) -> Mapping[str, object]:
    return {
        **format_of(kind).macros(),
        "PH_TOKENS": shape.tokens,
        "PH_GROUPS": shape.groups,
        "PH_ROW_GROUPS": shape.row_groups,
        "PH_STAGE_GROUPS": shape.stage,
        "PH_RING": shape.ring,
        "PH_OUT_F32": out == "f32",
        **activation_macros(activation, gated),
    }


@cache
def _gather_macros(group: int, tokens: int) -> Mapping[str, object]:
    return {"PH_GROUP": group, "PH_TOKENS": tokens}


def _variant(
    kind: str, shape: Shape, out: str = "f32", activation: Activation | None = None, gated: bool = False
) -> Variant:
    return Variant("linear_wide.cu", ("ph_linear_wide",), _macros(kind, shape, out, activation, gated), hot=True)


def fits_wide(device: CudaDevice, x: Array) -> bool:
    """Whether there are the instructions for it, and float16 activations."""
    return device.cc == (9, 0) and x.dtype == "f16" and x.ptr % 16 == 0


def shape_for(own: float, count: int) -> Shape:
    """How blocks work on ``count`` rows of activations, as measured on an H100.

    ``own`` is how many tiles a multiprocessor has: where they are few, warpgroups share K out, and fewer tokens to a
    block make more blocks.
    """
    few = own <= 2.2
    if count <= 64:
        return Shape(64, 3, 1, 2, 4)
    if count <= 128:
        tokens = 96 if count <= 96 else 64 if few else 128
        groups = (2, 1) if 5 < own <= 30 else (3, 3) if own > 30 else (3, 1)
        return Shape(tokens, *groups, 2, 4)
    tokens = 192 if count <= 192 else 256
    if count <= 256 and few:
        return Shape(tokens // 2, 3, 1, 2, 4)
    return Shape(tokens, 2, 1, 1, 6) if few or (count <= 256 and own <= 5) else Shape(tokens, 2, 2, 2, 4)


#: All of them.
SHAPES = tuple(dict.fromkeys(shape_for(own, count) for own in (1, 4, 20, 60) for count in (64, 96, 128, 192, 256, 512)))
VARIANTS = (
    *(_variant(kind, shape, "f16") for kind in ("Q4_K", "Q6_K", "Q8_0") for shape in SHAPES),
    *(_variant(kind, shape_for(20, 128)) for kind in FORMATS),
    *(_variant("Q4_K", shape_for(20, count), "f16", "silu", True) for count in (64, 96, 128, 192, 256)),
    _variant("Q4_K", shape_for(20, 128), "f16", "gelu_tanh"),
    *(Variant("gather_wide.cu", ("ph_gather_wide",), _gather_macros(group, 128)) for group in (16, 32)),
)


def room_bytes(count: int, cols: int) -> int:
    """Scratch for ``count`` rows of activations of ``cols`` columns, rearranged."""
    return 512 * units(cols) * max(-(-count // shape.tokens) * shape.tokens for shape in SHAPES)


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
    activation: Activation | None = None,
    gated: bool = False,
    shape: Shape | None = None,
) -> bool:
    """out[:, out_column:out_column + N] = scale · (x wᵀ + bias), added to what is there if ``accumulate``.

    ``x`` f16 [M, K], ``w`` [N, K], ``out`` [M, ≥ out_column + N] f16 or f32, ``bias`` f32 [N]; scratch: ``room``,
    room_bytes(M, K). ``activation`` and ``gated`` are linear_some's, as is what it returns. Weights are rounded to
    float16 once, as if they had been unpacked. Bit-equal from run to run. Raises DeviceError naming shapes that do not
    go together.
    """
    op = "linear_wide"
    own_rows = expect_product(op, x, w, out, out_column, bias, accumulate, scale, activation, gated)
    count = x.shape[0]
    expect(op, room.nbytes >= room_bytes(count, w.cols), lambda: f"{room} is too little room for {x}")
    if gated and own_rows % TILE_ROWS:
        return False
    if not count:
        return True
    shape = shape or shape_for(tiles(w.rows) / ctx.device.sms, count)
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
    runs = -(-tiles(w.rows) // (4 * shape.row_groups))
    grid = max(1, min(runs, tiles(own_rows), ctx.device.sms // parts))
    ctx.launch(
        "linear_wide.cu",
        "ph_linear_wide",
        (grid, parts, 1),
        128 * (shape.groups + 1),
        w.data,
        room,
        Array(out.ptr + out_column * out.itemsize, out.shape, out.dtype),
        np.uint64(0) if bias is None else bias,
        count,
        w.rows,
        w.cols,
        np.int64(w.data.shape[1]),
        np.int64(out.shape[1]),
        scale,
        accumulate,
        shared=shape.groups // shape.row_groups * shape.ring * shape.stage * 64 * shape.tokens,
        macros=_macros(w.kind, shape, out.dtype, activation, gated),
        early=True,
    )
    return True
