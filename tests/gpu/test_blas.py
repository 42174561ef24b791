"""Matrix products through cuBLASLt against float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.blas import Blas
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.device import bf16_to_float, float_to_bf16
from polyhead.runtime.cuda.graph import Graph

pytestmark = pytest.mark.gpu

#: Half a unit in the last place, relative.
ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}


@pytest.fixture(scope="module")
def blas(ctx: Context) -> Iterator[Blas]:
    with Blas(ctx) as blas:
        yield blas


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that ``dtype`` holds exactly."""
    return bf16_to_float(float_to_bf16(values)) if dtype == "bf16" else values.astype(np.float16).astype(np.float32)


def operands(rows: int, columns: int, inner: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows * 7 + columns * 3 + inner)
    x, w = rng.standard_normal((rows, inner), np.float32), rng.standard_normal((columns, inner), np.float32)
    return rounded(x, dtype), rounded(w, dtype)


def check(got: np.ndarray, x: np.ndarray, w: np.ndarray, dtype: str, added: np.ndarray | float = 0.0) -> None:
    """Within the rounding of the result, and of float32 sums in any order."""
    exact = x.astype(np.float64) @ w.astype(np.float64).T + added
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T + np.abs(added)
    allowed = ROUNDING[dtype] * np.abs(exact) + 2.0**-24 * (x.shape[1] + 8) * magnitude + 1e-7
    assert got.shape == exact.shape
    assert np.all(np.abs(got - exact) <= allowed)


@pytest.mark.parametrize("out", ["f32", "act"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 64, 129, 600])
@pytest.mark.parametrize(("columns", "inner"), [(8, 8), (64, 32), (576, 576), (192, 1536), (1000, 40)])
def test_products(blas, put, poisoned, get, rows, columns, inner, dtype, out) -> None:
    x, w = operands(rows, columns, inner, dtype)
    kind = dtype if out == "act" else "f32"
    result = poisoned((rows, columns), kind)
    blas.matmul(put(x, dtype), put(w, dtype), result)
    check(get(result), x, w, kind)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("rows", "columns", "inner"),
    [(1, 1, 1), (1, 5, 3), (3, 2, 20), (7, 33, 65), (31, 12, 6), (5, 577, 1535), (600, 1, 7), (2, 1001, 2)],
)
def test_odd_sizes_need_no_padding(blas, put, poisoned, get, rows, columns, inner, dtype) -> None:
    x, w = operands(rows, columns, inner, dtype)
    for kind in (dtype, "f32"):
        result = poisoned((rows, columns), kind)
        blas.matmul(put(x, dtype), put(w, dtype), result)
        check(get(result), x, w, kind)


@pytest.mark.parametrize("rows", [1, 5, 130])
def test_accumulating_adds_to_the_residual(blas, put, get, rows) -> None:
    x, w = operands(rows, 576, 1536, "f16")
    residual = np.random.default_rng(3).standard_normal((rows, 576)).astype(np.float32)
    out = put(residual)
    blas.matmul(put(x, "f16"), put(w, "f16"), out, accumulate=True)
    check(get(out), x, w, "f32", residual.astype(np.float64))


@pytest.mark.parametrize("column", [0, 3, 16])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_a_range_of_columns_is_written_and_nothing_else(blas, put, poisoned, get, column, dtype) -> None:
    x, w = operands(19, 48, 64, "f16")
    out = poisoned((19, 80), dtype)
    blas.matmul(put(x, "f16"), put(w, "f16"), out, column=column)
    got = get(out)
    check(got[:, column : column + 48], x, w, dtype)
    got[:, column : column + 48] = np.nan
    assert np.isnan(got).all()


def test_views_that_begin_anywhere(blas, put, poisoned, get) -> None:
    x, w = operands(9, 30, 21, "f16")
    out = poisoned((9, 29), "f32")
    blas.matmul(put(x, "f16").slice_rows(1, 9), put(w, "f16").slice_rows(1, 30), out.slice_rows(1, 9))
    check(get(out)[1:], x[1:], w[1:], "f32")
    assert np.isnan(get(out)[0]).all()


def test_long_sums_are_not_rounded_to_16_bits_in_between(blas, put, poisoned, get) -> None:
    # Partial sums near 16384 whose differences float16 (spacing 8 there) could not hold.
    inner = 32768
    x = np.ones((1, inner), np.float32)
    w = np.full((8, inner), 1.0, np.float32)
    w[:, inner // 2 :] = -1.0
    w[:, -1] = 0.0
    out = poisoned((1, 8), "f16")
    blas.matmul(put(x, "f16"), put(w, "f16"), out)
    assert get(out).tolist() == [[1.0] * 8]


def test_no_rows_is_no_work(blas, pool) -> None:
    blas.matmul(pool.array((0, 8), "f16"), pool.array((8, 8), "f16"), pool.array((0, 8), "f16"))


def test_a_captured_product_equals_an_eager_one(ctx, blas, put, poisoned, get) -> None:
    x, w = operands(4, 576, 576, "f16")
    dx, dw = put(x, "f16"), put(w, "f16")
    eager, replayed = poisoned((4, 576), "f16"), poisoned((4, 576), "f16")
    blas.matmul(dx, dw, eager)
    with Graph(ctx, lambda: blas.matmul(dx, dw, replayed)) as graph:
        ctx.device.synchronize()
        graph.launch()
        assert np.array_equal(get(replayed), get(eager))
        ctx.device.upload(dx, x[::-1])
        graph.launch()
        assert np.array_equal(get(replayed), get(eager)[::-1])


@pytest.mark.parametrize(
    ("x", "w", "out", "options", "message"),
    [
        (
            ((2, 8), "f16"),
            ((4, 9), "f16"),
            ((2, 4), "f16"),
            {},
            r"x f16\[2, 8\] and w f16\[4, 9\] into out f16\[2, 4\]",
        ),
        (((2, 8), "f16"), ((4, 8), "f16"), ((3, 4), "f16"), {}, "columns 0:4 of 2 rows are not there"),
        (((2, 8), "f16"), ((4, 8), "f16"), ((2, 4), "f16"), {"column": 1}, "columns 1:5"),
        (((2, 8), "f16"), ((4, 8), "bf16"), ((2, 4), "f16"), {}, "both f16 or both bf16"),
        (((2, 8), "f32"), ((4, 8), "f32"), ((2, 4), "f32"), {}, "both f16 or both bf16"),
        (((2, 8), "f16"), ((4, 8), "f16"), ((2, 4), "bf16"), {}, "of that type or f32"),
        (((2, 8), "f16"), ((4, 8), "f16"), ((2, 4), "f16"), {"accumulate": True}, "only a float32 out accumulates"),
        (((2, 0), "f16"), ((4, 0), "f16"), ((2, 4), "f16"), {}, "w is empty"),
        (((2, 8), "f16"), ((4, 8), "f16"), ((8,), "f16"), {}, r"wanted x \[M, K\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_shapes(blas, pool, x, w, out, options, message) -> None:
    with pytest.raises(DeviceError, match=message):
        blas.matmul(pool.array(*x), pool.array(*w), pool.array(*out), **options)


def test_a_closed_blas_is_an_error(ctx, pool) -> None:
    blas = Blas(ctx, 1 << 20)
    blas.close()
    blas.close()
    a = pool.array((8, 8), "f16")
    with pytest.raises(DeviceError, match="closed"):
        blas.matmul(a, a, a)
