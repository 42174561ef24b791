"""linear: a projection by whichever way is fastest for its rows: packed weights for few, cuBLAS for many."""

from __future__ import annotations

from ..blas import Blas
from ..context import Context
from ..formats import DenseMatrix, Matrix
from ..memory import Array
from .bias import add_bias
from .dequant import dequantise
from .gemv import MOST_ROWS, linear_few


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
    if x.shape[0] <= MOST_ROWS or invariant:
        linear_few(ctx, x, w, out, column, bias=bias, accumulate=accumulate, scale=scale, invariant=invariant)
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
