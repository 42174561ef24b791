"""Admission: which waiting requests start, with what is found of their beginnings, and who makes way for them.

Knows nothing of steps; it moves requests between the lists of a roster.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from .request import Request
from .roster import Roster


class Admission:
    """Starts requests from the head of the queue. A spare block is left for each running request: each may need one
    soon, and would take it from the newcomer.
    """

    def __init__(self, roster: Roster, max_sequences: int, max_tokens_per_step: int, max_logit_rows: int) -> None:
        self._roster = roster
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens_per_step
        self._max_rows = max_logit_rows

    def next(self) -> Request | None:
        """Starts what fits; returns the head of the queue if it does not fit although no other request runs."""
        while self._roster.waiting:
            found = self._found()
            head = self._roster.waiting[0]
            if found is None:
                return None
            if self._fits(head, found) or self._make_way(head, found):
                self._roster.start(head, found)
            else:
                return None if self._roster.num_running else head
        return None

    def _found(self) -> list[int] | None:
        """The blocks that the head of the queue would begin with; None if it had better wait."""
        roster, manager = self._roster, self._roster.blocks
        head, running = roster.waiting[0], roster.num_running
        full = running >= self._max_sequences or manager.free_blocks <= running
        if full and running and roster.last.rank < head.rank:  # nobody would make way, so the cheap answer holds
            return None
        before = self._taken_before(head)
        if before and before >= self._max_tokens - len(roster.decoding):
            return None
        reusable = 0 if head.cache_salt is None else (head.num_tokens - 1) // manager.block_size
        if head.num_scored < len(head.prompt_ids):  # what is scored must be computed
            reusable = min(reusable, (head.num_scored - 1) // manager.block_size)
        head.extend_keys(manager.block_size, reusable)
        found = manager.find(islice(head.block_keys, reusable))
        if len(found) < reusable and self._under_way(head.block_keys[len(found)], head):
            return None
        return found

    def _taken_before(self, head: Request) -> int:
        """How many tokens of the prompts before ``head`` the next step takes at most. Those that are scored take a row
        of logits each, of which there are so many for all prompts together.
        """
        tokens = rows = 0
        for request in self._roster.prefilling:
            if request.rank < head.rank:
                left = request.num_tokens - request.num_cached_tokens
                scores = min(left, _unscored(request))
                tokens += left - scores
                rows += scores
        return tokens + min(rows, self._max_rows)

    def _under_way(self, key: bytes, head: Request) -> bool:
        """Whether a request before ``head`` is about to compute the block of this key. One that is scored for many
        steps to come is not waited for: it would hold up all that wait behind the head.
        """
        size = self._roster.blocks.block_size
        for request in self._roster.prefilling:
            if request.rank < head.rank and _unscored(request) <= self._max_rows:
                request.extend_keys(size, request.num_tokens // size)
                if key in request.block_keys[request.num_published : request.num_published + 1]:
                    return True
        return False

    def _fits(self, head: Request, found: Sequence[int]) -> bool:
        running = self._roster.num_running
        return running < self._max_sequences and self._roster.blocks.can_allocate(head.num_tokens, running, found)

    def _make_way(self, head: Request, found: Sequence[int]) -> bool:
        """Sends requests of a higher rank than ``head`` back to the queue until it fits; none if that is not enough."""
        roster = self._roster
        higher = [r for r in (*roster.decoding, *roster.prefilling) if r.rank > head.rank]
        tables = [request.block_table for request in higher]
        spare = roster.num_running - len(higher)
        if not higher or not roster.blocks.can_allocate(head.num_tokens, spare, found, tables):
            return False
        while not self._fits(head, found):
            roster.preempt(roster.last)
        return True


def _unscored(request: Request) -> int:
    """How many tokens of its prompt are to be scored yet."""
    return len(request.prompt_ids) - request.num_scored
