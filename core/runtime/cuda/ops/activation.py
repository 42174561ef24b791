"""Activations, gated or not: launches kernels/activation.cu. Arithmetic is float32."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ....arch import ACTIVATIONS, Activation
from ..context import Context
from ..memory import Array
from ..variants import Variant
from .checks import HALVES, expect, expect_array

_THREADS = 256


@cache
def _macros(kind: str, gated: bool, dtype: str, vector: int) -> Mapping[str, object]:
    return {
        f"PH_{kind.upper()}": True,
        "PH_GATED": gated,
        "PH_ACT_BF16": dtype == "bf16",
        "PH_VECTOR": vector,
    }


VARIANTS = tuple(
    Variant("activation.cu", ("ph_activate",), _macros(kind, gated, dtype, vector), hot=True)
    for kind in ACTIVATIONS
    for gated, dtype, vector in ((True, "f16", 8), (False, "bf16", 1))
)


def activate(ctx: Context, src: Array, out: Array, kind: Activation, gated: bool) -> None:
    """out = act(src), or where gated act(first half of a row of src) · second half.

    ``out`` is [N, size], ``src`` [N, size] or [N, 2 · size], both f16 or both bf16. ``out`` may be ``src`` where not
    gated. Raises DeviceError for shapes that do not go together.
    """
    expect("activate", kind in ACTIVATIONS, lambda: f"{kind!r} is none of {', '.join(ACTIVATIONS)}")
    expect_array("activate", "out", out, HALVES, (None, None))
    rows, size = out.shape
    expect_array("activate", "src", src, (out.dtype,), (rows, 2 * size if gated else size))
    if rows == 0 or size == 0:
        return
    vector = 8 if size % 8 == 0 and src.ptr % 16 == 0 and out.ptr % 16 == 0 else 1
    grid = (rows, -(-size // (vector * _THREADS)), 1)
    macros = _macros(kind, gated, out.dtype, vector)
    ctx.launch("activation.cu", "ph_activate", grid, _THREADS, src, out, size, macros=macros, early=True)
