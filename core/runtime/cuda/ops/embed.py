"""Rows of an embedding table of any format: launches kernels/embed.cu."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from ..context import Context
from ..formats import Matrix, QuantMatrix, format_of, units
from ..memory import Array
from ..variants import Variant
from .checks import expect, expect_array

_THREADS = 256
_ITEMS = _THREADS // 4  # units of a token that a block decodes
_MOST_TOKENS = 65535  # of a grid in y


@cache
def _macros(kind: str) -> Mapping[str, object]:
    if kind in ("f16", "bf16"):
        return {"PH_ACT_BF16": kind == "bf16"}
    return format_of(kind).macros()


VARIANTS = tuple(Variant("embed.cu", ("ph_embed_tiles",), _macros(kind)) for kind in ("Q4_K", "Q6_K", "Q8_0")) + tuple(
    Variant("embed.cu", ("ph_embed_rows",), _macros(dtype)) for dtype in ("f16", "bf16")
)


def embed(
    ctx: Context,
    tokens: Array,
    table: Matrix,
    out: Array,
    scale: float = 1.0,
    positions: Array | None = None,
    position_table: Array | None = None,
) -> None:
    """out f32 [N, hidden] = table[tokens] · scale, plus position_table[positions] where there is one.

    ``tokens`` and ``positions`` are i32 [N], ``position_table`` f32 [context, hidden]; positions must lie in it. A
    token outside the table gives a row of NaN. Raises DeviceError naming shapes that do not go together.
    """
    expect_array("embed", "tokens", tokens, ("i32",), (None,))
    count, cols = tokens.size, table.cols
    expect_array("embed", "out", out, ("f32",), (count, cols))
    at: Array | np.uint64 = np.uint64(0)
    learned: Array | np.uint64 = np.uint64(0)
    if position_table is not None:
        expect_array("embed", "position_table", position_table, ("f32",), (None, cols))
        expect("embed", positions is not None, "a table of positions needs the positions")
        assert positions is not None
        expect_array("embed", "positions", positions, ("i32",), (count,))
        at, learned = positions, position_table
    if count == 0:
        return
    if isinstance(table, QuantMatrix):
        grid = -(-count * units(cols) // _ITEMS)
        stride = np.int64(table.data.shape[1])
        args = (tokens, table.data, out, at, learned, count, table.rows, cols, stride, scale)
        ctx.launch("embed.cu", "ph_embed_tiles", grid, _THREADS, *args, macros=_macros(table.kind))
        return
    expect("embed", count <= _MOST_TOKENS, lambda: f"{count} tokens at once; the most is {_MOST_TOKENS}")
    where = (-(-cols // _THREADS), count, 1)
    dense = (tokens, table.data, out, at, learned, table.rows, cols, scale)
    ctx.launch("embed.cu", "ph_embed_rows", where, _THREADS, *dense, macros=_macros(table.data.dtype))
