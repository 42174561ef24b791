"""RMSNorm and LayerNorm: launches kernels/norm.cu. Statistics are float32, of centred values where there is a mean."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from ....arch import LayerNorm, Norm
from ..context import Context
from ..memory import Array
from ..variants import Variant
from .checks import FLOATS, expect, expect_array

_NULL = np.uint64(0)
_MOST_THREADS = 1024
_MOST_ITEMS = {4: 8, 1: 16}  # loads of a thread by values of each, for which it has registers
#: The most values a row may have that allows loads of four, or of one.
MAX_SIZE = {vector: vector * items * _MOST_THREADS for vector, items in _MOST_ITEMS.items()}


@cache
def _macros(layer: bool, bias: bool, source: str, target: str, vector: int, items: int) -> Mapping[str, object]:
    return {
        "PH_LAYER_NORM": layer,
        "PH_BIAS": bias,
        "PH_ACT_BF16": "bf16" in (source, target),
        "PH_IN_F32": source == "f32",
        "PH_OUT_F32": target == "f32",
        "PH_VECTOR": vector,
        "PH_ITEMS": items,
    }


VARIANTS = tuple(
    Variant("norm.cu", ("ph_norm",), _macros(layer, layer, *types, vector, items), hot=items <= 4)
    for layer in (False, True)
    for vector, items in ((4, 1), (4, 2), (4, 4), (1, 1), *_MOST_ITEMS.items())
    for types in (("f32", "f16"), ("f32", "f32"), ("bf16", "bf16"))
)


def normalise(
    ctx: Context,
    x: Array,
    norm: Norm,
    weight: Array,
    bias: Array | None,
    out: Array,
    *,
    heads: int = 1,
    in_stride: int | None = None,
    out_stride: int | None = None,
) -> None:
    """out = norm(x) over each row, or over each of a row's ``heads`` by itself; ``out`` may be ``x``.

    ``x`` and ``out`` are [N, heads · size] in f32, f16 or bf16 (not f16 and bf16 together); ``weight`` and ``bias`` are
    f32 [size]. Rows begin ``in_stride`` and ``out_stride`` elements apart, by default heads · size: a range of columns
    of a wider matrix is an Array that begins at its first value. Raises DeviceError for shapes that do not go together.
    """
    size = weight.size
    columns = heads * size
    expect_array("normalise", "weight", weight, ("f32",), (None,))
    expect("normalise", size > 0 and heads > 0, lambda: f"{heads} heads of {size} values")
    expect_array("normalise", "x", x, FLOATS, (None, columns))
    expect_array("normalise", "out", out, FLOATS, x.shape)
    expect(
        "normalise", {x.dtype, out.dtype} != {"f16", "bf16"}, lambda: f"x is {x}, out {out}: f16 and bf16 do not mix"
    )
    if bias is not None:
        expect_array("normalise", "bias", bias, ("f32",), (size,))
    strides = (in_stride or columns, out_stride or columns)
    expect("normalise", min(strides) >= columns, lambda: f"rows of {columns} values cannot begin {min(strides)} apart")
    if x.shape[0] == 0:
        return
    aligned = all(array.ptr % (4 * array.itemsize) == 0 for array in (x, out, weight, bias) if array is not None)
    vector = 4 if aligned and all(n % 4 == 0 for n in (size, *strides)) else 1
    expect(
        "normalise", size <= MAX_SIZE[vector], lambda: f"a norm over {size} values; the kernel takes {MAX_SIZE[vector]}"
    )
    loads = -(-size // vector)
    # Enough threads that each has a load or two, in whole warps; the sums' order depends on the size only.
    threads = min(_MOST_THREADS, -(-loads // 32) * 32)
    needed = -(-loads // threads)
    items = next(n for n in (1, 2, 4, 8, 16) if n >= needed)
    ctx.launch(
        "norm.cu",
        "ph_norm",
        x.shape[0] * heads,
        threads,
        x,
        weight,
        _NULL if bias is None else bias,
        out,
        size,
        heads,
        np.int64(strides[0]),
        np.int64(strides[1]),
        norm.eps,
        macros=_macros(isinstance(norm, LayerNorm), bias is not None, x.dtype, out.dtype, vector, items),
        early=True,
    )
