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


@dataclass(slots=True)  # not frozen: that would make one five times as slow to build
class ScheduledStep:
    """N tokens of the S ``requests``; the first ``decodes`` of them decode one token each, the others take in chunks of
    their prompts, and both are in the order of their ranks. May be empty.

    ``tokens`` and ``positions`` have N entries, request after request; number s owns ``query_start[s]:query_start[s +
    1]`` (S + 1 entries) and has ``context_lens[s]`` tokens in the cache after the step. ``block_tables`` are the S
    requests' own lists, of any lengths; they do not change before the next step is scheduled. ``logit_rows`` are the M
    rows to sample from, for the M requests ``sampled``.
    """

    requests: tuple[Request, ...]
    decodes: int
    tokens: list[int]
    positions: list[int]
    query_start: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logit_rows: list[int]
    sampled: tuple[Request, ...]

    @classmethod
    def of(cls, decoding: Sequence[Request], pieces: Sequence[tuple[Request, int]] = ()) -> ScheduledStep:
        """The step that decodes a token for each of the first, and computes the next n uncached tokens of each request
        of the pairs (request, n).
        """
        # This runs for every token of every sequence: one pass of a comprehension for each list is the fastest way.
        count = len(decoding)
        tokens = [request.output_ids[-1] for request in decoding]
        positions = [request.num_cached_tokens for request in decoding]
        context_lens = [position + 1 for position in positions]
        block_tables = [request.block_table for request in decoding]
        query_start = list(range(count + 1))
        logit_rows = list(range(count))
        if not pieces:
            requests = sampled = tuple(decoding)
        else:
            requests = (*decoding, *(request for request, _ in pieces))
            ending = [*decoding]
            for request, length in pieces:
                start = request.num_cached_tokens
                end = start + length
                tokens += request.tokens(start, end)
                positions += range(start, end)
                query_start.append(len(tokens))
                context_lens.append(end)
                block_tables.append(request.block_table)
                if end == request.num_tokens:
                    logit_rows.append(len(tokens) - 1)
                    ending.append(request)
            sampled = tuple(ending)
        return cls(requests, count, tokens, positions, query_start, context_lens, block_tables, logit_rows, sampled)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What it computes of each request."""
        ends = set(self.logit_rows)
        found = []
        for s, request in enumerate(self.requests):
            length = self.query_start[s + 1] - self.query_start[s]
            samples = self.query_start[s + 1] - 1 in ends
            found.append(Chunk(request, self.context_lens[s] - length, length, samples))
        return tuple(found)
