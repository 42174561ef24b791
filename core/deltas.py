"""Deltas: what each step adds to a generation, as tokens, text and log-probabilities.

Knows nothing of models, steps or blocks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .engine import FinishReason, Request, StopMatcher
from .errors import PolyheadError

if TYPE_CHECKING:
    from .runtime.contract import SampledToken
    from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural-log probability of a token under the model's own logits, and of the most likely ones.

    ``top`` holds (token id, log-probability), best first, as many as ``SamplingParams.logprobs``, or
    ``prompt_logprobs``, asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a generation. ``finish_reason`` is None on every delta but the last of a sample.

    ``text`` never ends inside a UTF-8 character and never holds a part of a stop string, so it may lag behind
    ``token_ids``. ``index`` says which sample it belongs to, where ``SamplingParams.n`` asked for several.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    index: int = 0


class Detokeniser:
    """One request's way from tokens to deltas. ``pushed`` counts the tokens whose deltas are in its job's queue.

    A step may bring a request several tokens; they are pushed one by one.
    """

    __slots__ = ("_decoder", "_stops", "_vocab", "pushed", "request")

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer every text is empty."""
        self.request = request
        self.pushed = 0
        self._decoder = tokenizer.stream(continues=True) if tokenizer is not None else None
        self._vocab = tokenizer.vocab_size if tokenizer is not None else 0
        self._stops = StopMatcher(request.params.stops)

    def push(self, sampled: SampledToken) -> Delta:
        """Takes the request's next token. The delta's reason is "stop" too if its text completed a stop string, or is
        complete in the form that it must have.

        Raises RequestError if that form takes too much work to follow.
        """
        request = self.request
        ended = request.finished and self.pushed + 1 == len(request.output_ids)
        complete = False
        if request.guide is not None:
            request.guide.accept(sampled.id)
            complete = request.guide.ended
            ended = ended or complete
        text, hit = "", False
        # A token that ends the generation is reported, but is not part of the text.
        # Rows that only pad the embedding have none either.
        silent = sampled.id >= self._vocab or (ended and sampled.id in request.stop_ids)
        if self._decoder is not None and not silent:
            text, hit = self._filter(self._decoder.push(sampled.id))
        if ended and not hit and self._decoder is not None:
            rest, hit = self._filter(self._decoder.flush())
            text += rest
            if not hit:
                text += self._stops.flush()
        logprobs = None
        if sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.id, sampled.logprob, sampled.top),)
        reason = "stop" if hit or complete else request.finish_reason if ended else None
        return Delta(text, (sampled.id,), logprobs, reason, request.sample)

    def _filter(self, text: str) -> tuple[str, bool]:
        # Until min_tokens are made, no string ends the generation.
        if self.pushed < self.request.params.min_tokens:
            return text, False
        return self._stops.push(text)


class Job:
    """One prompt and its samples on their way, and the deltas that nobody has taken yet.

    Sample i is ``requests[i]``; the deltas of all samples stand in one queue, in the order they came.
    ``prompt_logprobs`` has an entry for each token of the prompt that was scored so far, if that was asked for, and
    None for the first, which follows nothing. It is whole when the first delta of sample 0 comes.
    """

    __slots__ = ("_open", "deltas", "id", "prompt_logprobs", "requests", "texts")

    def __init__(self, requests: Sequence[Request], tokenizer: Tokenizer | None) -> None:
        self.id = requests[0].id
        self.requests = tuple(requests)
        self.texts = [Detokeniser(request, tokenizer) for request in requests]
        self.deltas: deque[Delta] = deque()
        asked = requests[0].params.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if asked else None
        self._open = len(requests)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.requests[0].prompt_ids

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens were found in the cache, and not computed, when the job began."""
        return self.requests[0].num_reused_tokens

    @property
    def error(self) -> PolyheadError | None:
        """What ended the job, if it was an error. One sample's error ends all samples."""
        return next((request.error for request in self.requests if request.error is not None), None)

    @property
    def done(self) -> bool:
        """Whether no more deltas will come. Those in the queue may still be taken."""
        return self._open == 0

    @property
    def lacks_scores(self) -> bool:
        """Whether a log-probability of the prompt was computed and then lost."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) != self.requests[0].num_scored

    def score(self, sampled: SampledToken) -> None:
        """Adds the log-probability of the prompt's next token, as the row of ``batches.scoring_row`` gave it."""
        scores = self.prompt_logprobs
        if scores is None or sampled.logprob is None:
            raise RuntimeError(f"{self.id} asked for no log-probabilities of its prompt")
        token = self.prompt_ids[len(scores)]
        scores.append(TokenLogprob(token, sampled.logprob if sampled.id == token else -math.inf, sampled.top))

    def append(self, delta: Delta) -> None:
        """Adds a delta to the queue."""
        self.deltas.append(delta)
        if delta.finish_reason is not None:
            self._open -= 1
