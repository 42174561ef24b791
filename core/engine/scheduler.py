"""Scheduler: which tokens of which requests the next step computes.

Pure policy: knows nothing of devices, text or sampling. Not thread-safe; one loop owns it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..errors import CapacityError, ConfigError, RequestError
from .block_manager import BlockManager
from .request import FinishReason, Request, Status
from .step import ScheduledStep


class Scheduler:
    """First come, first served, with chunked prefill beside decodes, and preemption by recomputing.

    Two calls make a step, and nothing a request has computed moves but in the second::

        while scheduler.has_work:
            step = scheduler.schedule()
            ids = run(step) if step.chunks else []       # one token id for each of step.sampled
            finished = scheduler.postprocess(step, ids)

    Running and waiting requests, one after the other, are always in order of arrival. A request is admitted when the
    blocks for all its tokens so far are free; the one at the head of the queue is never overtaken. A running request
    that needs a block when none is free takes those of the youngest running one, which goes back to the head of the
    queue and is computed again later. So the oldest request gets at least one token further in every step, and no
    request waits for ever.
    """

    def __init__(self, block_manager: BlockManager, max_tokens_per_step: int, max_sequences: int, context: int) -> None:
        """``context``: the most tokens, prompt and output, that one request may have; it ends there with "length".

        At most ``min(max_sequences, max_tokens_per_step)`` requests run at once, so that each can decode in each step.
        """
        limits = {"max_tokens_per_step": max_tokens_per_step, "max_sequences": max_sequences}
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if context < 2:
            raise ConfigError(f"context must be at least 2 (a prompt token and a generated one), got {context}")
        self.block_manager = block_manager
        self.max_tokens_per_step = max_tokens_per_step
        self.max_sequences = min(max_sequences, max_tokens_per_step)
        self.context = context
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._by_id: dict[str, Request] = {}
        self._failed: list[Request] = []  # ended by schedule(), not yet returned by postprocess()
        self._step: ScheduledStep | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks: new ones and preempted ones."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are being computed."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether a request has yet to end or to be returned as ended."""
        return bool(self._running or self._waiting or self._failed)

    def add(self, request: Request) -> None:
        """Queues a new request.

        Raises ``RequestError`` if its id is in use or its prompt leaves no room in the context for one token more, and
        ``CapacityError`` if its prompt would not fit into an empty cache.
        """
        length = len(request.prompt_ids)
        if request.id in self._by_id:
            raise RequestError(f"request id {request.id!r} is in use; give each request an id of its own")
        if request.status is not Status.WAITING or request.output_ids:
            raise RequestError(f"request {request.id!r} was added before; make a new one")
        if length >= self.context:
            raise RequestError(
                f"the prompt has {length} tokens; the context of {self.context} takes at "
                f"most {self.context - 1} and one generated token. Shorten the prompt or raise runtime.context"
            )
        if length > self.block_manager.capacity:
            raise CapacityError(self._too_large(request))
        self._by_id[request.id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request with "abort" and frees its blocks; returns it, or None if there is none or it has ended.

        Allowed at any time, between ``schedule`` and ``postprocess`` too: what that step computes for it is dropped.
        """
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: FinishReason = "stop") -> Request | None:
        """Ends a request for a reason that only the caller sees, such as a stop string in the text. As ``abort``."""
        request = self._by_id.get(request_id)
        if request is None or request.finished:
            return None
        self._end(request, reason)
        return request

    def schedule(self) -> ScheduledStep:
        """Chooses the next step: a token for each decode, then prefill chunks with what is left of the budget.

        Calling it again without ``postprocess``, after a step that failed, plans that work anew.
        """
        budget = self.max_tokens_per_step
        pieces: list[tuple[Request, int]] = []
        index = 0
        while index < len(self._running):
            request = self._running[index]
            if request.num_tokens - request.num_cached_tokens > 1:
                index += 1  # still in prefill
            elif self._make_room(request):
                pieces.append((request, 1))
                budget -= 1
                index += 1
            # else: it was the youngest and does not run any more, so the loop ends here
        for request in self._running:
            remaining = request.num_tokens - request.num_cached_tokens
            if remaining > 1 and budget:
                chunk = min(remaining, budget)
                pieces.append((request, chunk))
                budget -= chunk
        # What was preempted above does not come back here: it needs all the blocks that it gave up, and one is taken.
        while budget and self._admit():
            request = self._running[-1]
            chunk = min(request.num_tokens, budget)
            pieces.append((request, chunk))
            budget -= chunk
        self._step = ScheduledStep.of(pieces)
        return self._step

    def postprocess(self, step: ScheduledStep, sampled: Sequence[int]) -> list[Request]:
        """Records that the step was computed and which token ids were sampled, one for each of ``step.sampled``.

        Returns the requests that ended since the last call, in no promised order, without those ended by ``abort`` or
        ``finish``. One with ``finish_reason`` "error" did not fit into the cache and has the ``error`` to report.
        """
        if step is not self._step:
            raise RuntimeError("postprocess takes the step that the last call of schedule returned, once")
        if len(sampled) != len(step.sampled):
            raise RuntimeError(f"the step samples {len(step.sampled)} tokens, but {len(sampled)} were given")
        self._step = None
        finished, self._failed = self._failed, []
        ids = iter(sampled)
        for chunk in step.chunks:
            request = chunk.request
            token = next(ids) if chunk.samples else None
            if request.finished:  # aborted since
                continue
            request.num_cached_tokens += chunk.length
            if token is not None:
                request.output_ids.append(int(token))
                reason = request.end_reached(self.context)
                if reason is not None:
                    self._end(request, reason)
                    finished.append(request)
        return finished

    def check_integrity(self) -> None:
        """Recounts blocks and queues; raises ``RuntimeError`` where they disagree. For tests and idle moments."""
        self.block_manager.check_integrity(request.block_table for request in self._running)
        if [*self._running, *self._waiting] != list(self._by_id.values()):
            raise RuntimeError("running and waiting requests are not those that were added, in order of arrival")
        for request in self._waiting:
            if request.status is not Status.WAITING or request.block_table or request.num_cached_tokens:
                raise RuntimeError(f"{request!r} waits but is not in the state of one that waits")
        for request in self._running:
            held = len(request.block_table) * self.block_manager.block_size
            if request.status is not Status.RUNNING or not request.num_cached_tokens < request.num_tokens <= held + 1:
                raise RuntimeError(f"{request!r} runs but is not in the state of one that runs")

    def _make_room(self, request: Request) -> bool:
        """Gets a decoding request the block for its last token, if need be from the youngest running ones.

        False: the request could not go on and does not run any more.
        """
        while not self.block_manager.extend(request.block_table, request.num_tokens):
            if len(self._running) == 1:
                self._fail(request)
                return False
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        return True

    def _admit(self) -> bool:
        """Moves the head of the queue to the running requests, if it fits; one that never will is ended with an error.

        A spare block is left for each running request: each may need one soon, and would take it from the newcomer.
        """
        while self._waiting and len(self._running) < self.max_sequences:
            request = self._waiting[0]
            if self.block_manager.can_allocate(request.num_tokens, spare=len(self._running)):
                self._waiting.popleft()
                self.block_manager.extend(request.block_table, request.num_tokens)
                request.status = Status.RUNNING
                self._running.append(request)
                return True
            if self._running:
                return False
            self._fail(request)
        return False

    def _preempt(self, request: Request) -> None:
        """Sends the youngest running request back to the head of the queue, without blocks."""
        self._running.pop()
        self.block_manager.free(request.block_table)
        request.num_cached_tokens = 0
        request.num_preemptions += 1
        request.status = Status.WAITING
        self._waiting.appendleft(request)

    def _fail(self, request: Request) -> None:
        """Ends a request that does not fit although no other one runs."""
        request.error = CapacityError(self._too_large(request))
        self._end(request, "error")
        self._failed.append(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self.block_manager.free(request.block_table)
        else:
            self._waiting.remove(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self._by_id[request.id]

    def _too_large(self, request: Request) -> str:
        manager = self.block_manager
        made = f" and {len(request.output_ids)} generated ones" if request.output_ids else ""
        return (
            f"request {request.id!r} with {len(request.prompt_ids)} prompt tokens{made} needs "
            f"{manager.blocks_for(request.num_tokens)} blocks of the KV cache; it has {manager.num_blocks} of "
            f"{manager.block_size} tokens, {manager.free_blocks} of them free. Shorten the prompt, lower max_tokens, "
            f"or give the cache more memory"
        )
