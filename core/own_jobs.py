"""OwnJobs: the jobs of one of several users of an LLM's loop, and which of them have news, whoever's step brought it.

Knows nothing of threads or event loops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .deltas import Job
    from .generation import Generation
    from .llm import LLM


class OwnJobs:
    """One user's way to the loop that it shares: ``with own.turn() as generation``, and in it the methods below.

    ``Generation.step`` returns the jobs that its step changed, to whoever called it. Where several users step, each
    moves the jobs of all, so what a user's own steps return is not all that happened to its jobs. A step cannot tell
    the other users for sure, as an interrupt may end it anywhere; they look, where others had a turn.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._jobs: dict[str, Job] = {}
        self._turn = 0
        self._others = False

    def __bool__(self) -> bool:
        """Whether any job was not aborted yet. Those that have ended count too."""
        return bool(self._jobs)

    @contextmanager
    def turn(self) -> Iterator[Generation]:
        """The generation loop, for this thread alone. Raises PolyheadError if the LLM is closed."""
        with self._llm._engine() as generation:
            turn, self._turn = self._turn, self._llm._turns
            self._others |= self._turn != turn + 1
            yield generation

    def queue(self, generation: Generation, job: Job) -> None:
        """Queues a prepared job. Raises as :meth:`Generation.queue`; the job is there until it is aborted even so."""
        self._jobs[job.id] = job
        generation.queue(job)

    def abort(self, generation: Generation, job_ids: Iterable[str]) -> None:
        """Ends jobs, where they have not ended, and forgets them. Ids of others or of none are ignored."""
        for job_id in job_ids:
            if job_id in self._jobs:
                generation.abort(job_id)
                del self._jobs[job_id]

    def step(self, generation: Generation) -> list[Job]:
        """Runs one step, if there is any work, and returns the own jobs that have new deltas or ended with an error.

        If others had a turn since the last step, they are all own jobs that hold deltas or an error, new or not.
        """
        jobs = generation.step() if generation.has_work else []
        if self._others:
            self._others = False
            return [job for job in self._jobs.values() if job.deltas or job.error is not None]
        return [job for job in jobs if job.id in self._jobs]
