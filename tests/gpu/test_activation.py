"""Activations on the GPU against the CPU runtime and float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from polyhead.arch import ACTIVATIONS, Activation
from polyhead.errors import DeviceError
from polyhead.runtime.cpu import ops as cpu
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops.activation import activate

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]


def reference(kind: str, x: Any) -> Any:
    x = np.asarray(x, np.float64)
    if kind == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if kind in ("silu", "gelu_quick"):
        with np.errstate(over="ignore"):
            return x / (1 + np.exp(-(1.702 if kind == "gelu_quick" else 1.0) * x))
    positive = np.maximum(x, 0)
    return positive * positive if kind == "relu_squared" else positive


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("size", [1, 7, 1536, 2052])
def test_activations_agree_with_float64_and_the_cpu(
    kind: Activation, gated: bool, dtype: str, size: int, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    rng = np.random.default_rng(size)
    src = put(rng.standard_normal((3, (1 + gated) * size)).astype(np.float32) * 3, dtype)
    out = poisoned((4, size), dtype)
    activate(ctx, src, out.slice_rows(0, 3), kind, gated)
    x = get(src).astype(np.float32)
    expected = reference(kind, x[:, :size])
    on_cpu = np.empty((3, size), np.float32)
    cpu.activate(kind, x[:, :size], on_cpu)
    if gated:
        expected, on_cpu = expected * x[:, size:], on_cpu * x[:, size:]
    found = get(out)
    scale = np.abs(expected).max() + 1e-6
    rounding = 2.0 ** (-11 if dtype == "f16" else -8)
    assert np.abs(found[:3] - expected).max() <= 2 * rounding * scale
    assert np.abs(found[:3] - on_cpu).max() <= 2 * rounding * scale
    assert np.isnan(found[3]).all()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_extremes_give_limits_and_no_nan(kind: Activation, ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    x = np.array([[0.0, -0.0, -1e4, -100.0, -30.0, -1e-6, 1e-6, 30.0, 100.0, 200.0]], np.float32)
    out = poisoned(x.shape, "f16")
    activate(ctx, put(x, "f16"), out, kind, False)
    expected = reference(kind, x.astype(np.float16))
    assert np.allclose(get(out), expected, rtol=2e-3, atol=1e-6)


def test_in_place_gives_the_same_bits(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    src = put(np.random.default_rng(0).standard_normal((5, 1000)).astype(np.float32), "f16")
    out = poisoned((5, 1000), "f16")
    activate(ctx, src, out, "gelu_tanh", False)
    activate(ctx, src, src, "gelu_tanh", False)
    assert np.array_equal(get(src), get(out))


def test_shapes_that_do_not_go_together_are_named(ctx: Context, poisoned: Put) -> None:
    with pytest.raises(DeviceError, match=r"activate: src is f16\[2, 8\], expected f16 \[2, 16\]"):
        activate(ctx, poisoned((2, 8), "f16"), poisoned((2, 8), "f16"), "silu", True)
