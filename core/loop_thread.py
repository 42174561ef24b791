"""LoopThread: the thread that runs the generation loop of an LLM for the calls of tasks in any number of event loops.

Knows nothing of prompts as users write them, or of how a task waits.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING

from .calls import Call, News
from .errors import PolyheadError, summary
from .own_jobs import OwnJobs

if TYPE_CHECKING:
    from .deltas import Delta, Job
    from .generation import Generation
    from .llm import LLM

CLOSED = "the AsyncLLM is closed"


class LoopThread:
    """Sleeps while no call is open. Otherwise takes turn after turn: what came in, one step, what it brought.

    A turn wakes each event loop once at most, however many calls it has news for. A failure of the model ends the
    calls that it concerns; an unexpected exception ends all that are open. In both cases the thread goes on.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._inbox: SimpleQueue[Call | None] = SimpleQueue()  # its put() may interrupt itself, as collectors do
        self._thread: Thread | None = None
        self._refusal: str | None = None  # why no more calls are taken
        self._lock = Lock()  # of the two above
        self._own = OwnJobs(llm)
        self._open: dict[AbstractEventLoop, dict[Call, None]] = {}  # by where their tasks are
        self._calls: dict[str, Call] = {}  # by job that has not ended
        self._came: list[Call] = []
        self._news: dict[AbstractEventLoop, list[News]] = {}

    def submit(self, call: Call) -> None:
        """Hands over a new call. Raises PolyheadError if the thread was closed. The first one starts the thread."""
        with self._lock:
            if self._refusal is not None:
                raise PolyheadError(self._refusal)
            if self._thread is None:
                # A daemon: a model that nobody closed must not keep the interpreter from ending.
                self._thread = Thread(target=self._run, name="polyhead-loop", daemon=True)
                self._thread.start()
            self._inbox.put(call)

    def cancel(self, call: Call) -> None:
        """Ends a call before the next step and frees its blocks. From any thread, at any time, also by a collector."""
        call.cancelled = True
        self._inbox.put(call)

    def stop(self) -> None:
        """Makes the thread end, without waiting. As :meth:`cancel`, callable from anywhere."""
        self._inbox.put(None)

    def close(self) -> None:
        """Ends all calls with an error, and the thread; returns when it has ended. Safe to call twice."""
        with self._lock:
            if self._refusal is None:
                self._refusal = CLOSED
            thread = self._thread
        if thread is not None:
            self.stop()
            thread.join()

    def _run(self) -> None:
        try:
            while self._receive():
                self._turn()
            self._end_all(PolyheadError(CLOSED))
        except BaseException as error:  # from ending what was open: no state to go on with
            with self._lock:
                self._refusal = f"the thread that runs the model has ended: {summary(error)}"
            while not self._inbox.empty():
                self._note(self._inbox.get())
            self._tell_all(error)
            raise
        finally:
            self._wake()

    def _receive(self) -> bool:
        """Takes in what came, and waits for something if no call is open. False: the thread shall end."""
        wait = not self._open
        while True:
            try:
                call = self._inbox.get(block=wait)
            except Empty:
                return True
            if call is None:
                return False
            self._note(call)
            wait = False

    def _note(self, call: Call | None) -> None:
        if call is not None:
            if not call.cancelled:
                self._open.setdefault(call.loop, {})[call] = None
            self._came.append(call)

    def _turn(self) -> None:
        try:
            with self._own.turn() as generation:
                came, self._came = self._came, []
                for call in came:
                    if call.cancelled:
                        self._forget(generation, call)
                    else:
                        self._start(generation, call)
                for loop in [loop for loop in self._open if loop.is_closed()]:  # nobody is left to take anything
                    for call in list(self._open[loop]):
                        self._forget(generation, call)
                if self._own:
                    self._step(generation)
        except BaseException as error:  # of the LLM, if it was closed; otherwise a fault, or no memory
            self._end_all(error)
        self._wake()

    def _start(self, generation: Generation, call: Call) -> None:
        call.open = len(call.jobs)
        try:
            for job in call.jobs:
                self._calls[job.id] = call
                self._own.queue(generation, job)
        except PolyheadError as error:
            self._refuse(generation, call, error)
        else:
            self._tell(News(call))

    def _step(self, generation: Generation) -> None:
        for job in self._own.step(generation):
            call = self._calls.get(job.id)
            if call is not None:  # else it ended for another of its jobs
                self._hand_out(generation, call, job)
        if self._own and not generation.has_work:
            raise RuntimeError("requests are open, but there is nothing to compute for them")

    def _hand_out(self, generation: Generation, call: Call, job: Job) -> None:
        deltas: list[Delta] = []
        if call.each_delta:
            deltas += job.deltas
            job.deltas.clear()
        if job.done:
            call.open -= 1
            del self._calls[job.id]
            self._own.abort(generation, [job.id])  # what it holds, if anything, are deltas to be read from it
        ended = not call.open or job.error is not None
        if ended:
            self._forget(generation, call)
        if ended or deltas:
            self._tell(News(call, deltas, ended, job.error))

    def _refuse(self, generation: Generation, call: Call, error: Exception) -> None:
        self._forget(generation, call)
        self._tell(News(call, ended=True, error=error))

    def _forget(self, generation: Generation, call: Call) -> None:
        self._own.abort(generation, [job.id for job in call.jobs])
        for job in call.jobs:
            self._calls.pop(job.id, None)
        calls = self._open.get(call.loop, {})
        calls.pop(call, None)
        if not calls:
            self._open.pop(call.loop, None)

    def _end_all(self, error: BaseException) -> None:
        self._tell_all(error)
        jobs = list(self._calls)
        self._calls.clear()
        if jobs:
            try:
                with self._own.turn() as generation:
                    self._own.abort(generation, jobs)
            except PolyheadError:  # the LLM is closed, and has no blocks to free
                self._own = OwnJobs(self._llm)

    def _tell_all(self, error: BaseException) -> None:
        for calls in self._open.values():
            for call in calls:
                self._tell(News(call, ended=True, error=error))
        self._open.clear()
        self._came.clear()

    def _tell(self, news: News) -> None:
        self._news.setdefault(news.call.loop, []).append(news)

    def _wake(self) -> None:
        news, self._news = self._news, {}
        for loop, items in news.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:
                if not loop.is_closed():
                    raise


def _deliver(items: list[News]) -> None:
    for news in items:
        news.call.receive(news)
