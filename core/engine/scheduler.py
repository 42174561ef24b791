"""Scheduler: which tokens of which requests the next step computes.

Pure policy: knows nothing of devices, text or sampling. Not thread-safe; one loop owns it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CapacityError, ConfigError, RequestError
from .admission import Admission
from .block_manager import BlockManager
from .request import FinishReason, Request, Status
from .roster import Roster
from .speculation import Speculation
from .step import Draft, ScheduledStep, scored_chunk

AGEING_STEPS = 256


class Scheduler:
    """Chunked prefill beside decodes, by priority and arrival, with preemption by recomputing and shared prefixes.

    Two calls make a step, and nothing a request has computed moves but in the second::

        while scheduler.has_work:
            step = scheduler.schedule()
            ids = run(step) if step.requests else []       # one token id for each of step.choices()
            finished = scheduler.postprocess(step, ids)

    **Order.** A request has a rank for life: ``(steps done when it came + priority * ageing_steps, order of arrival)``,
    the lowest first. So of equal priorities the first to come is first, and one level of priority is worth
    ``ageing_steps`` steps of waiting. Requests are admitted by rank, when the blocks for all their tokens so far are
    free; the head of the queue is never overtaken. If it does not fit, running requests of a higher rank go back to the
    queue, where that makes it fit; so do they when a running request needs a block and none is free, the highest rank
    first. They lose their blocks and are computed again later.

    **No starvation.** The request of the lowest rank gets at least one token further in every step and is never sent
    back. So a request ends, at the latest, after as many steps as all requests of a lower rank and itself have prompt
    tokens, ``max_tokens`` and one; and with d levels between its priority and the best one in use, only such requests
    can have a lower rank as come at most ``d * ageing_steps`` steps after it.

    **Shared prefixes.** Full blocks of requests with a ``cache_salt`` are published when the step that fills them is
    done, and not before: a step that fails publishes nothing. A request is admitted with the blocks that are published
    for its beginning, but always computes its last token itself. While a request of a lower rank computes the very
    block that the head of the queue needs next, the head waits for it. It is assumed that steps are carried out in the
    order in which they are handed over: a block given up may be handed out while the step under way still reads it.

    **Guesses.** With ``speculation`` a decoding request may be given several tokens in a step: its last one and guesses
    at those after it. Every one of them is followed by a choice of the model; those choices count up to the first guess
    that is not what the model chose. As a choice depends on the tokens before it and its position alone, the tokens are
    those that come without guesses.

    **Log-probabilities of prompts.** A row of logits is wanted for each such token. There are ``max_logit_rows`` in a
    step, and every running request can have one of them, so such a prompt is taken in smaller chunks. Nobody waits for
    the blocks that it computes so slowly.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_tokens_per_step: int,
        max_sequences: int,
        context: int,
        *,
        ageing_steps: int = AGEING_STEPS,
        max_logit_rows: int | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """``context``: the most tokens, prompt and output, that one request may have; it ends there with "length".
        ``max_logit_rows``: as many rows as a step may have logits of; None: one for each sequence.

        At most ``min(max_sequences, max_tokens_per_step, max_logit_rows)`` requests run at once, so that each can
        decode in each step.
        """
        rows = min(max_sequences, max_tokens_per_step) if max_logit_rows is None else max_logit_rows
        limits = {
            "max_tokens_per_step": max_tokens_per_step,
            "max_sequences": max_sequences,
            "max_logit_rows": rows,
            "ageing_steps": ageing_steps,
        }
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if context < 2:
            raise ConfigError(f"context must be at least 2 (a prompt token and a generated one), got {context}")
        self.block_manager = block_manager
        self.max_tokens_per_step = max_tokens_per_step
        self.max_logit_rows = rows
        self.max_sequences = min(max_sequences, max_tokens_per_step, rows)
        self.context = context
        self.ageing_steps = ageing_steps
        self.speculation = speculation
        self._roster = Roster(block_manager)
        self._admission = Admission(self._roster, self.max_sequences, max_tokens_per_step, rows)
        self._failed: list[Request] = []  # ended by schedule(), not yet returned by postprocess()
        self._step: ScheduledStep | None = None
        self._steps = self._arrivals = 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks: new ones and preempted ones."""
        return len(self._roster.waiting)

    @property
    def num_running(self) -> int:
        """Requests that are being computed."""
        return self._roster.num_running

    @property
    def has_work(self) -> bool:
        """Whether a request has yet to end or to be returned as ended."""
        return bool(self._roster or self._failed)

    def add(self, request: Request) -> None:
        """Queues a new request.

        Raises ``RequestError`` if its id is in use or its prompt leaves no room in the context for one token more, and
        ``CapacityError`` if its prompt would not fit into an empty cache.
        """
        self._roster.check_new(request)
        length = len(request.prompt_ids)
        if length >= self.context:
            raise RequestError(
                f"the prompt has {length} tokens; the context of {self.context} takes at "
                f"most {self.context - 1} and one generated token. Shorten the prompt or raise runtime.context"
            )
        if length > self.block_manager.capacity:
            raise CapacityError(self._too_large(request))
        request.rank = (self._steps + request.priority * self.ageing_steps, self._arrivals)
        request.final = min(length + request.params.max_tokens, self.context) - 1
        self._arrivals += 1
        self._roster.add(request)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request with "abort" and frees its blocks; returns it, or None if there is none or it has ended.

        Allowed at any time, between ``schedule`` and ``postprocess`` too: what that step computes for it is dropped.
        """
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason = "stop") -> Request | None:
        """Ends a request for a reason that only the caller sees, such as a stop string in the text. As ``abort``."""
        request = self._roster.get(request_id)
        if request is not None:
            self._roster.end(request, reason)
        return request

    def schedule(self) -> ScheduledStep:
        """Chooses the next step: a token for each decode, then prefill chunks with what is left of the budget.

        Calling it again without ``postprocess``, after a step that failed, plans that work anew.
        """
        roster = self._roster
        # Blocks are needed for the next token and the one after it, so that the loop may be one step ahead.
        for request in [r for r in roster.decoding if r.held_tokens < r.num_cached_tokens + 2]:
            if request.status is Status.RUNNING:  # not sent back for one before it
                self._make_room(request)
        while (head := self._admission.next()) is not None:
            self._fail(head)
        decoding: Sequence[Request] = roster.decoding
        drafts = self._drafts()
        if drafts:
            guessing = {request for request, _ in drafts}
            decoding = [request for request in decoding if request not in guessing]
        guesses = sum(len(draft) for _, draft in drafts)
        budget = self.max_tokens_per_step - len(roster.decoding) - guesses
        rows = self.max_logit_rows - roster.num_running - guesses
        pieces: list[tuple[Request, int]] = []
        for request in roster.prefilling:
            if not budget:
                break
            chunk = min(request.num_tokens - request.num_cached_tokens, budget)
            if request.num_scored < len(request.prompt_ids):
                chunk, scores = scored_chunk(request, chunk, rows)
                rows -= scores
            pieces.append((request, chunk))
            budget -= chunk
        self._step = ScheduledStep.of(decoding, pieces, drafts)
        return self._step

    def may_guess(self, step: ScheduledStep) -> bool:
        """Whether the step after this one may hold guesses, so that it cannot be foreseen."""
        return self.speculation is not None and not self.speculation.rests(step.requests)

    def postprocess(self, step: ScheduledStep, sampled: Sequence[int]) -> list[Request]:
        """Records that the step was computed and which token ids were sampled, one for each of ``step.choices()``.

        Returns the requests that ended since the last call, in no promised order, without those ended by ``abort`` or
        ``finish``. One with ``finish_reason`` "error" did not fit into the cache and has the ``error`` to report.
        """
        if step is not self._step:
            raise RuntimeError("postprocess takes the step that the last call of schedule returned, once")
        if len(sampled) != step.num_choices:
            raise RuntimeError(f"the step samples {step.num_choices} tokens, but {len(sampled)} were given")
        self._step = None
        self._steps += 1
        finished, self._failed = self._failed, []
        ended = Status.FINISHED
        for request, token in zip(step.sampled[: step.decodes], sampled, strict=False):
            if request.status is ended:  # aborted since
                continue
            request.num_cached_tokens = cached = request.num_cached_tokens + 1
            request.output_ids.append(token)
            if cached >= request.next_event or token in request.stop_ids:
                self._advance(request, finished)
        if step.drafts:
            self._postprocess_drafts(step, sampled, finished)
        if step.decodes + len(step.drafts) < len(step.requests):
            self._postprocess_prefill(step, sampled, finished)
        return finished

    def check_integrity(self) -> None:
        """Recounts blocks and queues; raises ``RuntimeError`` where they disagree. For tests and idle moments."""
        self._roster.check_integrity()

    def _postprocess_prefill(self, step: ScheduledStep, sampled: Sequence[int], finished: list[Request]) -> None:
        for request, position in step.scored:
            request.num_scored = position + 1
        first = step.decodes + len(step.drafts)
        tokens = dict(zip(step.sampled[first:], sampled[first : len(step.sampled)], strict=True))
        for s in range(first, len(step.requests)):
            request = step.requests[s]
            if request.status is Status.FINISHED:
                continue
            request.num_cached_tokens = step.context_lens[s]
            if request in tokens:
                request.output_ids.append(tokens[request])
                self._roster.prefilled(request)
                self._advance(request, finished)
            else:
                self._roster.publish(request)

    def _postprocess_drafts(self, step: ScheduledStep, sampled: Sequence[int], finished: list[Request]) -> None:
        """Takes the choices of each draft as far as they follow from right guesses."""
        row = len(step.sampled)
        for (request, draft), token in zip(step.drafts, sampled[step.decodes :], strict=False):
            choices = (token, *sampled[row : row + len(draft)])
            row += len(draft)
            right = 0
            for number, choice in enumerate(choices):
                if request.status is Status.FINISHED:
                    break
                request.num_cached_tokens += 1
                request.output_ids.append(choice)
                self._advance(request, finished)
                if number == len(draft) or choice != draft[number]:
                    break
                right += 1
            request.num_drafted += len(draft)
            request.num_accepted += right
            if self.speculation is not None:
                self.speculation.drafter.learn(request, len(draft), right)

    def _drafts(self) -> list[Draft]:
        if self.speculation is None:
            return []
        prefilling = len(self._roster.prefilling)  # each may need a row, and moves by a token at least
        rows = min(self.max_logit_rows, self.max_tokens_per_step) - prefilling
        return self.speculation.drafts(self._roster, rows)

    def _advance(self, request: Request, finished: list[Request]) -> None:
        """What is due when a token was sampled: blocks are published, the request may end."""
        full = self._roster.publish(request)
        if request.num_cached_tokens >= request.final or request.output_ids[-1] in request.stop_ids:
            reason = request.end_reached(self.context)
            if reason is not None:
                self._roster.end(request, reason)
                finished.append(request)
        request.next_event = full if full < request.final else request.final

    def _make_room(self, request: Request) -> None:
        """Gets a decoding request the block for its next token, if need be from those of a higher rank, or ends it."""
        roster, cached = self._roster, request.num_cached_tokens
        if roster.extend(request, min(cached + 2, request.final)):
            return
        while not roster.extend(request, cached + 1):
            if roster.num_running == 1:
                self._fail(request)
                return
            last = roster.last
            roster.preempt(last)
            if last is request:
                return

    def _fail(self, request: Request) -> None:
        """Ends a request that does not fit although no other one runs."""
        request.error = CapacityError(self._too_large(request))
        self._roster.end(request, "error")
        self._failed.append(request)

    def _too_large(self, request: Request) -> str:
        manager = self.block_manager
        made = f" and {len(request.output_ids)} generated ones" if request.output_ids else ""
        return (
            f"request {request.id!r} with {len(request.prompt_ids)} prompt tokens{made} needs "
            f"{manager.blocks_for(request.num_tokens)} blocks of the KV cache; it has {manager.num_blocks} of "
            f"{manager.block_size} tokens, {manager.free_blocks} of them free. Shorten the prompt, lower max_tokens, "
            f"or give the cache more memory"
        )
