"""Generation: the loop that ties the scheduler's policy to a loaded model, and turns tokens into text.

One step at a time: schedule, run, record, detokenise. Knows nothing of files, plugins or configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .batches import Batches, rows_of
from .deltas import Delta, Detokeniser, Job, TokenLogprob
from .engine import BlockManager, Request, SamplingParams, ScheduledStep, Scheduler, Speculation
from .errors import PolyheadError, RequestError
from .lookahead import Ahead, can_foresee
from .runtime.contract import Batch, LoadedModel, SampledToken
from .structured import Guides

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

__all__ = ["Delta", "Generation", "Job", "TokenLogprob"]


class Generation:
    """Continuous batching on one loaded model. Jobs may be added and aborted between steps. Not thread-safe, but
    for :meth:`prepare`.

    The whole loop is ``while generation.has_work: for job in generation.step(): …``, where ``step`` returns the jobs
    that have new deltas or an error; :meth:`take` hands them out one by one.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer | None,
        *,
        prefix_cache: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        """``prefix_cache``: keep the KV blocks of what was computed for prompts that begin alike. Without it only the
        samples of one prompt share blocks. ``speculation``: guess tokens, and check several in a step.
        """
        self.model = model
        self._speculation = speculation
        self._tokenizer = tokenizer
        self._prefix_cache = prefix_cache
        # Made here and not when first needed, as several threads may need it first.
        self._guides = None if tokenizer is None else Guides(tokenizer, model.decoder.vocab, tokenizer.stop_ids)
        self._begin()
        self._jobs: dict[str, Job] = {}
        self._texts: dict[str, tuple[Job, Detokeniser]] = {}  # by request
        self._ahead: Ahead | None = None
        self._ids = itertools.count()

    def _begin(self) -> None:
        plan = self.model.plan
        self._blocks = BlockManager(plan.num_blocks, plan.block_size)
        self._scheduler = Scheduler(
            self._blocks,
            plan.max_tokens,
            plan.max_batch,
            plan.context,
            max_logit_rows=plan.max_logit_rows,
            speculation=self._speculation,
        )
        self._batches = Batches(self._scheduler.max_sequences)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    @property
    def free_blocks(self) -> int:
        """KV blocks that no request holds; some may keep contents for requests to come."""
        return self._blocks.free_blocks

    @property
    def cached_blocks(self) -> int:
        """KV blocks whose contents may be used by requests to come."""
        return self._blocks.cached_blocks

    def add(self, prompt_ids: Sequence[int], params: SamplingParams, priority: int = 0) -> str:
        """Queues a prompt and returns its id. Raises RequestError for one that cannot be run."""
        job = self.prepare(prompt_ids, params, priority)
        self.queue(job)
        return job.id

    def prepare(self, prompt_ids: Sequence[int], params: SamplingParams, priority: int = 0) -> Job:
        """A checked job that is not queued yet. Any thread may do this at any time, as it changes nothing here: what
        takes long for a long prompt or a large grammar need not hold up the loop.

        ``priority``: lower numbers run earlier; see :class:`~polyhead.engine.Scheduler` for what a level is worth.
        """
        eos = self._tokenizer.stop_ids if self._tokenizer is not None else ()
        name = f"request-{next(self._ids)}"
        salt = b"" if self._prefix_cache else name.encode() if params.n > 1 else None
        request = Request(name, prompt_ids, params, eos_ids=eos, priority=priority, cache_salt=salt)
        request.validate_for(self.model.decoder.vocab)
        if params.structured is not None:
            if self._guides is None:
                raise RequestError("structured_outputs need a tokenizer, and this model was loaded without one")
            request.guide = self._guides.guide(params.structured)
        plan, length = self.model.plan, len(request.prompt_ids)
        if length < plan.context:  # else it will be refused
            request.extend_keys(plan.block_size, length // plan.block_size)  # once for all samples
        others = [request.another(f"{name}.{sample}", sample) for sample in range(1, params.n)]
        return Job([request, *others], self._tokenizer)

    def queue(self, job: Job) -> None:
        """Queues a prepared job. Raises RequestError for one that does not fit the context."""
        self._jobs[job.id] = job
        try:
            for text in job.texts:  # the first is refused if any would be
                self._texts[text.request.id] = job, text
                self._scheduler.add(text.request)
        except BaseException as error:
            if not isinstance(error, PolyheadError):
                self._repair()
            self.abort(job.id)
            raise

    def abort(self, job_id: str) -> None:
        """Ends a job and forgets it; its blocks are free at once. Unknown ids are ignored."""
        job = self._jobs.get(job_id)
        if job is not None:
            try:
                self._end(job)
            except BaseException:
                self._repair()
                self._end(job)  # an interrupt only puts it off
                raise
            finally:
                self._jobs.pop(job_id, None)

    def take(self, job_id: str) -> Delta | None:
        """The next delta of a job, or None if it needs another step.

        Raises the error that ended it, if one did, and RequestError for a job that is not there: it has ended, or
        another thread closed it.
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise RequestError(f"{job_id} is not running: it has ended or was closed")
        if job.deltas:
            delta = job.deltas.popleft()
            if job.done and not job.deltas:
                del self._jobs[job_id]
            return delta
        error = job.error
        if error is not None:
            self.abort(job_id)
            raise error
        return None

    def step(self) -> list[Job]:
        """Runs one step of whatever is scheduled, and returns the jobs that it gave deltas to or ended with an error.

        If the model fails, the jobs it concerns end with its error. An interrupt (Ctrl-C, no memory) passes through and
        leaves a sound state: a job whose part of the step was lost ends with an error.
        """
        try:
            return list(self._step())
        except BaseException:
            self._repair()
            raise

    def _step(self) -> dict[Job, None]:
        step = self._scheduler.schedule()
        news: dict[Job, None] = {}
        try:
            sampled = self._run(step) if step.requests else []
        except PolyheadError as error:
            self._ahead = None
            concerned = step.requests if error.row is None else [_owner(step, error.row)]
            for request in concerned:  # what is left is planned anew
                self._fail(request, error, news)
            return news
        count = step.num_choices
        for request in self._scheduler.postprocess(step, [token.id for token in sampled[:count]]):
            if request.error is not None:
                self._fail(request, request.error, news)
        for (request, _), token in zip(step.scored, sampled[count:], strict=True):
            found = self._texts.get(request.id)
            if found is not None:
                found[0].score(token)
        pairs = _choices(step, sampled) if step.drafts else zip(step.sampled, sampled, strict=False)
        for request, token in pairs:
            found = self._texts.get(request.id)
            if found is None:  # aborted, or ended by a stop string before this token
                continue
            job, text = found
            if text.pushed == len(request.output_ids):  # it followed a wrong guess
                continue
            try:
                delta = text.push(token)
            except PolyheadError as error:  # one request's text must not cost the others theirs
                self._fail(request, error, news)
                continue
            news[job] = None
            job.append(delta)
            if delta.finish_reason is not None:
                self._scheduler.finish(request.id)  # if it was a stop string, which the scheduler does not see
                del self._texts[request.id]
            text.pushed += 1  # now the token is safe from an interrupt
        return news

    def _fail(self, request: Request, error: PolyheadError, news: dict[Job, None]) -> None:
        """Ends a request and the other samples of its prompt with an error."""
        request.error = error
        found = self._texts.get(request.id)
        if found is not None:
            news[found[0]] = None
            self._end(found[0])

    def _end(self, job: Job) -> None:
        """Ends all of a job's requests that have not ended."""
        for request in job.requests:
            self._texts.pop(request.id, None)
            self._scheduler.finish(request.id, "abort" if request.error is None else "error")

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

    def check_integrity(self) -> None:
        """Recounts blocks and queues; raises RuntimeError where they disagree."""
        self._scheduler.check_integrity()

    def _run(self, step: ScheduledStep) -> list[SampledToken]:
        """The tokens of a step. Where the next one can be foreseen it is handed over first: no device waits for us."""
        ahead, self._ahead = self._ahead, None
        batch: Batch | None = None
        if ahead is not None and ahead.is_(step):
            pending = ahead.pending
        else:
            batch = self._batches.of(step)
            pending = self.model.submit(batch, rows_of(step))
        if self.model.runs_ahead and can_foresee(step) and not self._scheduler.may_guess(step):
            self._ahead = Ahead.submit(self.model, step, batch or self._batches.of(step), pending)
        return pending.result()

    def _repair(self) -> None:
        """After an interrupt anywhere: ends what lost a token, and begins anew if the books do not balance."""
        self._ahead = None
        lost = PolyheadError("the generation was interrupted")
        try:
            for job, text in list(self._texts.values()):
                if (text.pushed != len(text.request.output_ids) or job.lacks_scores) and job.error is None:
                    text.request.error = lost
                    self._end(job)
            self._scheduler.check_integrity()
        except (RuntimeError, ValueError, KeyError, IndexError):
            for job in self._jobs.values():
                if not job.done and job.error is None:
                    job.requests[0].error = lost
            self._texts.clear()
            self._begin()


def _owner(step: ScheduledStep, row: int) -> Request:
    """The request of a row of logits."""
    owners = [*(request for request, _ in step.choices()), *(request for request, _ in step.scored)]
    return owners[row]


def _choices(step: ScheduledStep, sampled: Sequence[SampledToken]) -> Iterator[tuple[Request, SampledToken]]:
    """Each choice of a step with its request, those of one request in the order of their positions."""
    for (request, _), token in zip(step.choices(), sampled, strict=False):
        yield request, token
