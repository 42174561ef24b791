"""Random bits as weights: exact uniform floats, and valid quantised blocks of every type that tiny models use.

Everything comes from PCG64's raw stream (which NumPy promises to keep, unlike ``Generator``'s distributions) through
IEEE-exact arithmetic only: no ``exp``, ``pow`` or sums, whose last bit depends on the library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockLayout:
    """Where a block's float16 scale ``d`` and minimum lie (byte offsets), and how random quants must be scaled.

    ``rms`` is the root mean square of a weight at d = 1 when all other bytes are random and the minimum, if any, is
    ``min_ratio * d``, which makes the mean zero. For MXFP4 ``d_at`` is the byte of its power-of-two scale.
    """

    weights: int
    size: int
    d_at: int
    rms: float
    min_at: int | None = None
    min_ratio: float = 0.0


LAYOUTS = {
    "Q4_0": BlockLayout(32, 18, 0, 4.64),
    "Q4_1": BlockLayout(32, 20, 0, 4.61, 2, -7.5),
    "Q5_0": BlockLayout(32, 22, 0, 9.25),
    "Q5_1": BlockLayout(32, 24, 0, 9.23, 2, -15.5),
    "Q8_0": BlockLayout(32, 34, 0, 73.9),
    "Q2_K": BlockLayout(256, 84, 80, 13.9, 82, 1.5),
    "Q3_K": BlockLayout(256, 110, 108, 43.3),
    "Q4_K": BlockLayout(256, 144, 0, 258.0, 2, 7.5),
    "Q5_K": BlockLayout(256, 176, 0, 527.0, 2, 15.5),
    "Q6_K": BlockLayout(256, 210, 208, 1366.0),
    "IQ4_NL": BlockLayout(32, 18, 0, 68.2),
    "IQ4_XS": BlockLayout(256, 136, 0, 1260.0),
    "MXFP4": BlockLayout(32, 17, 0, 5.85),
}


def _words(stream: np.random.PCG64, count: int) -> NDArray[np.uint32]:
    return stream.random_raw((count + 1) // 2).astype("<u8").view("<u4")[:count]


def uniform(stream: np.random.PCG64, count: int) -> NDArray[np.float32]:
    """Multiples of 2^-23 in [-1, 1), exactly."""
    return (_words(stream, count) >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


def random_blocks(stream: np.random.PCG64, shape: tuple[int, ...], kind: str, rms: float) -> NDArray[np.uint8]:
    """Valid quantised rows: every quant and sub-scale bit random, only the scale of a block drawn to suit ``rms``.

    So all bit patterns occur, also those that a quantiser rarely writes (negative scales, -128, all 64 sub-scales).
    """
    layout = LAYOUTS[kind]
    count = math.prod(shape) // layout.weights
    blocks = _words(stream, count * layout.size // 4 + 1).view(np.uint8)[: count * layout.size]
    blocks = blocks.reshape(count, layout.size).copy()
    jitter = uniform(stream, count)
    if kind == "MXFP4":  # a weight is kvalue * 2^(e - 128)
        exponent = math.frexp(rms / layout.rms * math.sqrt(2.0))[1] + 127  # the nearest power of two
        blocks[:, 0] = exponent + (jitter > 0.5).astype(np.int64) - (jitter < -0.5).astype(np.int64)
    else:
        scale = np.float32(rms / layout.rms) * (np.float32(1) + jitter * np.float32(0.5))
        if layout.min_at is None:
            scale = np.where(_words(stream, count) & 1, -scale, scale)
        blocks[:, layout.d_at : layout.d_at + 2] = scale.astype("<f2").view(np.uint8).reshape(count, 2)
        if layout.min_at is not None:
            low = scale * np.float32(layout.min_ratio)
            blocks[:, layout.min_at : layout.min_at + 2] = low.astype("<f2").view(np.uint8).reshape(count, 2)
    return blocks.reshape(*shape[:-1], -1)
