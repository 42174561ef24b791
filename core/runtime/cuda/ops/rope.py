"""The way of q, k and v into attention: norms of heads, rotation, paged cache. Launches kernels/rope.cu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from ....arch import Attention
from ..context import Context
from ..memory import Array
from ..variants import Variant
from .checks import BYTES, HALVES, Scales, expect, expect_array, expect_cache
from .heads import HeadNorm as HeadNorm
from .heads import Turn as Turn
from .heads import head_eps, head_kinds, head_macros, head_vectors

_WARPS = 4
_NULL = np.uint64(0)


@cache
def _macros(
    head_dim: int, block_size: int, pairs: int, interleaved: bool, q_norm: int, k_norm: int, dtype: str, kv_dtype: str
) -> Mapping[str, object]:
    return {
        "PH_HEAD_DIM": head_dim,
        "PH_BLOCK_SIZE": block_size,
        **head_macros(pairs, interleaved, q_norm, k_norm),
        "PH_ACT_BF16": dtype == "bf16",
        "PH_KV_BF16": kv_dtype == "bf16",
        "PH_KV_FP8": kv_dtype == BYTES,
    }


VARIANTS = tuple(
    Variant("rope.cu", ("ph_store_kv",), _macros(*values), hot=True)
    for values in (
        (64, 16, 32, True, 0, 0, "f16", "f16"),
        (64, 16, 0, False, 0, 0, "f16", "f16"),
        (128, 16, 64, True, 0, 0, "f16", "f16"),
        (128, 16, 64, False, 1, 1, "bf16", "bf16"),
        (256, 16, 128, False, 1, 1, "f16", "f16"),
        (80, 16, 16, False, 2, 2, "f16", "f16"),
        (10, 3, 3, False, 0, 1, "bf16", "f16"),
        (6, 1, 2, True, 2, 0, "f16", "bf16"),
        (64, 16, 32, True, 0, 0, "f16", BYTES),
        (128, 16, 64, False, 1, 1, "bf16", BYTES),
    )
)


def store_kv(
    ctx: Context,
    qkv: Array,
    spec: Attention,
    turn: Turn | None,
    norms: Sequence[HeadNorm | None],
    positions: Array,
    sequences: Array,
    block_tables: Array,
    k_cache: Array,
    v_cache: Array,
    scales: Scales | None = None,
) -> None:
    """In place on ``qkv`` [N, q | k | v]: norms of heads, rotation of q and k; then k and v into the caches.

    ``qkv`` is f16 or bf16, ``k_cache`` and ``v_cache`` are f16 or bf16 [blocks, kv_heads, block_size, head_dim] and get
    the float32 values rounded once; or u8, which get e4m3 codes, and ``scales`` what they are multiples of: the largest
    component of a head becomes 448. ``positions`` and ``sequences`` are i32 [N], ``block_tables`` i32 [S, B]; a row
    with a negative position is padding and left alone. ``turn`` and ``norms``, those of q and of k, must agree with
    ``spec`` on what there is. Raises DeviceError for shapes that do not go together.
    """
    op = "store_kv"
    dim, rows = spec.head_dim, qkv.shape[0]
    total_heads = spec.heads + 2 * spec.kv_heads
    expect(op, dim % 2 == 0 and dim <= 256, lambda: f"head_dim is {dim}, expected an even number up to 256")
    expect_array(op, "qkv", qkv, HALVES, (None, total_heads * dim))
    expect_cache(op, k_cache, v_cache, scales, spec.kv_heads, dim)
    expect_array(op, "positions", positions, ("i32",), (rows,))
    expect_array(op, "sequences", sequences, ("i32",), (rows,))
    expect_array(op, "block_tables", block_tables, ("i32",), (None, None))
    vectors = head_vectors(op, spec, turn, norms)
    if rows == 0:
        return
    ctx.launch(
        "rope.cu",
        "ph_store_kv",
        (rows, -(-total_heads // _WARPS), 1),
        32 * _WARPS,
        qkv,
        k_cache,
        v_cache,
        positions,
        sequences,
        block_tables,
        *vectors,
        spec.heads,
        spec.kv_heads,
        block_tables.shape[1],
        *head_eps(spec),
        *((_NULL, _NULL) if scales is None else scales),
        macros=_macros(dim, k_cache.shape[2], *head_kinds(spec), qkv.dtype, k_cache.dtype),
        early=True,
    )
