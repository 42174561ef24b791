"""Projections of some rows, 2 to 64, from packed weights in float16: launches kernels/linear_some.cu."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from ....arch import Activation
from ..context import Context
from ..formats import FORMATS, TILE_ROWS, QuantMatrix, format_of, tiles, units
from ..memory import Array
from ..variants import Variant
from .checks import activation_macros, expect_product
from .some_shapes import TOKEN_TILES, WARPS, Shape, choose, scale_bytes, shape_for, shared_bytes

_SPILLS = 96
"""Bytes that ptxas may spill, as it does on some GPUs: values of a pass, which are stored and loaded once for each."""


@cache
def _macros(
    kind: str,
    token_tiles: int,
    shape: Shape,
    out: str,
    activation: Activation | None = None,
    gated: bool = False,
) -> Mapping[str, object]:
    return {
        **format_of(kind).macros(),
        "PH_TOKEN_TILES": token_tiles,
        "PH_TILES": shape.tiles,
        "PH_ROW_WARPS": shape.row_warps,
        "PH_STAGE_GROUPS": shape.groups,
        "PH_RING": shape.ring,
        "PH_CTAS": shape.blocks,
        "PH_SUMMED": scale_bytes(kind, token_tiles) or None,
        "PH_OUT_F32": out == "f32",
        **activation_macros(activation, gated),
    }


def _variant(
    kind: str,
    token_tiles: int,
    shape: Shape,
    out: str = "f32",
    activation: Activation | None = None,
    gated: bool = False,
) -> Variant:
    macros = _macros(kind, token_tiles, shape, out, activation, gated)
    return Variant("linear_some.cu", ("ph_linear_some",), macros, hot=True, spills=_SPILLS)


VARIANTS = (
    *(
        _variant(kind, token_tiles, shape_for(kind, own, token_tiles), out)
        for kind, out in (("Q4_K", "f32"), ("Q6_K", "f16"), ("Q8_0", "f16"))
        for token_tiles in TOKEN_TILES
        for own in (1, 2, 3, 4, 30)
    ),
    *(_variant("Q4_K", n, shape_for("Q4_K", own, n, units=16)) for n in TOKEN_TILES for own in (2, 7)),
    *(_variant(kind, token_tiles, shape_for(kind, 30, token_tiles)) for kind in FORMATS for token_tiles in (1, 2)),
    *(
        _variant(kind, token_tiles, shape_for(kind, 30, token_tiles, True), "f16", "silu", True)
        for kind in ("Q4_K", "Q6_K", "Q8_0")
        for token_tiles in TOKEN_TILES
    ),
    _variant("Q4_K", 8, shape_for("Q4_K", 30, 8, True), "f16", "gelu_tanh"),
)


def linear_some(
    ctx: Context,
    x: Array,
    w: QuantMatrix,
    out: Array,
    out_column: int = 0,
    *,
    bias: Array | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
    activation: Activation | None = None,
    gated: bool = False,
    shape: Shape | None = None,
) -> bool:
    """out[:, out_column:out_column + N] = scale · (x wᵀ + bias), added to what is there if ``accumulate``.

    ``x`` f16 [M, K], ``w`` [N, K], ``out`` [M, ≥ out_column + N] f16 or f32, ``bias`` f32 [N]. With an ``activation``:
    that of x wᵀ + bias or, where ``gated``, of the first half of its columns times the second half: N / 2 values.
    For few rows weights are multiplied as they are, for others they are rounded to float16 once, as if they had been
    unpacked. Any M, but W is read once for every 64 rows. Bit-equal from run to run. False, with nothing done, where a
    gate cannot be had: a half that ends inside a tile. Raises DeviceError naming shapes that do not go together.
    """
    op = "linear_some"
    own_rows = expect_product(op, x, w, out, out_column, bias, accumulate, scale, activation, gated)
    count = x.shape[0]
    if not count:
        return True
    if gated and own_rows % TILE_ROWS:
        return False
    device = ctx.device
    own = tiles(w.rows) / device.sms
    parts, token_tiles, best = choose(w.kind, own, count, device.shared_limit, gated, units(w.cols))
    shape = shape or best
    grid = min(device.sms * shape.blocks, tiles(own_rows))
    ctx.launch(
        "linear_some.cu",
        "ph_linear_some",
        (grid, parts, 1),
        32 * WARPS,
        w.data,
        x,
        Array(out.ptr + out_column * out.itemsize, out.shape, out.dtype),
        np.uint64(0) if bias is None else bias,
        count,
        w.rows,
        w.cols,
        np.int64(w.data.shape[1]),
        np.int64(out.shape[1]),
        scale,
        accumulate,
        shared=shared_bytes(w.kind, shape, token_tiles),
        macros=_macros(w.kind, token_tiles, shape, out.dtype, activation, gated),
        early=True,
    )
    return True
