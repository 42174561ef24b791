"""ScheduledStep: what one step computes, as plain lists in the layout that a runtime's batch has.

A copy of the requests' state at the time of scheduling, so an abort meanwhile changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .request import Request

Draft = tuple[Request, tuple[int, ...]]
"""A request that decodes, and guesses at what follows its last token."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """``length`` tokens of a request, from position ``start``. ``samples``: its next token is chosen."""

    request: Request
    start: int
    length: int
    samples: bool


@dataclass(slots=True)  # not frozen: that would make one five times as slow to build
class ScheduledStep:
    """N tokens of the S ``requests``; the first ``decodes`` of them decode one token each, those of ``drafts`` decode
    one and check guesses at the tokens after it, the others take in chunks of their prompts, each in the order of their
    ranks. May be empty.

    ``tokens`` and ``positions`` have N entries, request after request; number s owns ``query_start[s]:query_start[s +
    1]`` (S + 1 entries) and has ``context_lens[s]`` tokens in the cache after the step. ``block_tables`` are the S
    requests' own lists, of any lengths; they do not change before the next step is scheduled.

    ``logit_rows`` are the rows whose logits are wanted: first one for each of ``sampled``, which gives its next token;
    then, draft after draft, one for each guess, which gives the token after it if it is right; then one for each of
    ``scored``, (request, position) of a token of a prompt whose log-probability is wanted.
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
    drafts: tuple[Draft, ...] = ()
    scored: tuple[tuple[Request, int], ...] = ()

    @classmethod
    def of(
        cls,
        decoding: Sequence[Request],
        pieces: Sequence[tuple[Request, int]] = (),
        drafts: Sequence[Draft] = (),
    ) -> ScheduledStep:
        """The step that decodes a token for each of the first, and computes the next n uncached tokens of each request
        of the pairs (request, n). Requests with a draft are not among the first.
        """
        # This runs for every token of every sequence: one pass of a comprehension for each list is the fastest way.
        count = len(decoding)
        tokens = [request.output_ids[-1] for request in decoding]
        positions = [request.num_cached_tokens for request in decoding]
        context_lens = [position + 1 for position in positions]
        block_tables = [request.block_table for request in decoding]
        query_start = list(range(count + 1))
        logit_rows = list(range(count))
        if not pieces and not drafts:
            only = tuple(decoding)
            return cls(only, count, tokens, positions, query_start, context_lens, block_tables, logit_rows, only)
        sampled = [*decoding]
        checks: list[int] = []
        scores: list[int] = []
        scored: list[tuple[Request, int]] = []

        def add(request: Request, these: Sequence[int]) -> int:
            """Lays out the next tokens of a request; their first row."""
            first, start = len(tokens), request.num_cached_tokens
            tokens.extend(these)
            positions.extend(range(start, start + len(these)))
            query_start.append(len(tokens))
            context_lens.append(start + len(these))
            block_tables.append(request.block_table)
            return first

        for request, draft in drafts:
            first = add(request, (request.output_ids[-1], *draft))
            logit_rows.append(first)
            checks += range(first + 1, len(tokens))
            sampled.append(request)
        for request, length in pieces:
            start = request.num_cached_tokens
            end = start + length
            first = add(request, request.tokens(start, end))
            for position in request.unscored(start, end):
                scores.append(first + position - 1 - start)  # the row of a token tells of the one after it
                scored.append((request, position))
            if end == request.num_tokens:
                logit_rows.append(len(tokens) - 1)
                sampled.append(request)
        return cls(
            requests=(*decoding, *(request for request, _ in drafts), *(request for request, _ in pieces)),
            decodes=count,
            tokens=tokens,
            positions=positions,
            query_start=query_start,
            context_lens=context_lens,
            block_tables=block_tables,
            logit_rows=logit_rows + checks + scores,
            sampled=tuple(sampled),
            drafts=tuple(drafts),
            scored=tuple(scored),
        )

    @property
    def num_choices(self) -> int:
        """The first so many of ``logit_rows`` choose tokens: those of ``sampled``, and those that check guesses."""
        return len(self.logit_rows) - len(self.scored)

    def choices(self) -> Iterator[tuple[Request, int]]:
        """For each of these rows the request, and how many guesses stand before the token that it chooses."""
        for request in self.sampled:
            yield request, 0
        for request, draft in self.drafts:
            for number in range(len(draft)):
                yield request, number + 1

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What it computes of each request."""
        sampled = set(self.sampled)
        found = []
        for s, request in enumerate(self.requests):
            length = self.query_start[s + 1] - self.query_start[s]
            found.append(Chunk(request, self.context_lens[s] - length, length, request in sampled))
        return tuple(found)


def scored_chunk(request: Request, most: int, rows: int) -> tuple[int, int]:
    """How many of the next ``most`` tokens of a prompt that is scored fit a step with so many rows to spare, and how
    many of these it takes.

    The request's own row serves a score where the chunk does not end in a choice; so one token always fits.
    """
    start = request.num_cached_tokens
    # All of it, or up to its choice, or as many tokens as there are rows: the last needs no search.
    for chunk in (most, most - 1, max(start + 1, request.num_scored) + rows - start):
        own = start + chunk < request.num_tokens
        scores = len(request.unscored(start, start + chunk))
        if 0 < chunk <= most and scores <= rows + own:
            return chunk, max(0, scores - own)
    raise RuntimeError(f"{request!r} has no row of its own")
