"""The small steps on the GPU against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops import rows

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]


def values(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtypes", [("f32", "f32"), ("f32", "f16"), ("bf16", "bf16")])
@pytest.mark.parametrize("size", [1, 255, 577])
def test_gather_picks_rows_in_any_order_and_repeats_them(
    dtypes: tuple[str, str], size: int, ctx: Context, put: Put, poisoned: Put, get: Get
) -> None:
    src, at = put(values(7, size), dtypes[0]), np.array([6, 0, 0, 3, -1], np.int32)
    out = poisoned((6, size), dtypes[1])
    rows.gather(ctx, src, put(at), out.slice_rows(0, 5))
    expected = get(src)[at]
    expected[4] = 0
    found = get(out)
    assert np.array_equal(found[:5], expected.astype(found.dtype))
    assert np.isnan(found[5]).all()


@pytest.mark.parametrize("dtypes", [("f32", "f32"), ("f16", "f32"), ("f32", "f16"), ("bf16", "f32"), ("f16", "f16")])
@pytest.mark.parametrize("scale", [1.0, 0.22])
def test_add_is_one_rounding_away_from_float64(
    dtypes: tuple[str, str], scale: float, ctx: Context, put: Put, get: Get
) -> None:
    src, dst = put(values(3, 333), dtypes[0]), put(values(3, 333) * 2, dtypes[1])
    expected = get(dst).astype(np.float64) + np.float32(scale) * get(src).astype(np.float64)
    rows.add(ctx, src, dst, scale)
    assert np.abs(get(dst) - expected).max() < (2e-6 if dtypes[1] == "f32" else 8e-3)


def test_convert_rounds_to_nearest(ctx: Context, put: Put, poisoned: Put, get: Get) -> None:
    x = values(3, 333)
    out = poisoned((3, 333), "f16")
    rows.convert(ctx, put(x), out)
    assert np.array_equal(get(out), x.astype(np.float16))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_finish_scales_then_caps(softcap: float | None, ctx: Context, put: Put, get: Get) -> None:
    x = values(2, 1001) * 100
    logits = put(x)
    rows.finish(ctx, logits, 0.25, softcap)
    expected = x.astype(np.float64) * 0.25
    if softcap is not None:
        expected = softcap * np.tanh(expected / softcap)
    assert np.allclose(get(logits), expected, rtol=2e-6, atol=2e-5)


def test_shapes_that_do_not_go_together_are_named(ctx: Context, poisoned: Put) -> None:
    with pytest.raises(DeviceError, match=r"add: src is f32\[2, 3\]"):
        rows.add(ctx, poisoned((2, 3), "f32"), poisoned((2, 4), "f32"))
