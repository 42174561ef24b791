"""``polyhead chat``: a conversation in the terminal, or with each line of a pipe as a turn."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

import click

from ..errors import CapacityError, RequestError, TemplateError
from .console import Console, is_terminal, pass_console, printable, verbosity
from .loading import load_settings, open_llm
from .options import settings, source_argument
from .prompts import MAX_BYTES, decoded

if TYPE_CHECKING:
    from ..engine import SamplingParams
    from ..llm import LLM

HELP = "/system TEXT sets the system message, /clear forgets the conversation, /exit (or Ctrl-D) ends"


@click.command("chat")
@source_argument
@settings(sampling=True)
@verbosity
@pass_console
def command(console: Console, source: str, overrides: list[str]) -> None:
    """Talk with a model.

    /clear forgets the conversation, /system TEXT sets the system message, /exit or Ctrl-D ends, Ctrl-C interrupts an
    answer. Without a terminal each line of standard input is a turn. Unless max_tokens is set, an answer ends when the
    model ends it or the context is full.
    """
    loaded = load_settings(console, source, overrides)
    with open_llm(console, loaded) as llm:
        params = llm.default_params
        if "max_tokens" not in loaded.config.sampling.model_fields_set:
            params = replace(params, max_tokens=max(llm.plan.context, params.min_tokens))
        if not llm.model.has_chat_template:
            raise TemplateError(
                f"{llm.model.name} has no chat template, so it cannot chat: it is probably a base model. "
                "polyhead run continues text with it; or give model.chat_template"
            )
        llm.model.chat_template  # noqa: B018 - a template that cannot be used is refused before the first question
        talk = Conversation(console, llm, params)
        if sys.stdin.isatty():
            console.note(f"polyhead: {HELP}")
        for line in _lines():
            if line.startswith("/"):
                if not talk.order(line):
                    break
            elif line.strip():
                talk.say(line)
    if talk.failed and not sys.stdin.isatty():
        raise click.exceptions.Exit(2)


class Conversation:
    """The messages so far, and what happens to a line."""

    def __init__(self, console: Console, llm: LLM, params: SamplingParams) -> None:
        self.console = console
        self.llm = llm
        self.params = params
        self.system = llm.config.system
        self.messages: list[dict[str, str]] = []
        self.failed = False

    def order(self, line: str) -> bool:
        """Carries out a line that begins with a slash; False where it ends the conversation."""
        word, _, rest = line.strip().partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word == "/clear":
            self.messages.clear()
            self.console.note("polyhead: the conversation is forgotten")
        elif word == "/system":
            self.system = rest.strip() or None
            self.console.note(f"polyhead: system message {'set' if self.system else 'removed'}")
        else:
            self.console.note(f"polyhead: {'' if word == '/help' else f'there is no {word}; '}{HELP}")
        return True

    def say(self, text: str) -> None:
        """Answers a user's message. One that does not fit is reported and taken back; the conversation stays."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            ids = self.llm.chat_prompt([*system, *asked])
            context = self.llm.plan.context
            if len(ids) >= context:
                raise RequestError(
                    f"the conversation with this message has {len(ids):,} tokens, and the context of {context:,} "
                    f"takes at most {context - 1:,}; the message is taken back. Write a shorter one, or /clear"
                )
            answer, reason = self._answer(ids)
        except (RequestError, CapacityError) as error:
            self.console.error(str(error))
            self.failed = True
            return
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        if reason == "interrupted":
            self.console.note("polyhead: interrupted")
        elif reason == "length":
            self.console.note(f"polyhead: the answer is cut: {self._limit(len(ids))}")

    def _limit(self, prompt_tokens: int) -> str:
        room = self.llm.plan.context - prompt_tokens
        if room <= self.params.max_tokens:
            return f"the context of {self.llm.plan.context:,} tokens is full; /clear makes room"
        return f"max_tokens is {self.params.max_tokens:,}"

    def _answer(self, ids: list[int]) -> tuple[str, str]:
        out = sys.stdout
        watched = is_terminal(sys.stdout)
        parts: list[str] = []
        reason = "interrupted"
        stream = self.llm.stream(ids, self.params)
        try:
            with _interrupts() as interrupted:
                for delta in stream:
                    parts.append(delta.text)
                    out.write(printable(delta.text) if watched else delta.text)
                    out.flush()
                    if delta.finish_reason is not None:
                        reason = delta.finish_reason
                    elif interrupted():
                        break
        finally:
            stream.close()
        answer = "".join(parts)
        if not answer.endswith("\n"):
            out.write("\n")
        out.flush()
        return answer, reason


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """While it lasts, the first Ctrl-C is only remembered, so that no step is broken off; the second one raises."""
    caught = [False]

    def handler(number: int, frame: FrameType | None) -> None:
        if caught[0]:
            raise KeyboardInterrupt
        caught[0] = True

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a job in the background, which Ctrl-C is not meant for
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: caught[0]
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """What the user types or pipes in, without line ends. Ctrl-C at the prompt only drops the line."""
    if not sys.stdin.isatty():
        stream = sys.stdin.buffer
        number = 0
        while data := stream.readline(MAX_BYTES + 1):
            number += 1
            if len(data) > MAX_BYTES:
                raise RequestError(f"line {number} of standard input has more than {MAX_BYTES:,} bytes")
            yield decoded(data, "standard input", number).rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() line editing and a history
    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:
                click.echo("> ", err=True, nl=False)
                line = sys.stdin.readline()
                if not line:
                    return
                yield line.rstrip("\n")
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\npolyhead: Ctrl-D or /exit ends", err=True)
