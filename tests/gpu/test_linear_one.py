"""Projections of one row with the norm before and the activation after them, on the GPU against float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tolerance
from polyhead.arch import LayerNorm, RMSNorm
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.formats import FORMATS, Matrix
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops import linear_one as op
from polyhead.runtime.cuda.ops.linear_one import fits, linear_one

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]
Weights = Callable[..., tuple[Matrix, Any]]

ROUNDED = {"f32": 2e-5, "f16": 1e-3, "bf16": 8e-3}
NORMED = {"f16": 2e-3, "bf16": 1.6e-2}  # the normed row is rounded before the product


def row(put: Put, get: Get, cols: int, dtype: str, shift: float = 0.0) -> tuple[Array, Any]:
    x = put((np.random.default_rng(cols).standard_normal((1, cols)) + shift).astype(np.float32), dtype)
    return x, get(x).astype(np.float64)


def vector(size: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def silu(x: Any) -> Any:
    return x / (1.0 + np.exp(-x))


# Numbers of tiles below, at and above the number of blocks, and rows that end inside a tile.
@pytest.mark.parametrize("kind", [*FORMATS, "f16", "bf16"])
@pytest.mark.parametrize(("rows", "blocks"), [(5, 1), (37, 7), (2160, 8), (4700, 17)])
def test_every_format_agrees_with_float64(
    kind: str, rows: int, blocks: int, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    cols = blocks * (40 if kind in ("f16", "bf16") else FORMATS[kind].raw.weights)
    matrix, w = weights(kind, rows, cols)
    for dtype in ("f16", "bf16") if kind in FORMATS else (kind,):
        x, values = row(put, get, cols, dtype)
        out = poisoned((1, rows), "f32")
        linear_one(ctx, x, matrix, out)
        assert tolerance.error(get(out), values @ w.T) < ROUNDED["f32"]


# Large matrices are shared out among more warps: here small ones too, some with fewer units than warps.
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rows", "blocks"), [(5, 1), (37, 7), (4700, 17)])
def test_every_format_agrees_with_more_warps(
    kind: str,
    rows: int,
    blocks: int,
    ctx: Context,
    weights: Weights,
    put: Put,
    poisoned: Put,
    get: Get,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(op, "MANY_UNITS", 0)
    cols = blocks * FORMATS[kind].raw.weights
    matrix, w = weights(kind, rows, cols)
    for dtype in ("f16", "bf16"):
        x, values = row(put, get, cols, dtype)
        out = poisoned((1, rows), "f32")
        linear_one(ctx, x, matrix, out)
        assert tolerance.error(get(out), values @ w.T) < ROUNDED["f32"]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", "f16"])
@pytest.mark.parametrize(("rows", "cols"), [(6144, 4096), (4096, 14336), (2048, 8192), (1600, 1536), (50257, 768)])
def test_sizes_of_real_models_agree_with_float64(
    kind: str, rows: int, cols: int, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, w = weights(kind, rows, cols)
    x, values = row(put, get, cols, "f16")
    out = poisoned((1, rows), "f32")
    linear_one(ctx, x, matrix, out)
    assert tolerance.error(get(out), values @ w.T) < ROUNDED["f32"]


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_1", "f16", "bf16"])
@pytest.mark.parametrize("out_dtype", ["f32", "act"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_bias_scale_and_sum_reach_only_their_columns(
    kind: str, out_dtype: str, accumulate: bool, ctx: Context, weights: Weights, put: Put, get: Get
) -> None:
    act = "bf16" if kind == "bf16" else "f16"
    dtype = act if out_dtype == "act" else "f32"
    matrix, w = weights(kind, 37, 512)
    x, values = row(put, get, 512, act)
    bias = vector(37, 5)
    out = put(vector(60, 6)[None], dtype)
    before = get(out)
    linear_one(ctx, x, matrix, out, 11, bias=put(bias), accumulate=accumulate, scale=0.5)
    expected = 0.5 * (values @ w.T + bias) + (before[:, 11:48] if accumulate else 0.0)
    found = get(out)
    assert tolerance.error(found[:, 11:48], expected) < ROUNDED[dtype]
    assert np.array_equal(np.delete(found, np.s_[11:48], 1), np.delete(before, np.s_[11:48], 1))


@pytest.mark.parametrize(
    ("kind", "cols"),
    [
        *((kind, cols) for kind in ("Q4_K", "Q4_0", "f16", "bf16") for cols in (256, 768, 4096, 8192)),
        *((kind, 1600) for kind in ("Q4_0", "f16", "bf16")),  # no whole number of blocks of 256
    ],
)
@pytest.mark.parametrize("layer", [False, True])
def test_a_norm_before_agrees_with_float64(
    kind: str, cols: int, layer: bool, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    act = "bf16" if kind == "bf16" else "f16"
    matrix, w = weights(kind, 300, cols)
    x, values = row(put, get, cols, "f32", shift=3.0)
    gain, offset = vector(cols, 1), vector(cols, 2)
    norm = LayerNorm("w", "b", 1e-5) if layer else RMSNorm("w", 1e-5)
    out = poisoned((1, 300), "f32")
    linear_one(ctx, x, matrix, out, norm=(norm, put(gain), put(offset) if layer else None), act=act)
    if layer:
        values = values - values.mean()
    normed = values / np.sqrt((values**2).mean() + 1e-5) * gain + (offset if layer else 0.0)
    assert tolerance.error(get(out), normed @ w.T) < NORMED[act]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", "f16", "bf16"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_an_activation_after_agrees_with_float64(
    kind: str, gated: bool, biased: bool, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    act = "bf16" if kind == "bf16" else "f16"
    rows, cols = 2 * 2224, 1024
    matrix, w = weights(kind, rows, cols)
    x, values = row(put, get, cols, act)
    bias = vector(rows, 3) if biased else None
    own = rows // 2 if gated else rows
    out = poisoned((1, own), act)
    given = None if bias is None else put(bias)
    linear_one(ctx, x, matrix, out, bias=given, activation="silu", gated=gated)
    product = values @ w.T + (0.0 if bias is None else bias)
    expected = silu(product[:, :own]) * product[:, own:] if gated else silu(product)
    assert tolerance.error(get(out), expected) < ROUNDED[act]


@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K", "f16"])
def test_the_same_product_twice_is_the_same_bits(
    kind: str, ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, _ = weights(kind, 5000, 2048)
    x, _ = row(put, get, 2048, "f16")
    results = []
    for _ in range(3):
        out = poisoned((1, 5000), "f32")
        linear_one(ctx, x, matrix, out)
        results.append(get(out))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_a_chain_of_launches_waits_for_what_it_reads(
    ctx: Context, weights: Weights, put: Put, poisoned: Put, get: Get
) -> None:
    """Each product begins before the one whose result it reads has ended."""
    matrix, w = weights("Q8_0", 1024, 1024)
    x, _ = row(put, get, 1024, "f16")
    arrays = [x, *(poisoned((1, 1024), "f16") for _ in range(40))]
    for source, target in pairwise(arrays):
        linear_one(ctx, source, matrix, target, scale=1.5625)  # keeps the length of a row
    chained = [get(array) for array in arrays]
    for source, target in pairwise(chained):
        assert tolerance.error(target, 1.5625 * (source.astype(np.float64) @ w.T)) < ROUNDED["f16"]


def test_what_does_not_fit_is_named(ctx: Context, weights: Weights, put: Put, poisoned: Put) -> None:
    matrix, _ = weights("Q4_K", 48, 512)
    x = poisoned((1, 512), "f16")
    with pytest.raises(DeviceError, match=r"x is f16\[1, 256\], expected f16 or bf16 \[1, 512\]"):
        linear_one(ctx, poisoned((1, 256), "f16"), matrix, poisoned((1, 48), "f32"))
    with pytest.raises(DeviceError, match=r"48 columns from 1 on are not in f32\[1, 48\]"):
        linear_one(ctx, x, matrix, poisoned((1, 48), "f32"), 1)
    with pytest.raises(DeviceError, match="a gate needs an activation"):
        linear_one(ctx, x, matrix, poisoned((1, 48), "f32"), gated=True)
    assert not fits(ctx.device, matrix, gated=True)  # the second half begins inside a tile
    with pytest.raises(DeviceError, match=r"Q4_K\[48, 512\] does not fit the kernel"):
        linear_one(ctx, x, matrix, poisoned((1, 48), "f16"), activation="silu", gated=True)
    odd, _ = weights("f16", 8, 12)
    assert not fits(ctx.device, odd)
