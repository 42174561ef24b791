"""read: passes over memory once and keeps nothing, to measure how fast that can be. Launches kernels/stream.cu."""

from __future__ import annotations

import numpy as np

from ..context import Context
from ..memory import Array
from ..variants import Variant
from .checks import expect

VARIANTS = (Variant("stream.cu", ("ph_read",)),)
_THREADS = 512


def read(ctx: Context, data: Array, out: Array) -> None:
    """Reads all of ``data``, a multiple of 16 bytes; ``out`` is one u32 that is practically never written."""
    expect("read", data.nbytes % 16 == 0, lambda: f"{data} is not a multiple of 16 bytes")
    ctx.launch("stream.cu", "ph_read", 2 * ctx.device.sms, _THREADS, data, out, np.int64(data.nbytes // 16))
