"""Completion: a finished generation, made of its deltas. Stream: one that is read while it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .deltas import Delta, Job, TokenLogprob
from .engine import FinishReason

if TYPE_CHECKING:
    from .llm import LLM


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation.

    ``token_ids`` includes the token that ended it; ``text`` does not, nor a stop string. ``logprobs`` has one entry per
    token if they were asked for, ``prompt_logprobs`` one per token of the prompt, None for the first.
    ``finish_reason`` is ``stop`` or ``length``.

    ``cached_tokens`` of the prompt's tokens were found in the KV cache and not computed. With ``runtime.speculation``
    ``drafted_tokens`` were guessed, and ``accepted_tokens`` of these were right. These three depend on what ran before
    and beside, so they are not compared.

    With ``SamplingParams.n`` above 1 this is sample 0, ``samples`` holds the others, and ``outputs`` all of them in
    order; ``index`` is a sample's number.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_token_ids: tuple[int, ...]
    index: int = 0
    samples: tuple[Completion, ...] = ()
    cached_tokens: int = field(default=0, compare=False)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    drafted_tokens: int = field(default=0, compare=False)
    accepted_tokens: int = field(default=0, compare=False)

    @property
    def outputs(self) -> tuple[Completion, ...]:
        """All samples of the prompt, in order: this one first."""
        return (replace(self, samples=()), *self.samples)

    @classmethod
    def of(cls, job: Job, deltas: Sequence[Delta]) -> Completion:
        """The completion of a job that is done, from all its deltas."""
        found = []
        scores = job.prompt_logprobs
        for request in job.requests:
            mine = [delta for delta in deltas if delta.index == request.sample]
            asked = request.params.logprobs is not None
            reason = mine[-1].finish_reason
            if reason is None:
                raise RuntimeError(f"{request!r} has not ended")
            found.append(
                cls(
                    text="".join(delta.text for delta in mine),
                    token_ids=tuple(token for delta in mine for token in delta.token_ids),
                    finish_reason=reason,
                    logprobs=tuple(item for delta in mine for item in delta.logprobs or ()) if asked else None,
                    prompt_token_ids=job.prompt_ids,
                    index=request.sample,
                    cached_tokens=job.cached_tokens,
                    prompt_logprobs=None if scores is None else tuple(scores),
                    drafted_tokens=request.num_drafted,
                    accepted_tokens=request.num_accepted,
                )
            )
        return replace(found[0], samples=tuple(found[1:]))


class Stream(Iterator[Delta]):
    """The deltas of one generation as they come. Aborts it when closed, dropped, or left with an exception."""

    def __init__(self, llm: LLM, job: Job) -> None:
        self._llm = llm
        self._job = job
        self._request: str | None = job.id

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as it was taken in."""
        return self._job.prompt_ids

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens were found in the KV cache and not computed; 0 before the first delta."""
        return self._job.cached_tokens

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """As of a Completion, whole from the first delta on; None if not asked for."""
        scores = self._job.prompt_logprobs
        return None if scores is None else tuple(scores)

    @property
    def drafted_tokens(self) -> int:
        """How many tokens were guessed so far."""
        return self._job.requests[0].num_drafted

    @property
    def accepted_tokens(self) -> int:
        """How many of these were right."""
        return self._job.requests[0].num_accepted

    def __next__(self) -> Delta:
        if self._request is None:
            raise StopIteration
        try:
            delta = self._llm._next(self._request)
        except BaseException:
            self._request = None
            raise
        if delta.finish_reason is not None:
            self._request = None
        return delta

    def close(self) -> None:
        """Ends the generation now; its KV blocks are free at once. Safe to call twice."""
        if self._request is not None:
            self._llm._abort(self._request)
            self._request = None

    def __del__(self) -> None:
        # The collector may run this at any point, even while this thread plans a step.
        if self._request is not None:
            self._llm._drop(self._request)
