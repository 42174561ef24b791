"""Attention over the paged cache: launches kernels/attention_decode.cu and kernels/attention_prefill.cu.

Decode takes the rows of one token per sequence as the projection left them, through norms, rotation and cache, and
splits contexts over blocks as attention_plan.py says; prefill takes chunks of any length, one row included, which
store_kv has seen to. Grids depend on shapes and on bounds, never on what device arrays hold, so both can be captured.

Prefill's result for a row is the same bits in any batch and with any chunking, and decode's is so in any batch for a
fixed plan; by default the plan follows from the number of sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ....arch import Attention
from ..context import Context
from ..memory import Array
from ..variants import Variant
from . import attention_plan
from .attention_plan import DecodePlan, choose_plan, decode_shared_bytes
from .attention_plan import counters as counters
from .attention_plan import scratch_bytes as scratch_bytes
from .checks import BYTES, HALVES, Scales, expect, expect_array, expect_cache
from .heads import HeadNorm, Turn, head_eps, head_kinds, head_macros, head_vectors

#: Rows of a prefill tile, and keys of a step.
TILE = 64
MAX_HEAD_DIM = 256

_THREADS = 128
_NULL = np.uint64(0)


@cache
def _macros(
    head_dim: int, block_size: int, window: bool, softcap: bool, dtype: str, kv_dtype: str
) -> Mapping[str, object]:
    fp8 = kv_dtype == BYTES  # which tensor cores get as the activations' type
    return {
        "PH_HEAD_DIM": head_dim,
        "PH_BLOCK_SIZE": block_size,
        "PH_WINDOW": window,
        "PH_SOFTCAP": softcap,
        "PH_ACT_BF16": dtype == "bf16",
        "PH_KV_BF16": (dtype if fp8 else kv_dtype) == "bf16",
        "PH_KV_FP8": fp8,
    }


@cache
def _decode_macros(
    dim: int, block: int, window: bool, softcap: bool, dtype: str, kv_dtype: str,
    heads: tuple[int, bool, int, int], shape: tuple[int, int],
) -> Mapping[str, object]:  # fmt: skip
    more = {"PH_WARPS": shape[0], "PH_STAGES": shape[1], **head_macros(*heads)}
    return {**_macros(dim, block, window, softcap, dtype, kv_dtype), **more}


#: head_dim, block_size, window, softcap, dtype, kv_dtype
_KINDS = (
    (64, 16, False, False, "f16", "f16"),
    (80, 16, False, False, "f16", "f16"),
    (96, 16, False, False, "f16", "f16"),
    (128, 16, False, False, "f16", "f16"),
    (128, 16, True, True, "bf16", "bf16"),
    (256, 16, True, True, "f16", "f16"),
    (256, 16, False, False, "bf16", "f16"),
    (10, 3, True, False, "f16", "bf16"),
    (2, 1, False, True, "f16", "f16"),
    (64, 16, False, False, "f16", BYTES),
    (80, 16, False, False, "f16", BYTES),
    (96, 16, False, False, "f16", BYTES),
    (128, 16, False, False, "f16", BYTES),
    (128, 16, True, True, "bf16", BYTES),
    (256, 16, True, True, "f16", BYTES),
    (256, 16, False, False, "bf16", BYTES),
    (40, 3, False, False, "f16", BYTES),
    (10, 3, True, False, "f16", BYTES),
)
#: Pairs that turn, interleaved, norms of q and k: all pairs; none; halves with RMSNorms; a part with LayerNorms.
_HEADS = {128: (64, True, 0, 0), 64: (0, False, 0, 0), 256: (128, False, 1, 1), 80: (16, False, 2, 2)}

VARIANTS = (
    *(Variant("attention_prefill.cu", ("ph_attend_prefill",), _macros(*kind), hot=True) for kind in _KINDS),
    *(
        Variant(
            "attention_decode.cu",
            ("ph_attend_decode",),
            _decode_macros(*kind, _HEADS.get(kind[0], (1, True, 0, 1)), shape),
            hot=True,
        )
        for kind in _KINDS
        for shape in ((8, 2), (4, 2), *(((12, 2),) if kind[0] <= 128 else ()))
    ),
    Variant(
        "attention_decode.cu",
        ("ph_attend_decode",),
        _decode_macros(128, 16, False, False, "f16", "f16", (64, False, 1, 1), (8, 2)),
        hot=True,
    ),
    Variant(
        "attention_decode.cu",
        ("ph_attend_decode",),
        _decode_macros(256, 16, False, False, "f16", "f16", (32, True, 0, 0), (2, 2)),
    ),
)


def attend_decode(
    ctx: Context,
    qkv: Array,
    k_cache: Array,
    v_cache: Array,
    out: Array,
    context_lens: Array,
    block_tables: Array,
    spec: Attention,
    scratch: Array,
    counters: Array,
    *,
    turn: Turn | None,
    norms: Sequence[HeadNorm | None],
    positions: Array,
    scales: Scales | None = None,
    early: bool = True,
    fixed_split: bool = False,
    plan: DecodePlan | None = None,
) -> None:
    """All of attention for one token per sequence, the last of its context: row s belongs to sequence s.

    ``qkv`` [S, q | k | v] in f16 or bf16 is as the projection left it, and stays so; ``out`` [S, heads · head_dim] is
    of the same type. k and v go to the caches exactly as store_kv would put them there; ``turn``, ``norms`` and
    ``scales`` are as it takes them. ``context_lens`` i32 [S] are what ``block_tables`` i32 [S, B] can reach at most,
    ``positions`` i32 [S] one less each; where a length is 0 or a position negative, the row is padding and gets zeros.
    ``scratch`` has scratch_bytes(…) bytes with any content. ``counters`` i32 [counters(…)] must be zero before the
    first launch, are zero after each, and belong to this kernel alone. Layers may share both, streams may not.

    ``fixed_split``: a row's result is the same bits in any batch and whatever the width of ``block_tables``. ``early``
    asks for a step that begins with a kernel launched plainly, and for context_lens, positions and block_tables that no
    kernel of the step writes: older keys are fetched before the kernel waits for the projection. ``plan`` is by default
    what choose_plan says. Raises DeviceError for shapes that do not go together.
    """
    op = "attend_decode"
    _check(op, qkv, k_cache, v_cache, scales, out, context_lens, block_tables, spec)
    rows, reach = context_lens.size, block_tables.shape[1] * k_cache.shape[2]
    expect(op, qkv.shape[0] == rows, lambda: f"{rows} sequences, but qkv is {qkv}: one row for each is expected")
    expect_array(op, "positions", positions, ("i32",), (rows,))
    vectors = head_vectors(op, spec, turn, norms)
    if rows == 0 or reach == 0:
        return
    device, value_bytes = ctx.device, 1 if scales else 2
    if plan is None:
        plan = choose_plan(spec, rows, device.sms, device.shared_limit, value_bytes, fixed=fixed_split)
    parts, group = attention_plan.parts(spec)
    blocks, splits = spec.kv_heads * parts, plan.splits(spec, reach)
    expect(op, plan.least >= 16 and splits <= attention_plan.MAX_SPLITS, lambda: f"{plan} cannot be added up")
    needed = rows * blocks * splits * attention_plan.partial_bytes(spec)
    expect(op, splits == 1 or scratch.nbytes >= needed, lambda: f"scratch is {scratch}, {needed:,} bytes are needed")
    expect(op, scratch.ptr % 16 == 0, "scratch must begin at a multiple of 16 bytes")
    expect_array(op, "counters", counters, ("i32",), (None,))
    expect(op, counters.size >= rows * blocks, lambda: f"counters are {counters}, {rows * blocks} are needed")
    windowed, capped = spec.window is not None, spec.softcap is not None
    ctx.launch(
        "attention_decode.cu",
        "ph_attend_decode",
        (blocks, rows, splits),
        32 * plan.warps,
        qkv,
        k_cache,
        v_cache,
        out,
        positions,
        context_lens,
        block_tables,
        scratch,
        counters,
        *vectors,
        *((_NULL, _NULL) if scales is None else scales),
        spec.heads,
        spec.kv_heads,
        group,
        block_tables.shape[1],
        plan.single,
        plan.least,
        plan.most,
        spec.window or 0,
        *_scores(spec),
        *head_eps(spec),
        shared=decode_shared_bytes(spec.head_dim, value_bytes, plan.warps, plan.stages),
        macros=_decode_macros(
            spec.head_dim, k_cache.shape[2], windowed, capped, qkv.dtype, k_cache.dtype,
            head_kinds(spec), (plan.warps, plan.stages),
        ),
        early=early,
    )  # fmt: skip


def attend_prefill(
    ctx: Context,
    qkv: Array,
    k_cache: Array,
    v_cache: Array,
    out: Array,
    query_start: Array,
    context_lens: Array,
    block_tables: Array,
    work: Array,
    spec: Attention,
    *,
    scales: Scales | None = None,
) -> None:
    """Causal attention of chunks, each the last rows of its sequence's context, whose K and V are in the cache already.

    Arrays as attend_decode. ``query_start`` is i32 [S + 1]: sequence s owns rows query_start[s]:query_start[s+1].
    ``work`` i32 [T, 2] is what prefill_work lists, uploaded; a negative sequence is padding. Rows that are not in
    ``work`` are left alone. Raises DeviceError for shapes that do not go together.
    """
    op = "attend_prefill"
    _check(op, qkv, k_cache, v_cache, scales, out, context_lens, block_tables, spec)
    expect_array(op, "work", work, ("i32",), (None, 2))
    expect_array(op, "query_start", query_start, ("i32",), (context_lens.size + 1,))
    if work.shape[0] == 0:
        return
    scale, cap = _scores(spec)
    ctx.launch(
        "attention_prefill.cu",
        "ph_attend_prefill",
        (spec.heads, work.shape[0], 1),
        _THREADS,
        qkv,
        k_cache,
        v_cache,
        out,
        work,
        query_start,
        context_lens,
        block_tables,
        spec.heads,
        spec.kv_heads,
        block_tables.shape[1],
        spec.window or 0,
        scale,
        cap,
        *((_NULL, _NULL) if scales is None else scales),
        shared=prefill_shared_bytes(spec.head_dim),
        macros=_macros(
            spec.head_dim, k_cache.shape[2], spec.window is not None, spec.softcap is not None, qkv.dtype, k_cache.dtype
        ),
    )


def prefill_work(
    query_start: NDArray[np.int32], context_lens: NDArray[np.int32], first_sequence: int = 0
) -> NDArray[np.int32]:
    """The tiles of a batch, int32 [T, 2]: (sequence, first row), those that see most first, for an even end.

    Sequences before ``first_sequence`` get none.
    """
    s = first_sequence
    tiles = [
        (int(length) - int(end) + min(first + TILE, int(end)), sequence, first)
        for sequence, (start, end, length) in enumerate(
            zip(query_start[s:-1], query_start[s + 1 :], context_lens[s:], strict=True), s
        )
        for first in range(int(start), int(end), TILE)
    ]
    tiles.sort(key=lambda tile: (-tile[0], tile[1], tile[2]))
    return np.array([tile[1:] for tile in tiles], np.int32).reshape(-1, 2)


def prefill_shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory of the prefill kernel: keys, values, and above 128 components also queries."""
    padded = -(-head_dim // 16) * 16
    stride = padded if padded % 64 == 0 else padded + 8
    return (3 if padded > 128 else 2) * TILE * stride * 2


def _scores(spec: Attention) -> tuple[float, float]:
    """The kernels' scale and cap; they take exponentials in base 2."""
    scale = spec.scale if spec.scale is not None else 1.0 / math.sqrt(spec.head_dim)
    if spec.softcap is None:
        return scale * math.log2(math.e), 0.0
    return 2.0 * math.log2(math.e) * scale / spec.softcap, math.log2(math.e) * spec.softcap


def _check(
    op: str,
    qkv: Array,
    k_cache: Array,
    v_cache: Array,
    scales: Scales | None,
    out: Array,
    context_lens: Array,
    block_tables: Array,
    spec: Attention,
) -> None:
    dim = spec.head_dim
    expect(
        op,
        dim % 2 == 0 and dim <= MAX_HEAD_DIM,
        lambda: f"head_dim is {dim}, expected an even number up to {MAX_HEAD_DIM}",
    )
    expect_array(op, "qkv", qkv, HALVES, (None, spec.q_size + 2 * spec.kv_size))
    expect_array(op, "out", out, (qkv.dtype,), (qkv.shape[0], spec.q_size))
    expect_cache(op, k_cache, v_cache, scales, spec.kv_heads, dim)
    expect(op, k_cache.size // dim < 2**31, lambda: f"the cache {k_cache} has 2^31 rows or more")
    expect_array(op, "context_lens", context_lens, ("i32",), (None,))
    expect_array(op, "block_tables", block_tables, ("i32",), (context_lens.size, None))
    aligned = all(array.ptr % 16 == 0 for array in (qkv, k_cache, v_cache, out))
    expect(op, aligned, "qkv, caches and out must begin at multiples of 16 bytes")
