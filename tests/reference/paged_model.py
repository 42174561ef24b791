"""A model without arithmetic: it stores in a simulated paged cache what keys and values stand for, and reads it back.

A slot of the cache holds (position, hash of all tokens up to there), as the keys and values of a token depend on the
tokens before it. The next token is a hash of the sequence and the seed, so a wrong position, a block given to two
sequences, a stale entry or a block shared by mistake is found when it is read.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from polyhead.engine import Request, ScheduledStep

VOCAB, EOS = 16, 3


def next_token(history: list[int], seed: int) -> int:
    return zlib.crc32(bytes(history) + seed.to_bytes(8, "little")) % VOCAB


def alone(request: Request, context: int, capacity: int) -> tuple[list[int], str]:
    """The tokens and the finish reason of a request that has everything for itself, without any scheduling."""
    params = request.params
    stop_ids = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    history = list(request.prompt_ids)
    output: list[int] = []
    while len(history) <= capacity:
        token = next_token(history, request.seed)
        history.append(token)
        output.append(token)
        if token in stop_ids and len(output) > params.min_tokens:
            return output, "stop"
        if len(output) == params.max_tokens or len(history) == context:
            return output, "length"
    return output, "error"


@dataclass
class PagedModel:
    """Runs scheduled steps. ``written`` counts the tokens it was given, ``scored`` lists for each request the positions
    of its prompt whose log-probabilities it was given.
    """

    block_size: int
    cache: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    scored: dict[str, list[int]] = field(default_factory=dict)
    written: int = 0

    def run(self, step: ScheduledStep) -> list[int]:
        assert step.query_start[0] == 0
        assert step.query_start[-1] == len(step.tokens) == len(step.positions)
        self.written += len(step.tokens)
        histories: dict[int, tuple[Request, list[int]]] = {}  # of each row: whose it is, and the tokens up to it
        drafts = dict(step.drafts)
        for s, request in enumerate(step.requests):
            rows = range(step.query_start[s], step.query_start[s + 1])
            draft = drafts.get(request, ())
            history = [*request.tokens(0, step.context_lens[s] - len(draft)), *draft]
            assert step.tokens[rows[0] : rows[-1] + 1] == history[-len(rows) :]
            assert step.positions[rows[0] : rows[-1] + 1] == list(range(len(history) - len(rows), len(history)))
            hashes = [0]
            for token in history:
                hashes.append(zlib.crc32(bytes([token]), hashes[-1]))
            table = step.block_tables[s]
            for row in rows:
                position = step.positions[row]
                block, slot = divmod(position, self.block_size)
                self.cache[table[block], slot] = (position, hashes[position + 1])
                histories[row] = request, history[: position + 1]
            for position in range(len(history)):
                block, slot = divmod(position, self.block_size)
                assert self.cache[table[block], slot] == (position, hashes[position + 1]), f"{request} at {position}"
        wanted = [histories[row] for row in step.logit_rows]
        assert [request for request, _ in wanted[: len(step.sampled)]] == list(step.sampled)
        assert all(len(history) == request.num_tokens for request, history in wanted[: len(step.sampled)])
        for (request, ahead), (owner, history) in zip(step.choices(), wanted, strict=False):
            assert owner is request
            assert len(history) == request.num_tokens + ahead
        for (request, position), (owner, history) in zip(step.scored, wanted[step.num_choices :], strict=True):
            assert owner is request
            assert history == list(request.prompt_ids[:position])
            self.scored.setdefault(request.id, []).append(position)
        return [next_token(history, request.seed) for request, history in wanted[: step.num_choices]]
