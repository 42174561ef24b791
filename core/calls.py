"""Call: prompts given together by a task, on their way through the loop thread and back to the task's event loop.

Knows nothing of models or of how the loop runs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .deltas import Delta, Job


class Call:
    """One call of a task. To be made on the event loop that its news shall come to, the running one.

    The loop thread alone touches ``jobs``, and ``open``, the number of those that have not ended, until the call has
    ended. All else changes on the event loop alone, but for ``cancelled``, which anybody may set and nobody takes back.
    So nothing here needs a lock.
    """

    __slots__ = (
        "_changed",
        "_deltas",
        "_error",
        "_trace",
        "accepted",
        "cancelled",
        "each_delta",
        "ended",
        "jobs",
        "loop",
        "open",
    )

    def __init__(self, jobs: Sequence[Job], *, each_delta: bool) -> None:
        """``jobs`` are prepared and not queued. ``each_delta``: hand out every delta as it comes. Otherwise there is no
        news before all jobs have ended, and the deltas stay with the jobs.
        """
        self.jobs = jobs
        self.each_delta = each_delta
        self.loop = asyncio.get_running_loop()
        self.open = 0
        self.cancelled = self.accepted = self.ended = False
        self._deltas: deque[Delta] = deque()
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    def receive(self, news: News) -> None:
        """Takes in what the loop thread has sent."""
        self.accepted = True
        self._deltas.extend(news.deltas)
        if news.ended:
            self.end(news.error)
        self._changed.set()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come: whoever waits is told so, once the deltas that are there have been taken."""
        if not self.ended:
            self.ended = True
            self._error = error
            self._trace = None if error is None else error.__traceback__
        self._changed.set()

    async def until_accepted(self) -> None:
        """Waits until the jobs are queued. Raises the error if they were refused."""
        while not self.accepted and not self.ended:
            await self._change()
        if not self._deltas:
            self._raise()

    async def until_ended(self) -> Sequence[Job]:
        """Waits until all jobs have ended, and returns them. Raises the error if one ended with it."""
        while not self.ended:
            await self._change()
        self._raise()
        return self.jobs

    async def delta(self) -> Delta | None:
        """The next delta, None if the call has ended without an error. Raises the error if it ended with one."""
        while not self._deltas:
            if self.ended:
                self._raise()
                return None
            await self._change()
        return self._deltas.popleft()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _raise(self) -> None:
        if self._error is not None:  # may end other calls too, so it does not keep what raising it here adds
            raise self._error.with_traceback(self._trace)


@dataclass(frozen=True, slots=True)
class News:
    """What a turn of the loop thread brought for a call."""

    call: Call
    deltas: Sequence[Delta] = ()
    ended: bool = False
    error: BaseException | None = None
