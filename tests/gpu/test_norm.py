"""Norms on the GPU against float64 and the CPU runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tolerance
from polyhead.arch import LayerNorm, Norm, RMSNorm
from polyhead.errors import DeviceError
from polyhead.runtime.cpu import ops as cpu
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops.norm import normalise

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]

RMS, LAYER = RMSNorm("w", 1e-5), LayerNorm("w", "b", 1e-5)


def reference(x: Any, norm: Norm, weight: Any, bias: Any | None) -> Any:
    x = np.asarray(x, np.float64)
    if isinstance(norm, LayerNorm):
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps) * np.asarray(weight, np.float64)
    return y if bias is None else y + np.asarray(bias, np.float64)


def values(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("norm", [RMS, LAYER], ids=["rms", "layer"])
@pytest.mark.parametrize("size", [1, 2, 3, 31, 128, 577, 576, 1536, 4096, 4100, 5001, 8195, 16383, 16384, 20000, 32768])
def test_norms_of_any_size_agree_with_float64(
    norm: Norm, size: int, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    rng = np.random.default_rng(size)
    x, w, b = values(rng, 3, size) * 3, values(rng, size), values(rng, size)
    bias = b if isinstance(norm, LayerNorm) else None
    expected = reference(x, norm, w, bias)
    out = poisoned((4, size), "f32")
    normalise(ctx, put(x), norm, put(w), None if bias is None else put(bias), out.slice_rows(0, 3))
    found = get(out)
    assert tolerance.error(found[:3], expected) < tolerance.CPU_NORM
    assert np.isnan(found[3]).all()
    on_cpu = np.empty_like(x)
    cpu.normalise(x, norm, w, bias, on_cpu)
    assert tolerance.error(found[:3], on_cpu) < 2 * tolerance.CPU_NORM


@pytest.mark.parametrize("dtypes", [("f32", "f16"), ("f16", "f16"), ("f16", "f32"), ("f32", "bf16"), ("bf16", "bf16")])
@pytest.mark.parametrize("size", [63, 576])
def test_narrow_inputs_and_outputs_are_rounded_once(
    dtypes: tuple[str, str], size: int, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    rng = np.random.default_rng(1)
    x, w, b = put(values(rng, 5, size), dtypes[0]), values(rng, size), values(rng, size)
    out = poisoned((5, size), dtypes[1])
    normalise(ctx, x, LAYER, put(w), put(b), out)
    limit = tolerance.CPU_NORM if dtypes[1] == "f32" else tolerance.CUDA_NORM
    assert tolerance.error(get(out), reference(get(x), LAYER, w, b)) < limit


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_in_place_gives_the_same_bits(dtype: str, ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    rng = np.random.default_rng(2)
    x, w = put(values(rng, 3, 1000), dtype), put(values(rng, 1000))
    out = poisoned((3, 1000), dtype)
    normalise(ctx, x, RMS, w, None, out)
    normalise(ctx, x, RMS, w, None, x)
    assert np.array_equal(get(x), get(out))


def test_a_large_mean_does_not_cancel_the_variance(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    rng = np.random.default_rng(3)
    x, w = 64 + values(rng, 2, 4096), np.ones(4096, np.float32)
    out = poisoned((2, 4096), "f32")
    normalise(ctx, put(x), LayerNorm("w", None, 1e-5), put(w), None, out)
    assert tolerance.error(get(out), reference(x, LAYER, w, None)) < 2e-5


@pytest.mark.parametrize(("heads", "size", "offset"), [(3, 10, 7), (2, 64, 64), (1, 20, 4)])
def test_heads_inside_wider_rows_are_normed_and_the_rest_left_alone(
    heads: int, size: int, offset: int, ctx: Context, put: Put, get: Get
) -> None:
    rng = np.random.default_rng(4)
    wide = values(rng, 4, heads * size + 80)
    w = values(rng, size)
    array = put(wide)
    part = Array(array.ptr + 4 * offset, (4, heads * size), "f32")
    normalise(ctx, part, RMS, put(w), None, part, heads=heads, in_stride=wide.shape[1], out_stride=wide.shape[1])
    inside = wide[:, offset : offset + heads * size].reshape(4, heads, size)
    expected = wide.astype(np.float64)
    expected[:, offset : offset + heads * size] = reference(inside, RMS, w, None).reshape(4, -1)
    found = get(array)
    assert tolerance.error(found, expected) < tolerance.CPU_NORM
    assert np.array_equal(found[:, :offset], wide[:, :offset])
    assert np.array_equal(found[:, offset + heads * size :], wide[:, offset + heads * size :])


def test_shapes_that_do_not_go_together_are_named(ctx: Context, put: Put, poisoned: Put) -> None:
    x, w = put(np.zeros((2, 8), np.float32)), put(np.ones(7, np.float32))
    with pytest.raises(DeviceError, match=r"normalise: x is f32\[2, 8\]"):
        normalise(ctx, x, RMS, w, None, x)
    with pytest.raises(DeviceError, match="do not mix"):
        normalise(ctx, poisoned((2, 7), "f16"), RMS, w, None, poisoned((2, 7), "bf16"))
