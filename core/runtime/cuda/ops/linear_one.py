"""A projection of one row, with the norm before it and the activation after it: launches kernels/linear_one.cu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from ....arch import Activation, LayerNorm
from ..context import Context
from ..device import CudaDevice
from ..formats import FORMATS, TILE_ROWS, DenseMatrix, Matrix, QuantMatrix, format_of, tiles, units
from ..memory import Array
from ..variants import Variant
from .checks import FLOATS, HALVES, activation_macros, expect, expect_array
from .rope import HeadNorm

_NULL = np.uint64(0)
#: Units of a multiprocessor that make a quantised matrix a large one.
MANY_UNITS = 100
#: Dense weights take the same instructions for fewer bytes, so it is more warps that keep the loads coming; so do those
#: of many units for each multiprocessor, while small matrices are better off with fewer sums to add up.
_DENSE_WARPS, _TILE_WARPS, _MORE_WARPS = 16, 8, 12
#: Bytes of a warp under way, or more by less than a unit. Enough to keep memory busy: more only wait for it in queues,
#: and behind them all else that a step reads and writes.
_DENSE_AHEAD, _AHEAD = 16 << 10, 4608
_MOST_RING = 8
_LEAST_RING = 2
_MOST_ITEMS = 8  # values of a norm that a thread holds, in fours
_MOST_TILES = 128  # of a block: their sums are kept until the end, and two bytes of static shared memory
_FEW_TILES = 8  # of a block: with fewer, smaller tiles share the work out more evenly


@dataclass(frozen=True, slots=True)
class Shape:
    """Blocks, their warps, units of a warp under way, rows of a tile, and bytes of shared memory."""

    grid: int
    warps: int
    ring: int
    rows: int
    shared: int


@cache
def _macros(
    kind: str,
    act: str,
    out: str,
    ring: int,
    norm: int,
    items: int,
    activation: Activation | None,
    gated: bool,
    rows: int,
    warps: int,
) -> Mapping[str, object]:
    return {
        **({"PH_DENSE": True, "PH_TILE_ROWS": rows} if kind in HALVES else format_of(kind).macros()),
        "PH_WARPS": warps,
        "PH_RING": ring,
        "PH_NORM": norm,
        "PH_ITEMS": items if norm else None,
        **activation_macros(activation, gated),
        "PH_ACT_BF16": act == "bf16",
        "PH_OUT_F32": out == "f32",
    }


def _variant(
    kind: str,
    act: str,
    out: str,
    norm: int = 0,
    activation: Activation | None = None,
    gated: bool = False,
    warps: int = _TILE_WARPS,
) -> Variant:
    ring, rows = (4, 4) if kind in HALVES else (2, TILE_ROWS)
    warps = _DENSE_WARPS if kind in HALVES else warps
    macros = _macros(kind, act, out, ring, norm, 4, activation, gated, rows, warps)
    return Variant("linear_one.cu", ("ph_linear_one",), macros, hot=True)


VARIANTS = (
    *(_variant(kind, "f16", "f32") for kind in (*FORMATS, "f16")),
    *(_variant(kind, "f16", "f32", warps=_MORE_WARPS) for kind in FORMATS),
    *(_variant(kind, "f16", "f16", 1, "silu", True) for kind in ("Q4_K", "Q6_K", "Q8_0", "f16")),
    *(_variant(kind, "f16", "f16", 1, "silu", True, _MORE_WARPS) for kind in ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")),
    *(_variant(kind, "bf16", "bf16", 1) for kind in ("Q3_K", "Q4_K", "Q8_0", "IQ4_XS", "bf16")),
    *(_variant(kind, "bf16", "bf16", 1, warps=_MORE_WARPS) for kind in ("Q4_K", "Q8_0", "IQ4_XS")),
    *(_variant(kind, "f16", "f16", 2, "gelu_tanh") for kind in ("Q4_K", "f16")),
)


def fits(device: CudaDevice, w: Matrix, *, normed: bool = False, gated: bool = False) -> bool:
    """Whether ``linear_one`` can do it: aligned columns, room in shared memory, halves that end at a tile's end."""
    if isinstance(w, DenseMatrix) and (w.cols % 8 or w.data.ptr % 16):
        return False
    if gated and w.rows % (2 * TILE_ROWS):
        return False
    shape = shape_for(w, device.sms, device.shared_limit, normed=normed, gated=gated)
    return shape.ring >= _LEAST_RING and not (normed and w.cols > 4 * _MOST_ITEMS * 32 * shape.warps)


def linear_one(
    ctx: Context,
    x: Array,
    w: Matrix,
    out: Array,
    column: int = 0,
    *,
    bias: Array | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
    norm: HeadNorm | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    act: str = "f16",
) -> None:
    """out[0, column:column + N] = scale · (norm(x) wᵀ + bias), added to what is there if ``accumulate``.

    ``x`` [1, K] is f16 or bf16, or float32 if there is a ``norm`` (with its weight and bias, f32 [K]), which rounds to
    ``act``. With an ``activation``: that of norm(x) wᵀ + bias or, where ``gated``, of the first half of its columns,
    times the second half: N / 2 values. ``w`` [N, K]; ``out`` f16, bf16 or f32. Bit-equal from run to run on a GPU.
    Raises DeviceError naming shapes that do not go together, or that ``fits`` says no to.
    """
    op = "linear_one"
    expect_array(op, "x", x, ("f32",) if norm else HALVES, (1, w.cols))
    expect_array(op, "out", out, FLOATS, (1, None))
    own = w.rows // 2 if gated else w.rows
    expect(op, 0 <= column <= out.shape[1] - own, lambda: f"{own} columns from {column} on are not in {out}")
    expect(op, x.ptr % 16 == 0, lambda: f"x {x} is not aligned to 16 bytes")
    expect(op, activation is None or not (accumulate or scale != 1.0), "an activation is neither scaled nor added")
    expect(op, activation is not None or not gated, "a gate needs an activation")
    act = act if norm else x.dtype
    expect(op, isinstance(w, QuantMatrix) or w.data.dtype == act, lambda: f"the weights are {w}, but x {x} ({act})")
    expect(op, out.dtype in ("f32", act), lambda: f"out is {out}, but x {x}")
    expect(op, fits(ctx.device, w, normed=norm is not None, gated=gated), lambda: f"{w} does not fit the kernel")
    for name, vector, size in (("bias", bias, w.rows), *_vectors(norm, w.cols)):
        if vector is not None:
            expect_array(op, name, vector, ("f32",), (size,))
    shape = shape_for(w, ctx.device.sms, ctx.device.shared_limit, normed=norm is not None, gated=gated)
    kind, tile_bytes = (w.data.dtype, 0) if isinstance(w, DenseMatrix) else (w.kind, w.data.shape[1])
    normed = 0 if norm is None else 2 if isinstance(norm[0], LayerNorm) else 1
    threads = 32 * shape.warps
    items = -(-w.cols // (4 * threads))
    ctx.launch(
        "linear_one.cu",
        "ph_linear_one",
        shape.grid,
        threads,
        w.data,
        x,
        Array(out.ptr + column * out.itemsize, (1, own), out.dtype),
        _NULL if bias is None else bias,
        _NULL if norm is None else norm[1],
        _NULL if norm is None or norm[2] is None else norm[2],
        w.rows,
        w.cols,
        np.int64(tile_bytes),
        0.0 if norm is None else norm[0].eps,
        scale,
        accumulate,
        shared=shape.shared,
        macros=_macros(kind, act, out.dtype, shape.ring, normed, items, activation, gated, shape.rows, shape.warps),
        early=True,
    )


def _vectors(norm: HeadNorm | None, cols: int) -> tuple[tuple[str, Array | None, int], ...]:
    return () if norm is None else (("the norm's weight", norm[1], cols), ("the norm's bias", norm[2], cols))


def shape_for(w: Matrix, sms: int, shared_limit: int, *, normed: bool = False, gated: bool = False) -> Shape:
    """On a GPU of so many multiprocessors, with so much shared memory for a block. A ring below 2 does not work."""
    warps = _DENSE_WARPS if isinstance(w, DenseMatrix) else _TILE_WARPS
    if not isinstance(w, DenseMatrix) and tiles(w.rows) * units(w.cols) >= MANY_UNITS * sms:
        shape = _with_warps(_MORE_WARPS, w, sms, shared_limit, normed, gated)
        if shape.ring >= _LEAST_RING:  # else there is too little shared memory for so many
            return shape
    return _with_warps(warps, w, sms, shared_limit, normed, gated)


def _with_warps(warps: int, w: Matrix, sms: int, shared_limit: int, normed: bool, gated: bool) -> Shape:
    partners = 2 if gated else 1
    dense = isinstance(w, DenseMatrix)
    rows = TILE_ROWS if not dense else 4 if w.rows >= 4 * _FEW_TILES * sms else 2
    slot = w.format.unit_bytes if isinstance(w, QuantMatrix) else 512 * rows
    ahead = _DENSE_AHEAD if dense else _AHEAD
    items = -(-w.rows // (rows * partners))
    grid = max(min(items, sms), -(-items * partners // _MOST_TILES))
    staged = 512 * units(w.cols) if normed or dense else 0
    fixed = 128 + 4 * rows * (warps + -(-items // grid) * partners + 1) + staged
    # More than half of what a multiprocessor has, so that it never holds two blocks of such kernels: where the next
    # kernel begins early, its blocks would otherwise crowd where this one's have ended, two on some and none on others.
    alone = shared_limit // 2 + 16
    for room in (alone, shared_limit - 2 * _MOST_TILES):
        ring = min(_MOST_RING, max(_LEAST_RING, -(-ahead // slot)), (room - fixed) // (warps * slot))
        if ring >= _LEAST_RING:
            break
    return Shape(grid, warps, ring, rows, max(alone, fixed + max(0, ring) * warps * slot))
