"""Tiles made rows on the GPU: any range of rows, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.device import bf16_to_float, float_to_bf16
from polyhead.runtime.cuda.formats import FORMATS, DenseMatrix, QuantMatrix
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops.dequant import dequantise
from polyhead.runtime.cuda.ops.repack import repack
from random_blocks import random_blocks

from gguf import GGMLQuantizationType, quants

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]
ROWS, COLS = 83, 768


@pytest.fixture
def load(ctx: Context, put: Put, poisoned: Put) -> Callable[[str], tuple[QuantMatrix, Any]]:
    """A random matrix of a type on the device, and its values."""

    def make(kind: str) -> tuple[QuantMatrix, Any]:
        raw = random_blocks(np.random.PCG64(5), (ROWS, COLS), kind, 0.02)
        matrix = QuantMatrix(kind, ROWS, COLS, poisoned(QuantMatrix.shape_of(kind, ROWS, COLS), "u8"))
        repack(ctx, kind, put(raw.reshape(-1)), matrix)
        return matrix, quants.dequantize(raw, GGMLQuantizationType[kind])

    return make


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_activation_types_get_the_values_rounded_to_nearest(
    kind: str, dtype: str, ctx: Context, load: Callable[[str], Any], poisoned: Put, get: Get
) -> None:
    matrix, values = load(kind)
    out = poisoned((ROWS, COLS), dtype)
    dequantise(ctx, matrix, out)
    expected = bf16_to_float(float_to_bf16(values)) if dtype == "bf16" else values.astype(np.float16)
    assert np.array_equal(get(out), expected)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (15, 17), (16, 32), (82, 83), (3, 83), (40, 40)])
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_a_range_of_rows_is_written_and_nothing_else(
    kind: str, start: int, stop: int, ctx: Context, load: Callable[[str], Any], poisoned: Put, get: Get
) -> None:
    matrix, values = load(kind)
    out = poisoned((stop - start + 1, COLS), "f32")
    dequantise(ctx, matrix, out.slice_rows(0, stop - start), start)
    found = get(out)
    assert np.array_equal(found[:-1], values[start:stop])
    assert np.isnan(found[-1]).all()


def test_what_cannot_be_unpacked_is_named(ctx: Context, load: Callable[[str], Any], poisoned: Put) -> None:
    matrix, _ = load("Q4_K")
    with pytest.raises(DeviceError, match=r"rows 80:84 are not in Q4_K\[83, 768\]"):
        dequantise(ctx, matrix, poisoned((4, COLS), "f32"), 80)
    with pytest.raises(DeviceError, match="is not quantised"):
        dequantise(ctx, DenseMatrix(poisoned((4, COLS), "f16")), poisoned((4, COLS), "f16"))
