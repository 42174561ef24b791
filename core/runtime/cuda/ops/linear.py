"""linear: a projection by whichever way is fastest for its rows: packed weights for few, cuBLAS for many.

For quantised weights the way changes with the rows: kernels that read them packed, up to SOME_ROWS everywhere and
WIDE_ROWS where the GPU has wgmma, then unpacking for cuBLAS, which costs the same whatever the rows. Weights of the
activations' type are cuBLAS's from two rows on.
"""

from __future__ import annotations

from typing import Any

from ....arch import Activation
from ..blas import Blas
from ..context import Context
from ..formats import DenseMatrix, Matrix, QuantMatrix, tiles
from ..memory import Array
from .bias import add_bias
from .dequant import dequantise
from .gemv import MOST_ROWS, linear_few
from .linear_some import linear_some
from .linear_wide import fits_wide, linear_wide, room_bytes

#: Rows up to which packed weights are multiplied by ``linear_some``, and by ``linear_wide`` where the GPU can.
SOME_ROWS, WIDE_ROWS = 64, 512
#: Above these rows, matrices with enough tiles for every multiprocessor are better off with the latter.
_FEWER_ROWS, _TILES = 32, 2.2


def linear(
    ctx: Context,
    blas: Blas,
    x: Array,
    w: Matrix,
    out: Array,
    column: int,
    scratch: Array,
    *,
    bias: Array | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
    invariant: bool = False,
) -> None:
    """out[:, column:column + N] = scale · (x wᵀ + bias), added to what is there if ``accumulate``.

    ``x`` [M, K] in the activations' dtype; ``out`` [M, ≥ column + N] in that or, to accumulate, float32; ``scratch``
    holds unpacked weights where M is large. ``invariant``: a row's result is bit-equal whatever rows stand beside it,
    which is slow for many. Raises DeviceError naming the shapes.
    """
    count = x.shape[0]
    packed = isinstance(w, QuantMatrix)
    few = packed and x.dtype != "f16" and count <= MOST_ROWS
    narrow = not packed and accumulate and out.dtype != "f32"  # which cuBLAS does not add to
    if count == 1 or invariant or few or narrow:
        linear_few(ctx, x, w, out, column, bias=bias, accumulate=accumulate, scale=scale, invariant=invariant)
        return
    if isinstance(w, QuantMatrix) and _packed(ctx, x, w, out, column, scratch, bias, accumulate, scale, None, False):
        return
    if isinstance(w, DenseMatrix):
        blas.matmul(x, w.data, out, accumulate=accumulate, column=column, scale=scale)
    else:
        step = min(w.rows, scratch.nbytes // (2 * w.cols) // 16 * 16)
        for start in range(0, w.rows, step):
            stop = min(start + step, w.rows)
            part = scratch.view(x.dtype, stop - start, w.cols)
            dequantise(ctx, w, part, start)
            blas.matmul(x, part, out, accumulate=accumulate, column=column + start, scale=scale)
    if bias is not None:
        add_bias(ctx, bias, out, column, scale)


def linear_activated(
    ctx: Context,
    x: Array,
    w: Matrix,
    out: Array,
    scratch: Array,
    bias: Array | None,
    activation: Activation,
    gated: bool,
) -> bool:
    """out = activation(x wᵀ + bias) or, where ``gated``, that of its first half of columns times the second half.

    By the kernels that read packed weights, in one launch; arrays as for ``linear``. False, with nothing done, where
    they are not the way for so many rows or such a matrix. Raises DeviceError naming the shapes.
    """
    if not isinstance(w, QuantMatrix) or x.shape[0] == 1:
        return False
    return _packed(ctx, x, w, out, 0, scratch, bias, False, 1.0, activation, gated)


def _packed(
    ctx: Context,
    x: Array,
    w: QuantMatrix,
    out: Array,
    column: int,
    scratch: Array,
    bias: Array | None,
    accumulate: bool,
    scale: float,
    activation: Activation | None,
    gated: bool,
) -> bool:
    """Whether one of the kernels for packed weights did it."""
    count = x.shape[0]
    if x.dtype != "f16" or x.ptr % 16:
        return False
    wide = fits_wide(ctx.device, x)
    few = _FEWER_ROWS if wide and tiles(w.rows) > _TILES * ctx.device.sms else SOME_ROWS
    how: dict[str, Any] = {
        "bias": bias,
        "accumulate": accumulate,
        "scale": scale,
        "activation": activation,
        "gated": gated,
    }
    if count <= few:
        return linear_some(ctx, x, w, out, column, **how)
    if wide and count <= WIDE_ROWS:
        return linear_wide(ctx, x, w, out, column, scratch.view("u8", room_bytes(count, w.cols)), **how)
    return False
