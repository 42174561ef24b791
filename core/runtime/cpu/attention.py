"""Paged causal attention in NumPy: one sequence's prefill chunk, or many sequences' decodes at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...arch import Attention
from ..contract import Batch
from .kv_cache import KVCache

F32 = NDArray[np.float32]
SCRATCH = 16 << 20  # bytes that the scores of one tile may take


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a step's tokens lie: worked out once per step, the same for every layer.

    ``slots`` [N] are the cache slots that the tokens are written to. ``chunks`` are (first row, end row, context
    length, slots of the context) of the sequences with several rows; ``decode_rows`` [D], ``decode_lens`` [D] and
    ``decode_slots`` [D, longest] belong to those with one.
    """

    positions: NDArray[np.int32]
    slots: NDArray[np.intp]
    chunks: tuple[tuple[int, int, int, NDArray[np.intp] | slice], ...]
    decode_rows: NDArray[np.intp]
    decode_lens: NDArray[np.intp]
    decode_slots: NDArray[np.intp]


def lay_out(batch: Batch, block_size: int, by_row: bool = False) -> Layout:
    """The Layout of a batch. ``by_row``: every row by itself, so that its sums never depend on the batch's shape."""
    starts = batch.query_start
    sequence = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    blocks = batch.block_tables[sequence, batch.positions // block_size]
    slots = blocks.astype(np.intp) * block_size + batch.positions % block_size
    lengths = np.diff(starts)
    if by_row:
        chunks = tuple(
            (row, row + 1, int(at) + 1, _context_slots(batch.block_tables[sequence[row]], int(at) + 1, block_size))
            for row, at in enumerate(batch.positions)
        )
        none = np.empty(0, np.intp)
        return Layout(batch.positions, slots, chunks, none, none, none.reshape(0, 0))
    chunks = tuple(
        (int(starts[s]), int(starts[s + 1]), length, _context_slots(batch.block_tables[s], length, block_size))
        for s, length in ((s, int(batch.context_lens[s])) for s in np.flatnonzero(lengths > 1))
    )
    single = np.flatnonzero(lengths == 1)
    lens = batch.context_lens[single].astype(np.intp)
    longest = int(lens.max()) if len(lens) else 0
    at = np.arange(longest)
    # Beyond a sequence's end lie whatever blocks its padded table names: the scores there are masked.
    decode_slots = batch.block_tables[single][:, at // block_size].astype(np.intp) * block_size + at % block_size
    return Layout(batch.positions, slots, chunks, starts[single].astype(np.intp), lens, decode_slots)


def _context_slots(table: NDArray[np.int32], length: int, block_size: int) -> NDArray[np.intp] | slice:
    table = table[: -(-length // block_size)]
    if (np.diff(table) == 1).all():  # blocks in a row: the context is one slice and need not be copied
        start = int(table[0]) * block_size
        return slice(start, start + length)
    at = np.arange(length)
    return np.asarray(table[at // block_size].astype(np.intp) * block_size + at % block_size)


def attend(q: F32, cache: KVCache, layer: int, layout: Layout, spec: Attention, out: F32) -> None:
    """Attention of ``q`` [N, heads, head_dim] over the cache, into ``out`` of the same shape. Softmax in float32."""
    for first, end, length, slots in layout.chunks:
        k, v = cache.read(layer, slots)
        _attend_chunk(q[first:end], k, v, layout.positions[first:end], length, spec, out[first:end])
    if len(layout.decode_rows):
        _attend_decodes(q, cache, layer, layout, spec, out)


def _attend_chunk(q: F32, k: F32, v: F32, positions: NDArray[np.int32], length: int, spec: Attention, out: F32) -> None:
    tile = max(1, SCRATCH // (4 * spec.heads * length))
    for start in range(0, len(q), tile):
        rows = slice(start, min(start + tile, len(q)))
        # Keys after the tile's last query or before its first query's window are masked for all its rows.
        end = int(positions[rows][-1]) + 1
        begin = 0 if spec.window is None else max(0, int(positions[rows][0]) - spec.window + 1)
        at = positions[rows, None].astype(np.intp)
        keys = np.arange(begin, end)
        hidden = keys > at
        if spec.window is not None:
            hidden |= keys <= at - spec.window
        _mix(q[None, rows], k[None, begin:end], v[None, begin:end], hidden[None], spec, out[None, rows])


def _attend_decodes(q: F32, cache: KVCache, layer: int, layout: Layout, spec: Attention, out: F32) -> None:
    longest = layout.decode_slots.shape[1]
    tile = max(1, SCRATCH // (4 * longest * (spec.heads + 2 * spec.kv_size)))
    keys = np.arange(longest)
    for start in range(0, len(layout.decode_rows), tile):
        part = slice(start, start + tile)
        lens = layout.decode_lens[part, None]
        width = int(lens.max())
        hidden = keys[:width] >= lens
        if spec.window is not None:
            hidden |= keys[:width] < lens - spec.window
        k, v = cache.read(layer, layout.decode_slots[part, :width])
        rows = layout.decode_rows[part]
        mixed = np.empty((len(rows), 1, spec.heads, spec.head_dim), np.float32)
        _mix(q[rows, None], k, v, hidden[:, None], spec, mixed)
        out[rows] = mixed[:, 0]


def _mix(q: F32, k: F32, v: F32, hidden: NDArray[np.bool_], spec: Attention, out: F32) -> None:
    """q [S, n, heads, D], k and v [S, c, kv_heads, D], hidden [S, n, c] → out as q.

    The query heads of a KV head are rows of one product, so K and V are never repeated.
    """
    sequences, rows, _, dim = q.shape
    groups = spec.heads // spec.kv_heads
    scale = np.float32(spec.scale if spec.scale is not None else 1.0 / math.sqrt(dim))
    grouped = (q * scale).reshape(sequences, rows, spec.kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(sequences, spec.kv_heads, groups * rows, dim)
    scores = np.matmul(grouped, k.transpose(0, 2, 3, 1))
    if spec.softcap is not None:
        scores *= np.float32(1.0 / spec.softcap)
        np.tanh(scores, out=scores)
        scores *= np.float32(spec.softcap)
    by_row = scores.reshape(sequences, spec.kv_heads, groups, rows, -1)
    np.copyto(by_row, np.float32(-np.inf), where=hidden[:, None, None])
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed = np.matmul(scores, v.transpose(0, 2, 1, 3)).reshape(sequences, spec.kv_heads, groups, rows, dim)
    out[...] = mixed.transpose(0, 3, 1, 2, 4).reshape(sequences, rows, spec.heads, dim)


def scratch_bytes(spec: Attention, context: int) -> int:
    """Bytes beyond the workspace that attention takes for a moment: a tile of scores with K and V gathered."""
    one_decode = 4 * context * (spec.heads + 2 * spec.kv_size)
    return 2 * max(SCRATCH, one_decode) + 8 * context * spec.kv_size
