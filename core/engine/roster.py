"""Roster: which requests wait and which run, in the order of their ranks, and the blocks that those that run hold.

Knows nothing of steps or budgets; every change leaves blocks and lists in agreement.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise
from operator import attrgetter

from ..errors import RequestError
from .block_manager import BlockManager
from .request import FinishReason, Request, Status

_rank = attrgetter("rank")


class Roster:
    """Three lists sorted by rank: ``waiting`` hold no blocks, ``prefilling`` have more than one token to compute before
    the next is sampled or have just started, ``decoding`` have exactly one. Only this class changes them.
    """

    __slots__ = ("_by_id", "blocks", "decoding", "prefilling", "waiting")

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.waiting: list[Request] = []
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self._by_id: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def last(self) -> Request:
        """The running request of the highest rank."""
        return max((requests[-1] for requests in (self.prefilling, self.decoding) if requests), key=_rank)

    def get(self, request_id: str) -> Request | None:
        """The request of this id, unless it has ended."""
        return self._by_id.get(request_id)

    def check_new(self, request: Request) -> None:
        """Raises ``RequestError`` for a request that was added before, or whose id is in use."""
        if request.id in self._by_id:
            raise RequestError(f"request id {request.id!r} is in use; give each request an id of its own")
        if request.status is not Status.WAITING or request.output_ids:
            raise RequestError(f"request {request.id!r} was added before; make a new one")

    def add(self, request: Request) -> None:
        """Queues a new request that has a rank."""
        self._by_id[request.id] = request
        insort(self.waiting, request, key=_rank)

    def start(self, request: Request, found: list[int]) -> None:
        """Moves the head of the queue to the running requests, with the blocks that were found for its beginning."""
        if self.waiting.pop(0) is not request:
            raise RuntimeError(f"{request!r} is not the head of the queue")
        self.blocks.reuse(request.block_table, found)
        self.extend(request, request.num_tokens)
        request.num_published = len(found)
        request.num_cached_tokens = len(found) * self.blocks.block_size
        if not request.num_preemptions:
            request.num_reused_tokens = request.num_cached_tokens
        request.status = Status.RUNNING
        insort(self.prefilling, request, key=_rank)

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Gets a running request blocks for so many tokens; False if there are not enough."""
        if not self.blocks.extend(request.block_table, num_tokens):
            return False
        request.held_tokens = len(request.block_table) * self.blocks.block_size
        return True

    def prefilled(self, request: Request) -> None:
        """From now on the request decodes."""
        self.prefilling.remove(request)
        insort(self.decoding, request, key=_rank)

    def preempt(self, request: Request) -> None:
        """Sends a running request back to the queue, without blocks."""
        self._leave(request)
        request.num_preemptions += 1
        request.status = Status.WAITING
        insort(self.waiting, request, key=_rank)

    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request that waits or runs."""
        if request.status is Status.RUNNING:
            self._leave(request)
        else:
            index = bisect_left(self.waiting, request.rank, key=_rank)
            if self.waiting[index : index + 1] != [request]:
                raise RuntimeError(f"{request!r} is not in the queue")
            del self.waiting[index]
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self._by_id[request.id]

    def publish(self, request: Request) -> int:
        """Lets others find the blocks of a running request that are full by now. All cached tokens are written.

        Returns the number of tokens at which the next block will be full.
        """
        if request.cache_salt is None:
            return request.final
        size, done = self.blocks.block_size, request.num_published
        full = request.num_cached_tokens // size
        if full > done:
            request.extend_keys(size, full)
            for index in range(done, full):
                self.blocks.publish(request.block_table[index], request.block_keys[index])
            request.num_published = full
        return (full + 1) * size

    def check_integrity(self) -> None:
        """Recounts blocks and lists; raises ``RuntimeError`` where they disagree."""
        running = [*self.prefilling, *self.decoding]
        self.blocks.check_integrity(request.block_table for request in running)
        listed = [*running, *self.waiting]
        if len(listed) != len(self) or any(self.get(request.id) is not request for request in listed):
            raise RuntimeError("running and waiting requests are not those that were added")
        for requests in (self.waiting, self.prefilling, self.decoding):
            if any(first.rank >= second.rank for first, second in pairwise(requests)):
                raise RuntimeError("requests are not in the order of their ranks")
        for request in self.waiting:
            if request.status is not Status.WAITING or request.block_table or request.num_cached_tokens:
                raise RuntimeError(f"{request!r} waits but is not in the state of one that waits")
        size = self.blocks.block_size
        decoding = {id(request) for request in self.decoding}
        for request in running:
            left = request.num_tokens - request.num_cached_tokens
            sound = left == 1 if id(request) in decoding else left > 0
            sound = sound and request.num_tokens <= request.held_tokens + 1
            sound = sound and request.held_tokens == len(request.block_table) * size
            published = 0 if request.cache_salt is None else request.num_cached_tokens // size
            if request.status is not Status.RUNNING or not sound or request.num_published != published:
                raise RuntimeError(f"{request!r} runs but is not in the state of one that runs")

    def _leave(self, request: Request) -> None:
        """Takes a running request out and gives up its blocks. A step under way may still name them by the old list."""
        (self.prefilling if request in self.prefilling else self.decoding).remove(request)
        self.blocks.free(request.block_table)
        request.block_table = []
        request.held_tokens = request.num_cached_tokens = request.num_published = 0
