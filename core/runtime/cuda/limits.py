"""The ceilings of a GPU, measured: reading memory, copying it, and multiplying matrices. Medians, random data."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .blas import Blas
from .context import Context
from .driver import load
from .memory import Array, Pool
from .ops.stream import read

_BYTES = 4 << 30
_GEMM = 8192
_REPEATS = 7


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """Bytes per second read; read and written in a copy; float16 operations per second in a square product."""

    read_bytes: float
    copy_bytes: float
    f16_flops: float
    remark: str


def seconds(ctx: Context, work: Callable[[], None], repeats: int = _REPEATS) -> float:
    """The median time of ``work`` on the device, after one run that is not counted."""
    options = load("cuda.core").EventOptions(timing_enabled=True)
    stream = ctx.device.stream
    work()
    times = []
    for _ in range(repeats):
        start = stream.record(options=options)
        work()
        end = stream.record(options=options)
        end.sync()
        times.append(float(end - start) / 1000)
    return statistics.median(times)


def measure(index: int) -> GpuLimits:
    """Measures GPU ``index``. Takes about 2 s, and 4 GiB or a quarter of the free memory."""
    with Context.open(index) as ctx:
        size = min(_BYTES, ctx.device.free() // 4) // 512 * 256
        with Pool(ctx.device, "limits") as pool, Blas(ctx) as blas:
            source, target = (_random(ctx, pool, size) for _ in range(2))
            flag = pool.array(1, "u32")
            read_time = seconds(ctx, lambda: read(ctx, source, flag))
            copy_time = seconds(ctx, lambda: ctx.device.copy(source, target))
            gemm = min(_GEMM, int((size // 2) ** 0.5) // 256 * 256)
            a, b = (array.view("f16", gemm, gemm) for array in (source, target))
            out = pool.array((gemm, gemm), "f16")
            _fill_normal(ctx, a)
            _fill_normal(ctx, b)
            gemm_time = seconds(ctx, lambda: blas.matmul(a, b, out))
        return GpuLimits(
            size / read_time,
            2 * size / copy_time,
            2 * gemm**3 / gemm_time,
            f"{size >> 20:,} MiB read once; copy {2 * size / copy_time / 1e9:,.0f} GB/s; "
            f"float16 product of {gemm} x {gemm} by cuBLAS",
        )


def _random(ctx: Context, pool: Pool, size: int) -> Array:
    """Random bytes: a block of them, repeated."""
    array = pool.array(size, "u8")
    block = np.random.default_rng(1).integers(0, 256, min(size, 64 << 20), np.uint8)
    first = array.slice_rows(0, len(block))
    ctx.device.upload(first, block)
    for start in range(len(block), size, len(block)):
        stop = min(size, start + len(block))
        ctx.device.copy(first.slice_rows(0, stop - start), array.slice_rows(start, stop))
    return array


def _fill_normal(ctx: Context, array: Array) -> None:
    rows = np.random.default_rng(2).standard_normal((256, array.shape[1])).astype(np.float16)
    first = array.slice_rows(0, 256)
    ctx.device.upload(first, rows)
    for start in range(256, array.shape[0], 256):
        ctx.device.copy(first, array.slice_rows(start, start + 256))
