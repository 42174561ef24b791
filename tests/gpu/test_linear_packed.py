"""Projections of many rows from packed weights, on the GPU against float64 products of the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tolerance
from polyhead.arch import RMSNorm
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.formats import FORMATS, Matrix, QuantMatrix
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops.linear_some import linear_some
from polyhead.runtime.cuda.ops.linear_wide import SHAPES, fits_wide, linear_wide, room_bytes
from polyhead.runtime.cuda.ops.norm import normalise
from polyhead.runtime.cuda.ops.some_shapes import TOKEN_TILES, shape_for

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]
Weights = Callable[..., tuple[Matrix, Any]]
Product = Callable[..., bool]

# Scale, minimum and weight are rounded to float16, once each.
PACKED = {"f32": 8e-4, "f16": 1.2e-3}


def _some(ctx: Context, poisoned: Put, x: Array, w: QuantMatrix, out: Array, column: int = 0, **how: Any) -> bool:
    return linear_some(ctx, x, w, out, column, **how)


def _wide(ctx: Context, poisoned: Put, x: Array, w: QuantMatrix, out: Array, column: int = 0, **how: Any) -> bool:
    if not fits_wide(ctx.device, Array(0, (1, 1), "f16")):
        pytest.skip(f"wgmma is for compute capability 9.0, {ctx.device} has another")
    return linear_wide(ctx, x, w, out, column, poisoned(room_bytes(*x.shape), "u8"), **how)


PRODUCTS = {"some": _some, "wide": _wide}


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, ctx: Context, poisoned: Put) -> Product:
    """The op of that name, with scratch full of NaN."""
    return partial(PRODUCTS[request.param], ctx, poisoned)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))),
}


def inputs(put: Put, rows: int, cols: int) -> tuple[Array, Any]:
    x = np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float16)
    return put(x), x.astype(np.float64)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rows", "blocks"), [(37, 1), (300, 7), (130, 17)])
def test_every_format_agrees_with_float64(
    kind: str, rows: int, blocks: int, product: Product, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    cols = blocks * FORMATS[kind].raw.weights
    matrix, w = weights(kind, rows, cols)
    for count in (2, 9, 33, 64, 65, 130, 300):
        x, values = inputs(put, count, cols)
        out = poisoned((count, rows), "f32")
        product(x, matrix, out)
        assert tolerance.error(get(out), values @ w.T) < PACKED["f32"]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("rows", [4096, 6144, 18_000])  # few tiles for a multiprocessor, some, and many
def test_sizes_of_real_models_agree_with_float64(
    kind: str, rows: int, product: Product, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, w = weights(kind, rows, 2048)
    for count in (16, 24, 32, 48, 90, 128, 190, 256, 512):
        x, values = inputs(put, count, 2048)
        out = poisoned((count, rows), "f16")
        product(x, matrix, out)
        assert tolerance.error(get(out), values @ w.T) < PACKED["f16"]


@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("op", ["some", "wide"])
def test_every_way_that_blocks_work_agrees_with_float64(
    kind: str, op: str, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, w = weights(kind, 5000, 2304)
    rng = np.random.default_rng(4)
    bias = rng.standard_normal(5000).astype(np.float32)
    for count in (70, 257) if op == "wide" else (8 * n for n in TOKEN_TILES):
        x, values = inputs(put, count, 2304)
        before = rng.standard_normal((count, 5000)).astype(np.float32)
        expected = before + 0.5 * (values @ w.T + bias)
        ways = (
            {shape_for(kind, own, count // 8, units=n) for own in (1, 2, 3, 4, 7, 20) for n in (9, 50)}
            if op == "some"
            else SHAPES
        )
        for shape in ways:
            out = put(before)
            PRODUCTS[op](ctx, poisoned, x, matrix, out, bias=put(bias), scale=0.5, accumulate=True, shape=shape)
            assert tolerance.error(get(out), expected) < PACKED["f32"], shape


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_every_way_that_blocks_work_has_its_gate(
    kind: str, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, w = weights(kind, 5024, 1280)
    for token_tiles in TOKEN_TILES:
        count = 8 * token_tiles
        x, values = inputs(put, count, 1280)
        sums = values @ w.T
        expected = ACTIVATIONS["silu"](sums[:, :2512]) * sums[:, 2512:]
        for shape in {shape_for(kind, own, token_tiles, True) for own in (2, 4, 7, 20)}:
            out = poisoned((count, 2512), "f16")
            assert linear_some(ctx, x, matrix, out, activation="silu", gated=True, shape=shape)
            assert tolerance.error(get(out), expected) < 2 * PACKED["f16"], shape


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0"])
@pytest.mark.parametrize("count", [3, 70])
@pytest.mark.parametrize("out_dtype", ["f32", "f16"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_bias_scale_and_sum_reach_only_their_columns(
    kind: str, count: int, out_dtype: str, accumulate: bool, product: Product, weights: Weights, put: Put, get: Get
) -> None:
    matrix, w = weights(kind, 37, 512)
    x, values = inputs(put, count, 512)
    bias = np.random.default_rng(5).standard_normal(37).astype(np.float32)
    out = put(np.random.default_rng(6).standard_normal((count, 60)).astype(np.float32), out_dtype)
    before = get(out)
    product(x, matrix, out, 11, bias=put(bias), accumulate=accumulate, scale=0.5)
    expected = 0.5 * (values @ w.T + bias) + (before[:, 11:48] if accumulate else 0.0)
    found = get(out)
    assert tolerance.error(found[:, 11:48], expected) < PACKED[out_dtype]
    assert np.array_equal(np.delete(found, np.s_[11:48], 1), np.delete(before, np.s_[11:48], 1))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_1", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("rows", [64, 5024])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_an_activation_after_agrees_with_float64(
    kind: str,
    rows: int,
    activation: str,
    gated: bool,
    biased: bool,
    product: Product,
    weights: Weights,
    put: Put,
    poisoned: Put,
    get: Get,
) -> None:
    matrix, w = weights(kind, rows, 1280)
    bias = np.random.default_rng(3).standard_normal(rows).astype(np.float32) if biased else None
    own = rows // 2 if gated else rows
    for count in (3, 16, 40, 64, 90, 200, 300):
        x, values = inputs(put, count, 1280)
        out = poisoned((count, own), "f16")
        given = None if bias is None else put(bias)
        if not product(x, matrix, out, bias=given, activation=activation, gated=gated):
            assert gated, "a gate is all that may be refused"
            assert np.isnan(get(out)).all(), "then nothing is done"
            continue
        before = values @ w.T + (0.0 if bias is None else bias)
        expected = ACTIVATIONS[activation](before[:, :own]) * (before[:, own:] if gated else 1.0)
        assert tolerance.error(get(out), expected) < 2 * PACKED["f16"]


def test_a_gate_whose_half_ends_inside_a_tile_is_left_to_others(
    product: Product, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, _ = weights("Q4_K", 48, 512)
    x, _ = inputs(put, 20, 512)
    out = poisoned((20, 24), "f16")
    assert product(x, matrix, out, activation="silu", gated=True) is False
    assert np.isnan(get(out)).all()


@pytest.mark.parametrize("count", [7, 100])
def test_the_same_product_twice_is_the_same_bits(
    count: int, product: Product, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, _ = weights("Q4_K", 3000, 4096)
    x, _ = inputs(put, count, 4096)
    results = []
    for _ in range(3):
        out = poisoned((count, 3000), "f32")
        product(x, matrix, out)
        results.append(get(out))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_infinite_activations_stay_in_their_row(
    ctx: Context, product: Product, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, w = weights("Q5_0", 64, 544)  # the last unit of 256 columns is cut short
    x, values = inputs(put, 40, 544)
    ctx.device.upload(x.slice_rows(1, 2), np.full((1, 544), np.inf, np.float16))
    out = poisoned((40, 64), "f32")
    product(x, matrix, out)
    rest = np.delete(np.arange(40), 1)
    assert tolerance.error(get(out)[rest], values[rest] @ w.T) < PACKED["f32"]
    assert not np.isfinite(get(out)[1]).any()


@pytest.mark.parametrize("count", [16, 96])
def test_a_chain_of_launches_waits_for_what_it_reads(
    count: int, product: Product, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    """Each product begins before the one whose result it reads has ended."""
    matrix, w = weights("Q8_0", 1024, 1024)
    x, _ = inputs(put, count, 1024)
    arrays = [x, *(poisoned((count, 1024), "f16") for _ in range(20))]
    for source, target in pairwise(arrays):
        product(source, matrix, target, scale=1.5625)  # keeps the length of a row
    chained = [get(array) for array in arrays]
    for source, target in pairwise(chained):
        assert tolerance.error(target, 1.5625 * (source.astype(np.float64) @ w.T)) < PACKED["f16"]


@pytest.mark.parametrize("count", [3, 24, 48, 100])
def test_a_norm_between_products_waits_for_one_and_is_waited_for_by_the_next(
    count: int, ctx: Context, product: Product, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    """A product may begin before the norm, and a norm of few rows lets the next begin before the last has ended."""
    matrix, w = weights("Q8_0", 1024, 1024)
    norm, ones = RMSNorm("w", 1e-5), put(np.ones(1024, np.float32))
    narrow = [inputs(put, count, 1024)[0], *(poisoned((count, 1024), "f16") for _ in range(12))]
    wide = [poisoned((count, 1024), "f32") for _ in range(12)]
    for (source, target), between in zip(pairwise(narrow), wide, strict=True):
        product(source, matrix, between)
        normalise(ctx, between, norm, ones, None, target)
    for (source, target), between in zip(pairwise(narrow), wide, strict=True):
        sums = get(between).astype(np.float64)
        assert tolerance.error(sums, get(source).astype(np.float64) @ w.T) < PACKED["f32"]
        assert (
            tolerance.error(get(target), sums / np.sqrt((sums**2).mean(-1, keepdims=True) + 1e-5)) < tolerance.CUDA_NORM
        )
    # In the same memory again and again, nothing that was there before is seen.
    first, second = inputs(put, count, 1024)[0], poisoned((count, 1024), "f32")
    for _ in range(12):
        product(first, matrix, second)
        normalise(ctx, second, norm, ones, None, first)
    assert np.array_equal(get(first), get(narrow[-1]))


def test_shapes_that_do_not_go_together_are_named(
    ctx: Context, product: Product, weights: Weights, poisoned: Put
) -> None:
    matrix, _ = weights("Q4_K", 64, 512)
    with pytest.raises(DeviceError, match=r"x is f16\[2, 256\], expected f16 \[any, 512\]"):
        product(poisoned((2, 256), "f16"), matrix, poisoned((2, 64), "f32"))
    with pytest.raises(DeviceError, match=r"x is bf16\[2, 512\], expected f16"):
        product(poisoned((2, 512), "bf16"), matrix, poisoned((2, 64), "f32"))
    with pytest.raises(DeviceError, match=r"64 columns from 1 on are not in f32\[2, 64\]"):
        product(poisoned((2, 512), "f16"), matrix, poisoned((2, 64), "f32"), 1)
    with pytest.raises(DeviceError, match="too little room"):
        linear_wide(ctx, poisoned((2, 512), "f16"), matrix, poisoned((2, 64), "f32"), 0, poisoned(64, "u8"))
