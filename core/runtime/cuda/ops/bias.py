"""What a cuBLAS product leaves to do: launches kernels/bias.cu."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from ..context import Context
from ..memory import Array
from ..variants import Variant
from .checks import FLOATS, expect, expect_array

_THREADS = 256
_MOST_ROWS = 65535  # of a grid in y


@cache
def _macros(target: str) -> Mapping[str, object]:
    return {"PH_ACT_BF16": target == "bf16", "PH_OUT_F32": target == "f32"}


VARIANTS = tuple(Variant("bias.cu", ("ph_add_bias",), _macros(target)) for target in ("f32", "f16", "bf16"))


def add_bias(ctx: Context, bias: Array, out: Array, column: int, scale: float = 1.0) -> None:
    """out[:, column:column + n] += scale · bias, f32 [n]; ``out`` [M, ≥ column + n] in f32, f16 or bf16."""
    expect_array("add_bias", "bias", bias, ("f32",), (None,))
    expect_array("add_bias", "out", out, FLOATS, (None, None))
    rows, width = out.shape
    expect(
        "add_bias", 0 <= column <= width - bias.size, lambda: f"columns {column}:{column + bias.size} are not in {out}"
    )
    for start in range(0, rows, _MOST_ROWS):
        part = out.slice_rows(start, min(rows, start + _MOST_ROWS))
        grid = (-(-bias.size // _THREADS), part.shape[0], 1)
        args = (bias, part, bias.size, np.int64(width), column, scale)
        ctx.launch("bias.cu", "ph_add_bias", grid, _THREADS, *args, macros=_macros(out.dtype))
