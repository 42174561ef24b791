"""The arithmetic of the CPU runtime, float32 in and out: norms, activations, projections, rotation. No state."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...arch import Activation, Norm, RMSNorm

F32 = NDArray[np.float32]


def normalise(x: F32, norm: Norm, weight: F32, bias: F32 | None, out: F32) -> None:
    """RMSNorm or LayerNorm over the last axis of ``x``; ``out`` may be ``x``. Statistics are summed in float32."""
    size = x.shape[-1]
    if isinstance(norm, RMSNorm):
        mean_square = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(size)
        np.multiply(x, 1.0 / np.sqrt(mean_square + np.float32(norm.eps)), out=out)
    else:
        np.subtract(x, x.mean(axis=-1, keepdims=True), out=out)
        variance = np.einsum("...i,...i->...", out, out)[..., None] / np.float32(size)
        out *= 1.0 / np.sqrt(variance + np.float32(norm.eps))
    out *= weight
    if bias is not None:
        out += bias


def project(x: F32, weight: F32, out: F32, by_row: bool = False) -> None:
    """out = x · weightᵀ for x [rows, in] and weight [out, in].

    ``by_row``: each row's result is bit-equal whatever rows stand beside it, at the price of reading the matrix once
    per row.
    """
    if by_row or len(x) in (2, 3):
        # OpenBLAS packs the whole matrix for so few rows, which costs more than reading it once a row.
        for row, result in zip(x, out, strict=True):
            np.dot(weight, row, out=result)
    else:
        np.matmul(x, weight.T, out=out)


def rotate(x: F32, cos: F32, sin: F32, interleaved: bool) -> None:
    """Turns the first 2·pairs components of ``x`` [rows, heads, head_dim] in place; cos and sin are [rows, pairs]."""
    pairs = cos.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    else:
        first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = first * cos - second * sin
    second *= cos
    second += first * sin
    first[...] = turned


def activate(kind: Activation, x: F32, out: F32) -> None:
    """out = act(x) elementwise; ``out`` may be ``x``."""
    _ACTIVATIONS[kind](x, out)


def _sigmoid_times(x: F32, factor: float, out: F32) -> None:
    # exp overflows to inf below about -88/factor, and x / inf is the right limit, 0.
    with np.errstate(over="ignore"):
        np.divide(x, 1.0 + np.exp(x * np.float32(-factor)), out=out)


def _gelu_tanh(x: F32, out: F32) -> None:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), Hendrycks and Gimpel 2016."""
    with np.errstate(over="ignore"):  # tanh of infinity is the right limit
        inner = x * x
        inner *= np.float32(0.044715)
        inner += 1.0
        inner *= x
    inner *= np.float32(math.sqrt(2.0 / math.pi))
    np.tanh(inner, out=inner)
    inner += 1.0
    inner *= np.float32(0.5)
    np.multiply(x, inner, out=out)


def _gelu(x: F32, out: F32) -> None:
    """x Φ(x) = 0.5 x (1 + erf(x / √2))."""
    np.multiply(x, 0.5 * (1.0 + erf(x * np.float32(1.0 / math.sqrt(2.0)))), out=out)


def _relu(x: F32, out: F32) -> None:
    np.maximum(x, 0.0, out=out)


def _relu_squared(x: F32, out: F32) -> None:
    np.maximum(x, 0.0, out=out)
    np.multiply(out, out, out=out)


_ACTIVATIONS: dict[str, Callable[[F32, F32], None]] = {
    "silu": lambda x, out: _sigmoid_times(x, 1.0, out),
    "gelu_quick": lambda x, out: _sigmoid_times(x, 1.702, out),
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": _relu,
    "relu_squared": _relu_squared,
}


def erf(x: F32) -> F32:
    """The error function, exact to float32 rounding, which NumPy lacks.

    Cubic Hermite interpolation between exact values a step of 1/256 apart, with the exact slope 2/√π exp(−x²): the
    error is below 1e-10. Beyond 4 erf is 1 to float32 precision.
    """
    size = np.minimum(np.abs(x).astype(np.float64), _ERF_END)
    index = np.minimum((size * _ERF_STEPS).astype(np.intp), len(_ERF) - 2)
    t = size * _ERF_STEPS - index
    left, right = _ERF[index], _ERF[index + 1]
    slope_left, slope_right = _ERF_SLOPE[index], _ERF_SLOPE[index + 1]
    rise = right - left
    value = left + t * (
        slope_left + t * (3.0 * rise - 2.0 * slope_left - slope_right + t * (slope_left + slope_right - 2.0 * rise))
    )
    return np.asarray(np.copysign(value, x), dtype=np.float32)


_ERF_STEPS, _ERF_END = 256, 4.0
_ERF_AT = np.arange(int(_ERF_STEPS * _ERF_END) + 1) / _ERF_STEPS
_ERF = np.array([math.erf(at) for at in _ERF_AT])
_ERF_SLOPE = 2.0 / math.sqrt(math.pi) * np.exp(-_ERF_AT * _ERF_AT) / _ERF_STEPS  # per step, not per unit
