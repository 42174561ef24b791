"""Lookahead: the step after the one under way, where it can be foreseen, handed over before its tokens are known.

Only steps in which every request decodes one token and goes on are foreseen; the token itself stays on the device. If
the scheduler then decides otherwise, because a request ended or a new one came, the foreseen step is dropped: what it
wrote to the cache lies beyond the tokens that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .engine import Request, ScheduledStep
from .runtime.contract import Batch, LoadedModel, Pending, SamplingRow


@dataclass(frozen=True, slots=True)
class Ahead:
    """A foreseen step on its way, and what it was foreseen for."""

    requests: tuple[Request, ...]
    positions: tuple[int, ...]
    pending: Pending

    @classmethod
    def submit(cls, model: LoadedModel, step: ScheduledStep, under_way: Pending) -> Ahead:
        """Hands over the step after ``step``, of which :func:`can_foresee` said that it can be."""
        batch = to_batch(step)
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
        return cls(step.sampled, tuple(positions.tolist()), model.submit(following, rows, after=under_way))

    def is_(self, step: ScheduledStep) -> bool:
        """Whether the scheduler came to the same step."""
        same = len(step.chunks) == len(step.sampled) and step.sampled == self.requests
        return same and tuple(step.positions) == self.positions


def can_foresee(step: ScheduledStep, block_size: int, context: int) -> bool:
    """Whether every request of a step surely decodes one token more, unless its token ends it.

    Its position must lie in a block that it holds, and nothing about how it is chosen may depend on the token before.
    """
    return bool(step.chunks) and all(
        chunk.samples and chunk.length == 1 and _goes_on(chunk.request, block_size, context) for chunk in step.chunks
    )


def _goes_on(request: Request, block_size: int, context: int) -> bool:
    params = request.params
    plain = params.repetition_penalty == 1.0 and params.presence_penalty == params.frequency_penalty == 0.0
    held = min(len(request.block_table) * block_size, context)
    room = len(request.output_ids) + 1 < params.max_tokens and request.num_tokens + 1 <= held
    return plain and room and params.min_tokens == 0


def to_batch(step: ScheduledStep) -> Batch:
    """A scheduled step as the arrays a runtime takes."""
    return Batch(
        tokens=np.array(step.tokens, np.int32),
        positions=np.array(step.positions, np.int32),
        query_start=np.array(step.query_start, np.int32),
        context_lens=np.array(step.context_lens, np.int32),
        block_tables=np.array(step.block_tables, np.int32),
        logit_rows=np.array(step.logit_rows, np.int32),
    )


def row_of(request: Request, ahead: int = 0) -> SamplingRow:
    """How a request's next token is chosen, or the one ``ahead`` tokens later."""
    params = request.params
    return SamplingRow(
        seed=request.seed,
        position=request.num_tokens + ahead,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        logit_bias=request.logit_bias,
        prompt_ids=request.prompt_ids,
        output_ids=request.output_ids,
        logprobs=params.logprobs,
    )
