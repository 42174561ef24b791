"""Static batches: so many sequences of the same length at once, through the product's own loop.

Counted as llama.cpp's batched-bench does: prefill is the time until every sequence has its first token, decode that of
the steps after it, in each of which every sequence gets one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..engine import SamplingParams
from ..errors import CapacityError, RequestError
from ..generation import Generation
from ..runtime.contract import LoadedModel
from .cases import MOST, Case
from .machine import Limits
from .watch import Watched
from .work import flops, read_bytes

if TYPE_CHECKING:
    from ..arch import Decoder
    from ..tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class StaticCase:
    """``batch`` sequences of ``prompt`` tokens, each of which generates ``generated`` tokens after its first."""

    batch: int
    prompt: int
    generated: int

    def longest(self, tokens_per_step: int) -> int:
        """Tokens of the longest sequence at the end: those prefilled first decode while the others are prefilled."""
        return self.prompt + self.generated + self.ahead(tokens_per_step)

    def ahead(self, tokens_per_step: int) -> int:
        """The most tokens that a sequence can have when the last one gets its first."""
        return -(-self.batch * self.prompt // max(1, tokens_per_step - self.batch)) + 2

    def blocks(self, tokens_per_step: int, block_size: int) -> int:
        """KV blocks of one sequence. For each other one the scheduler wants one to spare when it admits a prompt."""
        spare = 1 if self.batch > 1 else 0
        return max(-(-self.longest(tokens_per_step) // block_size), -(-self.prompt // block_size) + spare)

    def needs(self, tokens_per_step: int, block_size: int) -> Case:
        """What a model must be loaded for."""
        context = self.longest(tokens_per_step)
        if self.blocks(tokens_per_step, block_size) * block_size - context >= block_size:
            context = self.blocks(tokens_per_step, block_size) * block_size
        return Case("tg", context - self.prompt, self.prompt, self.batch)


@dataclass(frozen=True, slots=True)
class StaticResult:
    """Seconds of each repetition, and the least work: of decode, bytes read and operations; of prefill, operations."""

    case: StaticCase
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    decode_bytes: float
    decode_flops: float
    prefill_flops: float
    host_seconds: float

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second of all sequences, the median."""
        return self.case.batch * self.case.generated / statistics.median(self.decode_seconds)

    @property
    def decode_spread(self) -> float:
        """Half the distance of the slowest and the fastest repetition, tokens per second."""
        tokens = self.case.batch * self.case.generated
        return (tokens / min(self.decode_seconds) - tokens / max(self.decode_seconds)) / 2

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, the median."""
        return self.case.batch * self.case.prompt / statistics.median(self.prefill_seconds)

    @property
    def whole_rate(self) -> float:
        """Generated tokens over the whole time, prefill included."""
        return (
            self.case.batch
            * self.case.generated
            / statistics.median([sum(each) for each in zip(self.prefill_seconds, self.decode_seconds, strict=True)])
        )

    def decode_limit(self, limits: Limits) -> tuple[float, str]:
        """The most generated tokens per second that memory and arithmetic allow, and which of the two is in the way."""
        read, compute = self.decode_bytes / limits.read_bytes, self.decode_flops / limits.flops
        tokens = self.case.batch * self.case.generated
        return tokens / max(read, compute), "memory" if read >= compute else "arithmetic"

    def prefill_limit(self, limits: Limits) -> float:
        """The most prompt tokens per second that arithmetic allows."""
        return self.case.batch * self.case.prompt * limits.flops / self.prefill_flops


def static_cases(batches: Sequence[int], prompt: int, generated: int) -> list[StaticCase]:
    """A case for every batch. Raises RequestError for impossible numbers."""
    for name, value in (("prompt tokens", prompt), ("generated tokens", generated), *(("batch", b) for b in batches)):
        if not 1 <= value <= MOST:
            raise RequestError(f"{name} must be from 1 to {MOST:,}, got {value:,}")
    return [StaticCase(batch, prompt, generated) for batch in batches]


def measure_static(
    model: LoadedModel,
    tokenizer: Tokenizer | None,
    cases: Sequence[StaticCase],
    *,
    repeats: int = 5,
    prefix_cache: bool = True,
    tick: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> list[StaticResult]:
    """Runs every case ``repeats`` times after one run that is not counted, sampling greedily.

    Raises RequestError or CapacityError for a case that the model was not loaded for.
    """
    if repeats < 1:
        raise RequestError(f"repetitions must be at least 1, got {repeats}")
    for case in cases:
        _check(model, case)
    results = []
    for number, case in enumerate(cases):
        runs = []
        for repeat in range(repeats + 1):
            remark = f"{case.batch} sequences"
            tick(number * (repeats + 1) + repeat, len(cases) * (repeats + 1), remark)
            runs.append(_run(model, tokenizer, case, prefix_cache))
        prefill, decode, host = zip(*runs[1:], strict=True)
        tg = Case("tg", case.generated, case.prompt, case.batch)
        results.append(
            StaticResult(
                case,
                prefill,
                decode,
                read_bytes(model.decoder, model.plan, tg),
                decode_flops(model.decoder, tg),
                flops(model.decoder, Case("pp", case.prompt, 0, case.batch)),
                statistics.median(host),
            )
        )
    return results


def decode_flops(decoder: Decoder, case: Case) -> float:
    """Operations of a decode case: as a prefill case's, with a row of logits for every token."""
    return flops(decoder, case) + case.batch * (case.tokens - 1) * 2 * decoder.hidden * decoder.vocab


def _check(model: LoadedModel, case: StaticCase) -> None:
    plan = model.plan
    longest = case.longest(plan.max_tokens)
    if longest > plan.context:
        raise RequestError(
            f"{case.batch} sequences of {case.prompt:,} + {case.generated:,} tokens need a context of {longest:,}; "
            f"this model was loaded with {plan.context:,}"
        )
    most = min(plan.max_batch, plan.max_logit_rows, plan.max_tokens)
    if case.batch > most:
        raise RequestError(f"{case.batch} sequences are more than the {most} of a step that this model was loaded for")
    blocks = case.batch * case.blocks(plan.max_tokens, plan.block_size)
    if blocks > plan.num_blocks:
        raise CapacityError(
            f"{case.batch} sequences of up to {longest:,} tokens need {blocks:,} KV blocks, the cache has "
            f"{plan.num_blocks:,} of {plan.block_size} tokens"
        )


def _run(
    model: LoadedModel, tokenizer: Tokenizer | None, case: StaticCase, prefix_cache: bool
) -> tuple[float, float, float]:
    """Seconds of prefill and of decode, and the host's own in a decode step."""
    watched = Watched(model)
    generation = Generation(watched, tokenizer, prefix_cache=prefix_cache)  # a new one: nothing is cached
    longest = case.generated + case.ahead(model.plan.max_tokens)
    params = SamplingParams(temperature=0.0, max_tokens=longest, ignore_eos=True, seed=1)
    prompts = np.random.default_rng(1).integers(0, model.decoder.vocab, (case.batch, case.prompt)).tolist()
    jobs = [generation.prepare(prompt, params) for prompt in prompts]
    try:
        start = time.perf_counter()
        for job in jobs:
            generation.queue(job)
        without_token = set(jobs)
        while without_token:
            for job in generation.step():
                if job.error is not None:
                    raise job.error
                without_token.discard(job)
        middle = time.perf_counter()
        before = sum(watched.notes.submits) + sum(watched.notes.waits)
        for _ in range(case.generated):
            changed = generation.step()
            if len(changed) != case.batch or any(job.error is not None for job in changed):
                raise next((job.error for job in jobs if job.error), RuntimeError("a sequence got no token in a step"))
        end = time.perf_counter()
        device = sum(watched.notes.submits) + sum(watched.notes.waits) - before
    finally:
        for job in jobs:
            generation.abort(job.id)
    return middle - start, end - middle, (end - middle - device) / case.generated
