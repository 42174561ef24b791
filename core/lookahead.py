"""Lookahead: the step after the one under way, where it can be foreseen, handed over before its tokens are known.

Only steps in which every request decodes one token and goes on are foreseen; the token itself stays on the device. If
the scheduler then decides otherwise, because a request ended or a new one came, the foreseen step is dropped: what it
wrote to the cache lies beyond the tokens that count, in blocks that nobody else could find, and before all that later
steps write there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .batches import row_of
from .engine import Request, ScheduledStep
from .runtime.contract import Batch, LoadedModel, Pending


@dataclass(frozen=True, slots=True)
class Ahead:
    """A foreseen step on its way, and what it was foreseen for."""

    requests: tuple[Request, ...]
    positions: list[int]
    pending: Pending

    @classmethod
    def submit(cls, model: LoadedModel, step: ScheduledStep, batch: Batch, under_way: Pending) -> Ahead:
        """Hands over the step after ``step``, whose batch this is, if :func:`can_foresee` said that it can be."""
        positions = batch.positions + np.int32(1)
        following = Batch(
            tokens=batch.tokens,  # the device puts in those of the step under way
            positions=positions,
            query_start=batch.query_start,
            context_lens=batch.context_lens + np.int32(1),
            block_tables=batch.block_tables,
            logit_rows=batch.logit_rows,
        )
        rows = [row_of(request, ahead=1) for request in step.sampled]
        return cls(step.sampled, positions.tolist(), model.submit(following, rows, after=under_way))

    def is_(self, step: ScheduledStep) -> bool:
        """Whether the scheduler came to the same step. Those that started over have other blocks and no decode."""
        same = step.requests == self.requests and step.positions == self.positions
        return same and step.decodes == len(step.requests)


def can_foresee(step: ScheduledStep) -> bool:
    """Whether every request of a step surely decodes one token more, unless its token ends it.

    Its position must lie in a block that it holds, and nothing about how it is chosen may depend on the token before.
    """
    if not step.requests or step.decodes < len(step.requests):  # prompts and guesses
        return False
    for request in step.requests:
        cached = request.num_cached_tokens + 1  # when this step is done
        if cached >= request.final or cached >= request.held_tokens or not request.foreseeable:
            return False
    return True
