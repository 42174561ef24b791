"""ScheduledStep: what one step computes, as plain lists in the layout that a runtime's batch has.

A copy of the requests' state at the time of scheduling, so an abort meanwhile changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """``length`` tokens of a request, from position ``start``. ``samples``: it ends with the request's last token."""

    request: Request
    start: int
    length: int
    samples: bool


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """N tokens of S chunks; decodes come first, then prefill, each in order of arrival. May be empty.

    ``tokens`` and ``positions`` have N entries, chunk after chunk; chunk s owns ``query_start[s]:query_start[s + 1]``
    (S + 1 entries) and its request has ``context_lens[s]`` tokens in the cache after the step. ``block_tables`` are S
    rows of equal length, padded with 0. ``logit_rows`` are the M rows to sample from, for the M requests ``sampled``.
    """

    chunks: tuple[Chunk, ...]
    tokens: list[int]
    positions: list[int]
    query_start: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logit_rows: list[int]
    sampled: tuple[Request, ...]

    @classmethod
    def of(cls, pieces: Sequence[tuple[Request, int]]) -> ScheduledStep:
        """The step that computes the next n uncached tokens of each request, for pairs (request, n)."""
        chunks: list[Chunk] = []
        tokens: list[int] = []
        positions: list[int] = []
        query_start = [0]
        context_lens: list[int] = []
        logit_rows: list[int] = []
        sampled: list[Request] = []
        width = max((len(request.block_table) for request, _ in pieces), default=0)
        block_tables: list[list[int]] = []
        for request, length in pieces:
            start = request.num_cached_tokens
            end = start + length
            samples = end == request.num_tokens
            chunks.append(Chunk(request, start, length, samples))
            tokens += request.tokens(start, end)
            positions += range(start, end)
            query_start.append(len(tokens))
            context_lens.append(end)
            block_tables.append(request.block_table + [0] * (width - len(request.block_table)))
            if samples:
                logit_rows.append(len(tokens) - 1)
                sampled.append(request)
        return cls(
            chunks=tuple(chunks),
            tokens=tokens,
            positions=positions,
            query_start=query_start,
            context_lens=context_lens,
            block_tables=block_tables,
            logit_rows=logit_rows,
            sampled=tuple(sampled),
        )
