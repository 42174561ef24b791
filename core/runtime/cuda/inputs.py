"""Inputs: a step's integers on the device, uploaded together from page-locked memory to places that never move.

A captured graph keeps reading the same addresses, so what changes from step to step changes there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..contract import Batch
from .context import Context
from .memory import Array, HostBuffer, Pool
from .ops.attention import TILE, prefill_work


@dataclass(frozen=True, slots=True)
class View:
    """The arrays of one step, int32. ``tiles`` [T, 2] lists (sequence, first row) for the prefill attention.

    The first ``singles`` sequences have one token each and no tiles: they are for the decode attention, whose row and
    sequence have one number.
    """

    tokens: Array
    positions: Array
    sequences: Array
    query_start: Array
    context_lens: Array
    logit_rows: Array
    block_tables: Array
    tiles: Array
    count: int
    rows: int
    sequences_count: int
    singles: int
    decode: bool


class Inputs:
    """Room for the largest step a plan allows. ``load`` fills it; the copies run in stream order."""

    def __init__(
        self,
        ctx: Context,
        pool: Pool,
        max_tokens: int,
        max_batch: int,
        max_rows: int,
        max_blocks: int,
        *,
        tile_singles: bool,
    ) -> None:
        """``tile_singles``: sequences of one token get tiles too, for the attention of prefill to serve them all."""
        self._ctx = ctx
        self._tile_singles = tile_singles
        self._views: dict[tuple[int, int, int, int, int, int, bool], View] = {}
        tiles = max_tokens // TILE + max_batch + 1
        sizes = {
            "tokens": max_tokens,
            "positions": max_tokens,
            "sequences": max_tokens,
            "query_start": max_batch + 1,
            "context_lens": max_batch,
            "logit_rows": max_rows,
            "tiles": 2 * tiles,
        }
        self._offsets: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self._offsets[name] = end
            end += -(-size // 64) * 64
        self._small = pool.array(end, "i32", zero=True)
        self._tables = pool.array(max_batch * max_blocks, "i32", zero=True)
        # Two of each: the copies of the step before may still be under way.
        self._ring = [
            tuple(HostBuffer(ctx.device, 4 * size).array(np.int32, size) for size in (end, max_batch * max_blocks))
            for _ in range(2)
        ]
        self._host, self._host_tables = self._ring[0]

    def load(self, batch: Batch, decode: bool, bucket: int, width: int, spare_block: int) -> View:
        """Uploads a batch. A step that is all ``decode`` is filled up to ``bucket`` sequences with ones that write to
        ``spare_block``; ``width`` is the number of blocks per table row.
        """
        self._ring.reverse()
        self._host, self._host_tables = self._ring[0]
        count, sequences = len(batch.tokens), len(batch.context_lens)
        padded = bucket if decode else sequences
        rows = padded if decode else len(batch.logit_rows)
        total = padded if decode else count
        self._put("tokens", batch.tokens, total, 0)
        self._put("positions", batch.positions, total, 0)
        lengths = np.diff(batch.query_start)
        self._put("sequences", np.repeat(np.arange(sequences, dtype=np.int32), lengths), total, None)
        starts = np.arange(padded + 1, dtype=np.int32) if decode else batch.query_start
        self._put("query_start", starts, padded + 1, 0)
        self._put("context_lens", batch.context_lens, padded, 1)
        self._put("logit_rows", np.arange(rows, dtype=np.int32) if decode else batch.logit_rows, rows, 0)
        lens = np.concatenate([batch.context_lens, np.ones(padded - sequences, np.int32)])
        singles = 0 if self._tile_singles else leading_singles(starts)
        tiles = prefill_work(starts, lens, singles)
        self._put("tiles", tiles.reshape(-1), tiles.size, 0)
        table = self._host_tables[: padded * width].reshape(padded, width)
        table[...] = spare_block
        used = min(width, batch.block_tables.shape[1])
        table[:sequences, :used] = batch.block_tables[:, :used]
        device = self._ctx.device
        view = self._view(total, padded, rows, width, len(tiles), singles, decode)
        device.copy_in(self._small, self._host)
        device.copy_in(view.block_tables, table)
        return view

    def _view(self, total: int, padded: int, rows: int, width: int, tiles: int, singles: int, decode: bool) -> View:
        key = (total, padded, rows, width, tiles, singles, decode)
        if decode and key in self._views:  # making a view costs more than launching its graph
            return self._views[key]
        view = View(
            tokens=self._at("tokens", total),
            positions=self._at("positions", total),
            sequences=self._at("sequences", total),
            query_start=self._at("query_start", padded + 1),
            context_lens=self._at("context_lens", padded),
            logit_rows=self._at("logit_rows", rows),
            block_tables=self._tables.view("i32", padded, width),
            tiles=self._at("tiles", tiles, 2),
            count=total,
            rows=rows,
            sequences_count=padded,
            singles=singles,
            decode=decode,
        )
        if decode:
            self._views[key] = view
        return view

    def _put(self, name: str, values: NDArray[np.int32], size: int, fill: int | None) -> None:
        start = self._offsets[name]
        self._host[start : start + len(values)] = values
        if size > len(values):
            rest = slice(start + len(values), start + size)
            self._host[rest] = np.arange(len(values), size) if fill is None else fill

    def _at(self, name: str, *shape: int) -> Array:
        return self._small.at(4 * self._offsets[name], "i32", *shape)


def leading_singles(query_start: NDArray[np.int32]) -> int:
    """How many sequences have one token each before the first that has another number; the engine's decodes lead."""
    longer = np.flatnonzero(np.diff(query_start) != 1)
    return int(longer[0]) if len(longer) else len(query_start) - 1
