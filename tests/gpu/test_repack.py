"""Blocks made tiles on the GPU and tiles made rows again: nothing is lost, nothing beside is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.formats import FORMATS, QuantMatrix
from polyhead.runtime.cuda.memory import Array, Pool
from polyhead.runtime.cuda.ops.dequant import dequantise
from polyhead.runtime.cuda.ops.repack import repack
from random_blocks import random_blocks

from gguf import GGMLQuantizationType, quants

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]


def blocks_of(kind: str, rows: int, cols: int) -> Any:
    return random_blocks(np.random.PCG64(rows * 10007 + cols), (rows, cols), kind, 0.02)


def values_of(kind: str, blocks: Any) -> Any:
    return quants.dequantize(blocks, GGMLQuantizationType[kind])


def poisoned_matrix(kind: str, rows: int, cols: int, poisoned: Put) -> QuantMatrix:
    return QuantMatrix(kind, rows, cols, poisoned(QuantMatrix.shape_of(kind, rows, cols), "u8"))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 16, 37, 200])
@pytest.mark.parametrize("blocks", [1, 2, 5, 37])
def test_repacked_weights_are_exactly_the_blocks_values(
    kind: str, rows: int, blocks: int, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    cols = blocks * FORMATS[kind].raw.weights
    raw = blocks_of(kind, rows, cols)
    matrix = poisoned_matrix(kind, rows, cols, poisoned)
    repack(ctx, kind, put(raw.reshape(-1)), matrix)
    out = poisoned((rows + 1, cols), "f32")
    dequantise(ctx, matrix, out.slice_rows(0, rows))
    found = get(out)
    assert np.array_equal(found[:rows], values_of(kind, raw))
    assert np.isnan(found[rows]).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_a_matrix_repacked_in_parts_is_the_same_bytes(
    kind: str, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    rows, cols = 75, 768
    raw = blocks_of(kind, rows, cols)
    whole, parts = (poisoned_matrix(kind, rows, cols, poisoned) for _ in range(2))
    repack(ctx, kind, put(raw.reshape(-1)), whole)
    for start, stop in ((48, 75), (0, 16), (16, 48)):
        repack(ctx, kind, put(raw[start:stop].reshape(-1)), parts.slice_rows(start, stop))
    assert np.array_equal(get(whole.data), get(parts.data))


def test_blocks_of_another_type_or_size_are_refused(ctx: Context, pool: Pool, poisoned: Put) -> None:
    matrix = poisoned_matrix("Q4_K", 16, 256, poisoned)
    with pytest.raises(DeviceError, match=r"Q5_K blocks do not make Q4_K\[16, 256\]"):
        repack(ctx, "Q5_K", pool.array(16 * 176, "u8"), matrix)
    with pytest.raises(DeviceError, match=r"2,304 bytes of blocks, not 2,303"):
        repack(ctx, "Q4_K", pool.array(2303, "u8"), matrix)
