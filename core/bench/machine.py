"""The limits of this machine, measured: how fast memory can be read and how fast float32 matrices are multiplied.

Both are measured in the run that they judge, with NumPy and its BLAS, on data far larger than the caches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

ARRAY_BYTES = 256 << 20
GEMM_SIZE = 1536


@dataclass(frozen=True, slots=True)
class Limits:
    """``read_bytes`` per second from memory, ``flops`` per second in a product of ``dtype``, and how measured."""

    read_bytes: float
    flops: float
    remark: str
    dtype: str = "float32"


def measure_limits(device: str, *, array_bytes: int = ARRAY_BYTES, gemm_size: int = GEMM_SIZE) -> Limits:
    """The limits of ``device``; ``array_bytes`` and ``gemm_size`` bound the work on a CPU.

    Reading is timed as a matrix-vector product and as a threaded sum over the same array; the faster counts, and the
    best of several passes, because a limit is what the machine can do when nothing disturbs it.
    """
    if device != "cpu":
        from ..runtime.cuda.limits import measure

        found = measure(int(device.partition(":")[2]))
        return Limits(found.read_bytes, found.f16_flops, found.remark, "float16")
    columns = 4096
    rows = max(16, array_bytes // 4 // columns)
    matrix = np.ones((rows, columns), np.float32)
    vector = np.ones(columns, np.float32)
    out = np.empty(rows, np.float32)
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        parts = np.array_split(matrix, workers)
        gemv = _best(lambda: np.dot(matrix, vector, out=out), 4)
        total = _best(lambda: list(pool.map(np.sum, parts)), 4)
    square = np.ones((gemm_size, gemm_size), np.float32)
    product = np.empty_like(square)
    gemm = _best(lambda: np.dot(square, square, out=product), 3)
    faster = "matrix-vector product" if gemv < total else f"sum in {workers} threads"
    return Limits(
        read_bytes=rows * columns * 4 / min(gemv, total),
        flops=2 * gemm_size**3 / gemm,
        remark=f"NumPy {faster} over {rows * columns * 4 >> 20} MiB; float32 product of {gemm_size} x {gemm_size}",
    )


def _best(work: Callable[[], object], times: int) -> float:
    work()  # The first pass touches new pages and starts threads.
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
