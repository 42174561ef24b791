"""Generation: the loop that ties the scheduler's policy to a loaded model, and turns tokens into text.

One step at a time: schedule, run, record, detokenise. Knows nothing of files, plugins or configuration.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .engine import BlockManager, FinishReason, Request, SamplingParams, ScheduledStep, Scheduler, StopMatcher
from .errors import PolyheadError, RequestError
from .lookahead import Ahead, can_foresee, row_of, to_batch
from .runtime.contract import Batch, LoadedModel, SampledToken

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural-log probability of a generated token under the model's own logits, and of the most likely ones.

    ``top`` holds (token id, log-probability), best first, as many as ``SamplingParams.logprobs`` asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a generation. ``finish_reason`` is None on every delta but the last.

    ``text`` never ends inside a UTF-8 character and never holds a part of a stop string, so it may lag behind
    ``token_ids``.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None


class _Stream:
    """One request's way from tokens to text, and the deltas nobody has taken yet."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.decoder = tokenizer.stream(continues=True) if tokenizer is not None else None
        self.vocab = tokenizer.vocab_size if tokenizer is not None else 0
        self.stops = StopMatcher(request.params.stops)
        self.deltas: deque[Delta] = deque()
        self.pushed = 0

    def push(self, sampled: SampledToken, ended: bool) -> bool:
        """Adds a token; True when its text completed a stop string."""
        self.pushed += 1
        text, hit = "", False
        # A token that ends the generation is reported, but is not part of the text.
        # Rows that only pad the embedding have none either.
        silent = sampled.id >= self.vocab or (ended and sampled.id in self.request.stop_ids)
        if self.decoder is not None and not silent:
            text, hit = self._filter(self.decoder.push(sampled.id))
        if ended and not hit and self.decoder is not None:
            rest, hit = self._filter(self.decoder.flush())
            text += rest
            if not hit:
                text += self.stops.flush()
        logprobs = None
        if sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.id, sampled.logprob, sampled.top),)
        reason = "stop" if hit else self.request.finish_reason if ended else None
        self.deltas.append(Delta(text, (sampled.id,), logprobs, reason))
        return hit

    def _filter(self, text: str) -> tuple[str, bool]:
        # Until min_tokens are made, no string ends the generation.
        if len(self.request.output_ids) <= self.request.params.min_tokens and self.request.params.min_tokens:
            return text, False
        return self.stops.push(text)


class Generation:
    """Continuous batching on one loaded model. Requests may be added and aborted between steps. Not thread-safe."""

    def __init__(self, model: LoadedModel, tokenizer: Tokenizer | None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._begin()
        self._streams: dict[str, _Stream] = {}
        self._ahead: Ahead | None = None
        self._ids = itertools.count()

    def _begin(self) -> None:
        plan = self.model.plan
        self._blocks = BlockManager(plan.num_blocks, plan.block_size)
        rows = min(plan.max_batch, plan.max_logit_rows)
        self._scheduler = Scheduler(self._blocks, plan.max_tokens, rows, plan.context)

    def add(self, prompt_ids: Sequence[int], params: SamplingParams) -> str:
        """Queues a prompt and returns its id. Raises RequestError for one that cannot be run."""
        request = self.prepare(prompt_ids, params)
        self.queue(request)
        return request.id

    def prepare(self, prompt_ids: Sequence[int], params: SamplingParams) -> Request:
        """A checked request that is not queued yet, for a caller who must know its id before anything can go wrong."""
        eos = self._tokenizer.stop_ids if self._tokenizer is not None else ()
        request = Request(f"request-{next(self._ids)}", prompt_ids, params, eos_ids=eos)
        request.validate_for(self.model.decoder.vocab)
        return request

    def queue(self, request: Request) -> None:
        """Queues a prepared request. Raises RequestError for one that does not fit the context."""
        stream = _Stream(request, self._tokenizer)
        try:
            self._scheduler.add(request)
            self._streams[request.id] = stream
        except PolyheadError:
            raise
        except BaseException:
            self._repair()
            raise

    def abort(self, request_id: str) -> None:
        """Ends a request and forgets it; its blocks are free at once. Unknown ids are ignored."""
        self._streams.pop(request_id, None)
        try:
            self._scheduler.abort(request_id)
        except BaseException:
            self._repair()
            raise

    def take(self, request_id: str) -> Delta | None:
        """The next delta of a request, or None if it needs another step.

        Raises the error that ended it, if one did, and RequestError for a request that is not there: it has ended, or
        another thread closed it.
        """
        stream = self._streams.get(request_id)
        if stream is None:
            raise RequestError(f"{request_id} is not running: it has ended or was closed")
        if stream.deltas:
            delta = stream.deltas.popleft()
            if delta.finish_reason is not None:
                del self._streams[request_id]
            return delta
        if stream.request.error is not None:
            del self._streams[request_id]
            raise stream.request.error
        return None

    def step(self) -> None:
        """Runs one step of whatever is scheduled. If the model fails, the requests it concerns end with its error.

        An interrupt (Ctrl-C, no memory) passes through and leaves a sound state: a request whose part of the step was
        lost ends with an error.
        """
        try:
            self._step()
        except BaseException:
            self._repair()
            raise

    def _step(self) -> None:
        step = self._scheduler.schedule()
        try:
            sampled = self._run(step) if step.chunks else []
        except PolyheadError as error:
            self._ahead = None
            self._fail(step, error)
            return
        self._scheduler.postprocess(step, [token.id for token in sampled])
        for request, token in zip(step.sampled, sampled, strict=True):
            stream = self._streams.get(request.id)
            if stream is None:
                continue
            try:
                hit = stream.push(token, request.finished)
            except PolyheadError as error:  # one request's text must not cost the others theirs
                request.error = error
                self._scheduler.finish(request.id, "error")
                continue
            if hit and not request.finished:
                self._scheduler.finish(request.id)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [n, vocab]: row i are the logits after token i, as the model itself gives them.

        Raises RequestError for an empty list, an id out of range, or more tokens than the context.
        """
        ids = Request("logits", token_ids).prompt_ids
        plan, vocab = self.model.plan, self.model.decoder.vocab
        if len(ids) > plan.context:
            raise RequestError(f"{len(ids):,} tokens exceed the context of {plan.context:,}")
        for at, token in enumerate(ids):
            if not 0 <= token < vocab:
                raise RequestError(f"token id {token} at position {at} is not in the vocabulary (0 to {vocab - 1})")
        table: list[int] = []
        if not self._blocks.extend(table, len(ids)):
            raise RequestError(
                f"{len(ids):,} tokens need {self._blocks.blocks_for(len(ids))} KV blocks; "
                f"{self._blocks.free_blocks} are free while other requests run"
            )
        try:
            out = np.empty((len(ids), vocab), np.float32)
            size = min(plan.max_tokens, plan.max_logit_rows)
            for start in range(0, len(ids), size):
                end = min(start + size, len(ids))
                out[start:end] = self.model.logits(
                    Batch(
                        tokens=np.array(ids[start:end], np.int32),
                        positions=np.arange(start, end, dtype=np.int32),
                        query_start=np.array([0, end - start], np.int32),
                        context_lens=np.array([end], np.int32),
                        block_tables=np.array([table], np.int32),
                        logit_rows=np.arange(end - start, dtype=np.int32),
                    )
                )
            return out
        finally:
            self._blocks.free(table)

    @property
    def free_blocks(self) -> int:
        """KV blocks that no request holds."""
        return self._blocks.free_blocks

    def check_integrity(self) -> None:
        """Recounts blocks and queues; raises RuntimeError where they disagree."""
        self._scheduler.check_integrity()

    def _run(self, step: ScheduledStep) -> list[SampledToken]:
        """The tokens of a step. Where the next one can be foreseen it is handed over first: no device waits for us."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.is_(step):
            pending = ahead.pending
        else:
            pending = self.model.submit(to_batch(step), [row_of(request) for request in step.sampled])
        if self.model.runs_ahead and can_foresee(step, self._blocks.block_size, self.model.plan.context):
            self._ahead = Ahead.submit(self.model, step, pending)
        return pending.result()

    def _fail(self, step: ScheduledStep, error: PolyheadError) -> None:
        """Ends the request that an error concerns, or all of the step; what is left is planned anew."""
        concerned = [chunk.request for chunk in step.chunks] if error.row is None else [step.sampled[error.row]]
        for request in concerned:
            request.error = error
            self._scheduler.finish(request.id, "error")

    def _repair(self) -> None:
        """After an interrupt anywhere: ends what lost a token, and begins anew if the books do not balance."""
        self._ahead = None
        lost = PolyheadError("the generation was interrupted")
        try:
            for stream in list(self._streams.values()):
                if stream.request.error is None and stream.pushed != len(stream.request.output_ids):
                    stream.request.error = lost
                    self._scheduler.finish(stream.request.id, "error")
            self._scheduler.check_integrity()
        except (RuntimeError, ValueError, KeyError):
            for stream in self._streams.values():
                stream.request.error = stream.request.error or lost
            self._begin()
