"""Attention over the paged cache: launches kernels/attention_decode.cu and kernels/attention_prefill.cu.

Decode takes one token per sequence and splits its context over blocks; prefill takes chunks of any length, one row
included. Grids depend on shapes and on the bounds given, never on what device arrays hold, so both can be captured.

Prefill's result for a row is the same bits in any batch and with any chunking. Decode's is so for a fixed
``split_tokens``; by default the split follows from the batch and the bound on the context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ....arch import Attention
from ..context import Context
from ..memory import Array
from ..variants import Variant
from .checks import BYTES, HALVES, Scales, expect, expect_array, expect_cache

#: Rows of a prefill tile, and keys of a step.
TILE = 64
MAX_HEAD_DIM = 256
#: The most blocks that share a sequence's context; what the last of them adds up fits its shared memory.
MAX_SPLITS = 256

_THREADS = 128
_GROUP = 8  # query heads of a KV head that a decode block serves
_ROUND = 64  # keys that a decode block takes at a time
_COMBINED = 256 << 10  # bytes of partial results per KV head that the last block should have to add up
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


VARIANTS = tuple(
    Variant(file, (kernel,), _macros(*values), hot=True)
    for file, kernel in (
        ("attention_decode.cu", "ph_attend_decode"),
        ("attention_prefill.cu", "ph_attend_prefill"),
    )
    for values in (
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
    max_context: int | None = None,
    work: Array | None = None,
    split_tokens: int | None = None,
    scales: Scales | None = None,
) -> None:
    """Attention of one token per sequence, the last of its context, whose K and V are in the cache already.

    ``qkv`` is [N, q | k | v] in f16 or bf16, of which q is read, ``out`` [N, heads · head_dim] of the same type; caches
    and ``scales`` as store_kv. ``context_lens`` i32 [S], at most ``max_context`` each, which is by default what
    ``block_tables`` i32 [S, B] can reach. ``work`` i32 [R, 2] lists (sequence, row); without it row s is sequence s. A
    negative sequence is padding and skipped, an empty context gives zeros. ``scratch`` has scratch_bytes(…) bytes with
    any content. ``counters`` i32 [counters(…)] must be zero before the first launch, are zero after each, and belong to
    this kernel alone. Layers may share both, streams may not.
    Raises DeviceError for shapes that do not go together.
    """
    op = "attend_decode"
    _check(op, qkv, k_cache, v_cache, scales, out, context_lens, block_tables, spec)
    if work is None:
        rows = context_lens.size
        expect(op, qkv.shape[0] >= rows, f"{rows} sequences, but qkv is {qkv}: give the list of work")
    else:
        expect_array(op, "work", work, ("i32",), (None, 2))
        rows = work.shape[0]
    reach = block_tables.shape[1] * k_cache.shape[2]
    max_context = reach if max_context is None else max_context
    expect(op, 1 <= max_context <= reach, f"block tables reach {reach} tokens, max_context is {max_context}")
    if rows == 0:
        return
    tokens = split_tokens or choose_split(spec, rows, max_context, ctx.device.sms)
    splits = count_splits(spec, max_context, tokens)
    parts, group = _parts(spec)
    blocks = spec.kv_heads * parts
    expect(op, tokens % _ROUND == 0, f"split_tokens is {tokens}, expected a multiple of {_ROUND}")
    expect(op, splits <= MAX_SPLITS, f"{splits} splits of {tokens} tokens; at most {MAX_SPLITS} can be added up")
    needed = partial_bytes(spec, rows, max_context, tokens)
    expect(op, splits == 1 or scratch.nbytes >= needed, f"scratch is {scratch}, {needed:,} bytes are needed")
    expect_array(op, "counters", counters, ("i32",), (None,))
    expect(op, counters.size >= rows * blocks, f"counters are {counters}, {rows * blocks} are needed")
    scale, cap = _scores(spec)
    ctx.launch(
        "attention_decode.cu",
        "ph_attend_decode",
        (splits, blocks, rows),
        _THREADS,
        qkv,
        k_cache,
        v_cache,
        out,
        _NULL if work is None else work,
        context_lens,
        block_tables,
        scratch,
        counters,
        spec.heads,
        spec.kv_heads,
        group,
        block_tables.shape[1],
        tokens,
        spec.window or 0,
        scale,
        cap,
        *((_NULL, _NULL) if scales is None else scales),
        macros=_spec_macros(spec, qkv, k_cache),
    )


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
        macros=_spec_macros(spec, qkv, k_cache),
    )


def prefill_work(query_start: NDArray[np.int32], context_lens: NDArray[np.int32]) -> NDArray[np.int32]:
    """The tiles of a batch, int32 [T, 2]: (sequence, first row), those that see most first, for an even end."""
    tiles = [
        (int(length) - int(end) + min(first + TILE, int(end)), sequence, first)
        for sequence, (start, end, length) in enumerate(
            zip(query_start[:-1], query_start[1:], context_lens, strict=True)
        )
        for first in range(int(start), int(end), TILE)
    ]
    tiles.sort(key=lambda tile: (-tile[0], tile[1], tile[2]))
    return np.array([tile[1:] for tile in tiles], np.int32).reshape(-1, 2)


def choose_split(spec: Attention, rows: int, max_context: int, sms: int) -> int:
    """Tokens per decode block: two blocks for each of the device's ``sms`` where the context is long enough.

    Depends only on how large things may get, so that a captured launch fits every replay.
    """
    parts, _ = _parts(spec)
    wanted = -(-2 * sms // (rows * spec.kv_heads * parts))
    wanted = max(1, min(wanted, MAX_SPLITS // 2, max(16, _COMBINED // _partial_bytes(spec))))
    span = max_context if spec.window is None else min(max_context, spec.window)
    return max(1, -(-span // (wanted * _ROUND))) * _ROUND


def scratch_bytes(
    spec: Attention, max_rows: int, sms: int, *, max_context: int | None = None, split_tokens: int | None = None
) -> int:
    """Bytes that suffice for attend_decode with up to ``max_rows`` rows, whatever the context.

    Where ``split_tokens`` is fixed, the context needs a bound as well; DeviceError without one.
    """
    if split_tokens is not None and max_context is not None:
        return partial_bytes(spec, max_rows, max_context, split_tokens)
    expect("scratch_bytes", split_tokens is None, "split_tokens is given without max_context")
    # Rounding and the ends of a window add at most two to the splits of each row.
    return (2 * sms + 2 * counters(spec, max_rows)) * _partial_bytes(spec)


def partial_bytes(spec: Attention, rows: int, max_context: int, split_tokens: int) -> int:
    """Bytes of scratch that one attend_decode takes."""
    return counters(spec, rows) * count_splits(spec, max_context, split_tokens) * _partial_bytes(spec)


def count_splits(spec: Attention, max_context: int, split_tokens: int) -> int:
    """Into how many parts of ``split_tokens`` a context may fall; a window sees those that it touches."""
    splits = -(-max_context // split_tokens)
    return splits if spec.window is None else min(splits, -(-(spec.window - 1) // split_tokens) + 1)


def counters(spec: Attention, max_rows: int) -> int:
    """How many counters suffice for attend_decode with up to ``max_rows`` rows."""
    return max_rows * spec.kv_heads * _parts(spec)[0]


def prefill_shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory of the prefill kernel: keys, values, and above 128 components also queries."""
    padded = -(-head_dim // 16) * 16
    stride = padded if padded % 64 == 0 else padded + 8
    return (3 if padded > 128 else 2) * TILE * stride * 2


def _parts(spec: Attention) -> tuple[int, int]:
    """Blocks that share a KV head's query heads, and the most heads of one."""
    per_kv = spec.heads // spec.kv_heads
    parts = -(-per_kv // _GROUP)
    group = -(-per_kv // parts)
    return -(-per_kv // group), group


def _partial_bytes(spec: Attention) -> int:
    """Of one decode block: accumulator, maximum and sum of each head."""
    return 4 * _parts(spec)[1] * (-(-spec.head_dim // 4) * 4 + 4)


def _scores(spec: Attention) -> tuple[float, float]:
    """The kernels' scale and cap; they take exponentials in base 2."""
    scale = spec.scale if spec.scale is not None else 1.0 / math.sqrt(spec.head_dim)
    if spec.softcap is None:
        return scale * math.log2(math.e), 0.0
    return 2.0 * math.log2(math.e) * scale / spec.softcap, math.log2(math.e) * spec.softcap


def _spec_macros(spec: Attention, qkv: Array, k_cache: Array) -> Mapping[str, object]:
    windowed, capped = spec.window is not None, spec.softcap is not None
    return _macros(spec.head_dim, k_cache.shape[2], windowed, capped, qkv.dtype, k_cache.dtype)


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
    expect(op, dim % 2 == 0 and dim <= MAX_HEAD_DIM, f"head_dim is {dim}, expected an even number up to {MAX_HEAD_DIM}")
    expect_array(op, "qkv", qkv, HALVES, (None, spec.q_size + 2 * spec.kv_size))
    expect_array(op, "out", out, (qkv.dtype,), (qkv.shape[0], spec.q_size))
    expect_cache(op, k_cache, v_cache, scales, spec.kv_heads, dim)
    expect(op, k_cache.size // dim < 2**31, f"the cache {k_cache} has 2^31 rows or more")
    expect_array(op, "context_lens", context_lens, ("i32",), (None,))
    expect_array(op, "block_tables", block_tables, ("i32",), (context_lens.size, None))
    aligned = all(array.ptr % 16 == 0 for array in (qkv, k_cache, v_cache, out))
    expect(op, aligned, "qkv, caches and out must begin at multiples of 16 bytes")
