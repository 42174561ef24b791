"""Embedding rows of every format on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.formats import FORMATS, DenseMatrix, Matrix, QuantMatrix
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops.embed import embed
from polyhead.runtime.cuda.ops.repack import repack
from random_blocks import random_blocks

from gguf import GGMLQuantizationType, quants

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]
Table = Callable[[str, int, int], tuple[Matrix, Any]]


@pytest.fixture
def table(ctx: Context, put: Put, poisoned: Put, get: Get) -> Table:
    """A random table on the device, and its values."""

    def make(kind: str, rows: int, cols: int) -> tuple[Matrix, Any]:
        if kind in ("f16", "bf16"):
            dense = put(np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32), kind)
            return DenseMatrix(dense), get(dense).astype(np.float32)
        raw = random_blocks(np.random.PCG64(3), (rows, cols), kind, 0.02)
        matrix = QuantMatrix(kind, rows, cols, poisoned(QuantMatrix.shape_of(kind, rows, cols), "u8"))
        repack(ctx, kind, put(raw.reshape(-1)), matrix)
        return matrix, quants.dequantize(raw, GGMLQuantizationType[kind])

    return make


def columns(kind: str) -> int:
    return 13 if kind in ("f16", "bf16") else 3 * FORMATS[kind].raw.weights


@pytest.mark.parametrize("kind", [*FORMATS, "f16", "bf16"])
def test_a_row_is_the_token_s_weights_exactly(
    kind: str, ctx: Context, table: Table, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, values = table(kind, 45, columns(kind))
    tokens = np.random.default_rng(1).permutation(np.arange(90) % 45).astype(np.int32)
    out = poisoned((91, matrix.cols), "f32")
    embed(ctx, put(tokens), matrix, out.slice_rows(0, 90))
    found = get(out)
    assert np.array_equal(found[:90], values[tokens])
    assert np.isnan(found[90]).all()


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "f16"])
def test_learned_positions_are_added_to_the_scaled_row(
    kind: str, ctx: Context, table: Table, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, values = table(kind, 20, columns(kind))
    learned = np.random.default_rng(2).standard_normal((9, matrix.cols)).astype(np.float32)
    tokens, positions = np.array([3, 19, 0], np.int32), np.array([8, 0, 5], np.int32)
    out = poisoned((3, matrix.cols), "f32")
    embed(ctx, put(tokens), matrix, out, 2.5, put(positions), put(learned))
    assert np.allclose(get(out), values[tokens] * 2.5 + learned[positions], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["Q4_0", "bf16"])
def test_a_token_outside_the_table_cannot_be_overlooked(
    kind: str, ctx: Context, table: Table, put: Put, poisoned: Put, get: Get
) -> None:
    matrix, values = table(kind, 20, columns(kind))
    out = poisoned((3, matrix.cols), "f32")
    ctx.device.fill(out, 0)
    embed(ctx, put(np.array([20, 7, -1], np.int32)), matrix, out)
    found = get(out)
    assert np.isnan(found[[0, 2]]).all()
    assert np.array_equal(found[1], values[7])


def test_shapes_that_do_not_go_together_are_named(ctx: Context, table: Table, put: Put, poisoned: Put) -> None:
    matrix, _ = table("Q8_0", 20, 96)
    tokens = put(np.zeros(3, np.int32))
    with pytest.raises(DeviceError, match=r"out is f32\[3, 64\], expected f32 \[3, 96\]"):
        embed(ctx, tokens, matrix, poisoned((3, 64), "f32"))
    with pytest.raises(DeviceError, match="needs the positions"):
        embed(ctx, tokens, matrix, poisoned((3, 96), "f32"), 1.0, None, poisoned((9, 96), "f32"))
