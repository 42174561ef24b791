"""Projections of few rows on the GPU against float64 products of the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tolerance
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.formats import FORMATS, Matrix
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops.gemv import MOST_ROWS, linear_few

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]
Weights = Callable[..., tuple[Matrix, Any]]

# Products are exact and sums float32, in the tensor core with a truncation of its own.
EXACT = 2e-5
ROUNDED = {"f32": EXACT, "f16": 1e-3, "bf16": 8e-3}


def inputs(put: Put, get: Get, rows: int, cols: int, dtype: str) -> tuple[Array, Any]:
    x = put(np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32), dtype)
    return x, get(x).astype(np.float64)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("act", ["f16", "bf16"])
@pytest.mark.parametrize("blocks", [1, 7, 17])
def test_every_format_agrees_with_float64(
    kind: str, act: str, blocks: int, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    cols = blocks * FORMATS[kind].raw.weights
    matrix, w = weights(kind, 37, cols)
    for rows in (1, 2, 8, 9, 17, 32) if kind in ("Q4_K", "Q6_K") else (1, 3):
        x, values = inputs(put, get, rows, cols, act)
        out = poisoned((rows, 37), "f32")
        linear_few(ctx, x, matrix, out)
        assert tolerance.error(get(out), values @ w.T) < EXACT


@pytest.mark.parametrize("act", ["f16", "bf16"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 8), (16, 333), (37, 1000), (130, 2088), (3, 4096)])
def test_dense_weights_of_any_shape_agree_with_float64(
    act: str, rows: int, cols: int, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, w = weights(act, rows, cols)
    for count in (1, 2, 9, 24, 32):
        x, values = inputs(put, get, count, cols, act)
        out = poisoned((count, rows), "f32")
        linear_few(ctx, x, matrix, out)
        assert tolerance.error(get(out), values @ w.T) < EXACT


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "f16"])
@pytest.mark.parametrize("cols", [4096, 14336])
def test_sizes_of_real_models_agree_with_float64(
    kind: str, cols: int, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, w = weights(kind, 1024, cols)
    for rows in (1, 5):
        x, values = inputs(put, get, rows, cols, "f16")
        out = poisoned((rows, 1024), "f32")
        linear_few(ctx, x, matrix, out)
        assert tolerance.error(get(out), values @ w.T) < EXACT


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0", "f16", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("out_dtype", ["f32", "act"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_bias_scale_and_sum_reach_only_their_columns(
    kind: str,
    rows: int,
    out_dtype: str,
    accumulate: bool,
    ctx: Context,
    weights: Weights,
    put: Put,
    get: Get,
) -> None:
    act = "bf16" if kind == "bf16" else "f16"
    dtype = act if out_dtype == "act" else "f32"
    matrix, w = weights(kind, 37, 512)
    x, values = inputs(put, get, rows, 512, act)
    bias = np.random.default_rng(5).standard_normal(37).astype(np.float32)
    before = np.random.default_rng(6).standard_normal((rows, 60)).astype(np.float32)
    out = put(before, dtype)
    before = get(out)
    linear_few(ctx, x, matrix, out, 11, bias=put(bias), accumulate=accumulate, scale=0.5)
    expected = 0.5 * (values @ w.T + bias) + (before[:, 11:48] if accumulate else 0.0)
    found = get(out)
    assert tolerance.error(found[:, 11:48], expected) < ROUNDED[dtype]
    assert np.array_equal(np.delete(found, np.s_[11:48], 1), np.delete(before, np.s_[11:48], 1))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", "f16"])
def test_a_row_s_result_does_not_depend_on_its_neighbours(
    kind: str, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, _ = weights(kind, 200, 2304)
    x, _ = inputs(put, get, MOST_ROWS + 3, 2304, "f16")
    everyone = poisoned((MOST_ROWS + 3, 200), "f32")
    linear_few(ctx, x, matrix, everyone, invariant=True)
    for start, stop in ((0, 1), (4, 6), (7, 16), (30, 35), (34, 35)):
        out = poisoned((stop - start, 200), "f32")
        linear_few(ctx, x.slice_rows(start, stop), matrix, out, invariant=True)
        assert np.array_equal(get(out), get(everyone)[start:stop])


@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K", "f16"])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_same_product_twice_is_the_same_bits(
    kind: str, rows: int, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, _ = weights(kind, 1000, 4096)
    x, _ = inputs(put, get, rows, 4096, "f16")
    results = []
    for _ in range(3):
        out = poisoned((rows, 1000), "f32")
        linear_few(ctx, x, matrix, out)
        results.append(get(out))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_infinite_activations_stay_in_their_row(
    ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, w = weights("Q4_K", 64, 512)
    x, values = inputs(put, get, 4, 512, "f16")
    ctx.device.upload(x.slice_rows(1, 2), np.full((1, 512), np.inf, np.float16))
    out = poisoned((4, 64), "f32")
    linear_few(ctx, x, matrix, out)
    rest = [0, 2, 3]
    assert tolerance.error(get(out)[rest], values[rest] @ w.T) < EXACT
    assert not np.isfinite(get(out)[1]).any()


def test_shapes_that_do_not_go_together_are_named(ctx: Context, weights: Weights, poisoned: Put) -> None:
    matrix, _ = weights("Q4_K", 64, 512)
    with pytest.raises(DeviceError, match=r"x is f16\[2, 256\], expected f16 or bf16 \[any, 512\]"):
        linear_few(ctx, poisoned((2, 256), "f16"), matrix, poisoned((2, 64), "f32"))
    with pytest.raises(DeviceError, match=r"64 columns from 1 on are not in f32\[2, 64\]"):
        linear_few(ctx, poisoned((2, 512), "f16"), matrix, poisoned((2, 64), "f32"), 1)
    with pytest.raises(DeviceError, match=r"out is bf16\[2, 64\], but x f16\[2, 512\]"):
        linear_few(ctx, poisoned((2, 512), "f16"), matrix, poisoned((2, 64), "bf16"))
    dense, _ = weights("bf16", 64, 512)
    with pytest.raises(DeviceError, match=r"the weights are bf16\[64, 512\], but x f16"):
        linear_few(ctx, poisoned((2, 512), "f16"), dense, poisoned((2, 64), "f32"))
