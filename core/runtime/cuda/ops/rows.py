"""The small steps between the big ones: launches kernels/rows.cu."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from ..context import Context
from ..memory import Array
from ..variants import Variant
from .checks import FLOATS, expect, expect_array

_THREADS = 256
_KERNELS = ("ph_gather", "ph_convert", "ph_add", "ph_finish")


@cache
def _macros(source: str, target: str, softcap: bool = False) -> Mapping[str, object]:
    return {
        "PH_ACT_BF16": "bf16" in (source, target),
        "PH_IN_F32": source == "f32",
        "PH_OUT_F32": target == "f32",
        "PH_SOFTCAP": softcap,
    }


VARIANTS = tuple(
    Variant("rows.cu", _KERNELS, _macros(*types), hot=True)
    for types in (("f32", "f32", True), ("f32", "f16"), ("f16", "f32"), ("bf16", "bf16"))
)


def _blocks(size: int) -> int:
    return -(-size // _THREADS)


def gather(ctx: Context, src: Array, rows: Array, out: Array) -> None:
    """out [M, size] = src [N, size] at ``rows`` i32 [M]; a negative row gives zeros. Any float types."""
    expect_array("gather", "src", src, FLOATS, (None, None))
    expect_array("gather", "rows", rows, ("i32",), (None,))
    expect_array("gather", "out", out, FLOATS, (rows.size, src.shape[1]))
    expect(
        "gather", {src.dtype, out.dtype} != {"f16", "bf16"}, lambda: f"src is {src}, out {out}: f16 and bf16 do not mix"
    )
    if out.size:
        grid = (rows.size, _blocks(src.shape[1]), 1)
        macros = _macros(src.dtype, out.dtype)
        ctx.launch("rows.cu", "ph_gather", grid, _THREADS, src, rows, out, src.shape[1], macros=macros, early=True)


def add(ctx: Context, src: Array, dst: Array, scale: float = 1.0) -> None:
    """dst += scale · src, of the same shape; f32, f16 or bf16 on either side."""
    expect_array("add", "dst", dst, FLOATS, dst.shape)
    expect_array("add", "src", src, FLOATS, dst.shape)
    expect(
        "add", {src.dtype, dst.dtype} != {"f16", "bf16"}, lambda: f"src is {src}, dst {dst}: f16 and bf16 do not mix"
    )
    if dst.size:
        macros = _macros(src.dtype, dst.dtype)
        ctx.launch(
            "rows.cu",
            "ph_add",
            _blocks(dst.size),
            _THREADS,
            src,
            dst,
            np.int64(dst.size),
            scale,
            macros=macros,
            early=True,
        )


def convert(ctx: Context, src: Array, dst: Array) -> None:
    """dst = src in another float type, rounded to nearest; the same shape."""
    expect_array("convert", "dst", dst, FLOATS, dst.shape)
    expect_array("convert", "src", src, FLOATS, dst.shape)
    expect(
        "convert",
        {src.dtype, dst.dtype} != {"f16", "bf16"},
        lambda: f"src is {src}, dst {dst}: f16 and bf16 do not mix",
    )
    if dst.size:
        macros = _macros(src.dtype, dst.dtype)
        ctx.launch(
            "rows.cu",
            "ph_convert",
            _blocks(dst.size),
            _THREADS,
            src,
            dst,
            np.int64(dst.size),
            macros=macros,
            early=True,
        )


def finish(ctx: Context, logits: Array, scale: float, softcap: float | None) -> None:
    """In place on f32 logits: · scale, then softcap · tanh(x / softcap)."""
    expect_array("finish", "logits", logits, ("f32",), logits.shape)
    if logits.size:
        macros = _macros("f32", "f32", softcap is not None)
        cap = 1.0 if softcap is None else softcap
        size = np.int64(logits.size)
        ctx.launch(
            "rows.cu", "ph_finish", _blocks(logits.size), _THREADS, logits, size, scale, cap, macros=macros, early=True
        )
