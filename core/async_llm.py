"""AsyncLLM: the Python API for asyncio, on the same loop as the blocking LLM. AsyncStream: one of its generations.

Knows nothing of steps; a thread runs those, and nothing slow happens on an event loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from threading import Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from .calls import Call
from .completion import Completion
from .config import LoadedConfig
from .deltas import Delta, Job, TokenLogprob
from .engine import SamplingParams
from .errors import PolyheadError
from .llm import LLM
from .loop_thread import CLOSED, LoopThread
from .prompts import Prompt, is_one

if TYPE_CHECKING:
    from .plugins import Registry

__all__ = ["AsyncLLM", "AsyncStream"]


class AsyncLLM:
    """A language model for tasks: what many of them ask, on any event loops of any threads, runs as one batch.

    ``source`` and the options are those of :class:`LLM`, or ``source`` is an LLM, which other threads may use at the
    same time, and which is closed by whoever opened it. Making an AsyncLLM loads nothing: ``async with``, :meth:`open`
    or the first request does, in a thread (where ``progress`` is called too), and raises what LLM raises.

    A request ends early, and its memory is free after the step under way, when its task is cancelled or runs into a
    timeout, or its stream is closed or dropped. Others never notice. Errors are raised where the result is awaited,
    none when a stream is made. If the AsyncLLM is closed meanwhile, that is PolyheadError.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any] | LoadedConfig | LLM,
        *,
        overrides: Sequence[str] = (),
        registry: Registry | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._closed = False
        self._opening = Lock()
        self._thread: LoopThread | None = None
        self._llm: LLM | None = None
        self._load: Callable[[], LLM]
        if isinstance(source, LLM):
            if overrides or registry is not None or progress is not None:
                raise TypeError("overrides, registry and progress are for a model to be loaded, but an LLM was given")
            self._close_llm = False
            self._load = lambda: source
            self._begin()
        else:
            self._close_llm = True
            self._load = lambda: LLM(source, overrides=overrides, registry=registry, progress=progress)

    async def open(self) -> AsyncLLM:
        """Loads the model, if that was not done yet, and returns the AsyncLLM."""
        await self._opened()
        return self

    async def __aenter__(self) -> AsyncLLM:
        try:
            return await self.open()
        except BaseException:  # cancelled, perhaps, and the model will be there in a moment: nobody else would close it
            self._closed = True
            Thread(target=self._close, name="polyhead-close").start()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends all requests with PolyheadError and the thread, and returns the model's memory. Safe to call twice.

        An LLM that was given stays open, without the requests of this AsyncLLM.
        """
        self._closed = True
        await asyncio.to_thread(self._close)

    def __del__(self) -> None:
        # The collector may run this anywhere, so nothing here takes a lock.
        thread = getattr(self, "_thread", None)
        if thread is not None:
            thread.stop()

    @property
    def llm(self) -> LLM:
        """The blocking LLM on the same loop: its ``tokenizer``, ``plan`` and ``config``, and for use by other threads.

        Its methods wait: on an event loop, call them with ``asyncio.to_thread``. Raises PolyheadError before the model
        is loaded.
        """
        if self._llm is None:
            raise PolyheadError("the model is not loaded yet: use `async with AsyncLLM(…)` or `await llm.open()`")
        return self._llm

    @overload
    async def generate(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
        self, prompts: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> Completion: ...

    @overload
    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[Completion]: ...

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Completion | list[Completion]:
        """Continues a prompt, a string or a list of token ids; or each of a list of prompts, in their order.

        As :meth:`LLM.generate`, but that one prompt, not in a list, gives one Completion. Where a prompt fails, the
        others of the same call end with it.
        """
        llm, thread = await self._opened()

        def take_in() -> tuple[list[Job], bool]:
            return llm._prepare(prompts, params, priority), is_one(prompts)

        prepared, one = await asyncio.to_thread(take_in)
        call = Call(prepared, each_delta=False)
        try:
            thread.submit(call)
            jobs = await call.until_ended()
        except BaseException:
            thread.cancel(call)
            raise
        completions = await asyncio.to_thread(_completions, jobs)
        return completions[0] if one else completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> AsyncStream:
        """Continues one prompt and yields what each step adds.

        Raises as :meth:`LLM.stream`, but at the first iteration; nothing happens before that. :meth:`AsyncStream.start`
        takes the prompt in without waiting for the first delta.
        """
        return AsyncStream(self, lambda llm: llm._prepare_stream(prompt, params, priority))

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """Answers a conversation, as :meth:`LLM.chat`."""
        llm, _ = await self._opened()
        return await self.generate(await asyncio.to_thread(llm.chat_prompt, messages, tools=tools), params)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> AsyncStream:
        """As :meth:`chat`, yielding what each step adds. Raises as :meth:`stream`, and TemplateError."""
        return AsyncStream(self, lambda llm: llm._prepare_stream(llm.chat_prompt(messages, tools=tools), params, 0))

    async def _opened(self) -> tuple[LLM, LoopThread]:
        if self._closed:
            raise PolyheadError(CLOSED)
        if self._llm is None or self._thread is None:
            return await asyncio.to_thread(self._begin)
        return self._llm, self._thread

    def _begin(self) -> tuple[LLM, LoopThread]:
        with self._opening:
            if self._closed:  # while this waited
                raise PolyheadError(CLOSED)
            if self._llm is None or self._thread is None:
                llm = self._load()
                self._llm, self._thread = llm, LoopThread(llm)
            return self._llm, self._thread

    def _close(self) -> None:
        with self._opening:  # not while it is loading
            if self._thread is not None:
                self._thread.close()
            if self._llm is not None and self._close_llm:
                self._llm.close()


class AsyncStream(AsyncIterator[Delta]):
    """The deltas of one generation as they come, none lost however late they are read.

    It belongs to the event loop on which it started. It aborts the generation when closed or dropped, and when the task
    that waits for a delta is cancelled.
    """

    def __init__(self, owner: AsyncLLM, take_in: Callable[[LLM], Job]) -> None:
        self._owner = owner
        self._take_in = take_in
        self._starting = asyncio.Lock()
        self._call: Call | None = None
        self._thread: LoopThread | None = None
        self._ended = False

    @property
    def _job(self) -> Job | None:
        return None if self._call is None else self._call.jobs[0]

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as it was taken in; empty before the stream has started."""
        return () if self._job is None else self._job.prompt_ids

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens were found in the KV cache and not computed; 0 before the first delta."""
        return 0 if self._job is None else self._job.cached_tokens

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """As of a Completion, whole from the first delta on; None if not asked for, or before the stream starts."""
        scores = None if self._job is None else self._job.prompt_logprobs
        return None if scores is None else tuple(scores)

    @property
    def drafted_tokens(self) -> int:
        """How many tokens were guessed so far."""
        return 0 if self._job is None else self._job.requests[0].num_drafted

    @property
    def accepted_tokens(self) -> int:
        """How many of these were right."""
        return 0 if self._job is None else self._job.requests[0].num_accepted

    async def start(self) -> None:
        """Takes the prompt in and queues it, once. Raises what is wrong with it. Iterating does this by itself."""
        try:
            async with self._starting:
                if self._call is None and not self._ended:
                    llm, self._thread = await self._owner._opened()
                    job = await asyncio.to_thread(self._take_in, llm)
                    if not self._ended:  # closed by another task meanwhile
                        self._call = Call([job], each_delta=True)
                        self._thread.submit(self._call)
            if self._call is not None:
                await self._call.until_accepted()
        except BaseException:
            self._end()
            raise

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        if self._call is None:
            await self.start()
        try:
            delta = None if self._call is None else await self._call.delta()
        except BaseException:
            self._end()
            raise
        if delta is None:  # closed by another task, or the last delta went to one
            raise StopAsyncIteration
        if delta.finish_reason is not None:
            self._ended = True
        return delta

    async def aclose(self) -> None:
        """Ends the generation; its KV blocks are free after the step under way. Safe to call twice."""
        self._end()

    def _end(self) -> None:
        self._cancel()
        self._ended = True
        if self._call is not None:
            self._call.end()

    def _cancel(self) -> None:
        if not self._ended and self._call is not None and self._thread is not None:
            self._thread.cancel(self._call)

    def __del__(self) -> None:
        # The collector may run this at any point, on any thread: the call's task is not told, as there is none.
        self._cancel()


def _completions(jobs: Sequence[Job]) -> list[Completion]:
    return [Completion.of(job, list(job.deltas)) for job in jobs]
