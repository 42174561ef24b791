"""``polyhead run``: prompts in, continuations or answers out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from ..errors import TemplateError
from .console import Console, guesses_text, is_terminal, pass_console, printable, verbosity
from .loading import load_settings, look_for_model, open_llm
from .options import settings, source_argument
from .prompts import gather

if TYPE_CHECKING:
    from ..generation import Delta, TokenLogprob
    from ..llm import LLM, Stream


@click.command("run")
@source_argument
@click.option("-p", "--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; repeat it for several.")
@click.option(
    "--prompt-file", "files", multiple=True, metavar="FILE", help="A file with a prompt; - is standard input."
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each prompt, with ids and timing.")
@settings(sampling=True)
@verbosity
@pass_console
def command(
    console: Console, source: str, texts: tuple[str, ...], files: tuple[str, ...], as_json: bool, overrides: list[str]
) -> None:
    """Continue or answer prompts.

    Prompts are those of -p and --prompt-file; without them the config's; without one there, what is piped in. One line
    end at the end of a file is taken off. A model with a chat template answers the prompt as a user's message (set
    chat=false to continue it as text). Several prompts run as one batch.
    """
    loaded = load_settings(console, source, overrides)
    look_for_model(loaded)
    prompts = gather(texts, files, loaded.config)
    with open_llm(console, loaded) as llm:
        jobs = start(llm, prompts)
        began = time.perf_counter()
        try:
            if len(jobs) == 1 and not as_json:
                _stream_out(jobs[0])
            else:
                for number, job in enumerate(_finished(jobs), start=1):
                    _write(console, llm, job, number, len(jobs), as_json)
        finally:
            for job in jobs:
                job.stream.close()
        console.note(_closing(llm, jobs, time.perf_counter() - began))


@dataclass
class Job:
    """One prompt on its way: what came so far and when (seconds of ``time.perf_counter``)."""

    prompt: str
    prompt_tokens: int
    stream: Stream
    started: float
    deltas: list[Delta] = field(default_factory=list)
    first: float | None = None
    last: float = 0.0

    def advance(self) -> Delta | None:
        """The next delta, or None at the end."""
        delta = next(self.stream, None)
        if delta is not None:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.deltas.append(delta)
        return delta

    @property
    def done(self) -> bool:
        return bool(self.deltas) and self.deltas[-1].finish_reason is not None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


def chats(llm: LLM) -> bool:
    """Whether prompts are a user's messages: what the config says, or where it says nothing, if the model can."""
    wanted: bool | None = llm.config.chat
    if wanted is None:
        wanted = llm.model.has_chat_template
        if llm.config.system is not None and not wanted:
            raise TemplateError(
                f"the config has a system message, but {llm.model.name} has no chat template to put it in; "
                "remove system, or give model.chat_template"
            )
    return wanted


def conversation(llm: LLM, prompt: str) -> list[dict[str, str]]:
    """A prompt as messages, after the config's system message."""
    system = llm.config.system
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]


def start(llm: LLM, prompts: list[str]) -> list[Job]:
    """Queues all prompts, before anything runs. Raises RequestError if any of them cannot be run."""
    chat = chats(llm)
    ids = [llm.chat_prompt(conversation(llm, prompt)) if chat else llm.encode(prompt) for prompt in prompts]
    jobs: list[Job] = []
    try:
        for prompt, tokens in zip(prompts, ids, strict=True):
            jobs.append(Job(prompt, len(tokens), llm.stream(tokens), time.perf_counter()))
    except BaseException:
        for job in jobs:
            job.stream.close()
        raise
    return jobs


def _finished(jobs: list[Job]) -> Iterator[Job]:
    """The jobs in their order, each as soon as it and those before it are done.

    Taking turns gives every token the time it came at: the first job that has no delta waiting makes a step for all.
    """
    for job in jobs:
        while not job.done:
            for other in jobs:
                if not other.done:
                    other.advance()
        yield job


def _stream_out(job: Job) -> None:
    out = sys.stdout
    watched = is_terminal(sys.stdout)
    text = ""
    try:
        while not job.done:
            delta = job.advance()
            if delta is not None and delta.text:
                text = delta.text
                out.write(printable(text) if watched else text)
                out.flush()
    finally:
        if not text.endswith("\n"):
            out.write("\n")


def _write(console: Console, llm: LLM, job: Job, number: int, count: int, as_json: bool) -> None:
    if as_json:
        console.json(record(llm, job), indent=None)
        return
    line = " ".join(job.prompt.split())
    shown = line if len(line) <= 60 else line[:59] + "…"
    console.result(f"{console.heading(f'=== {number} of {count}: {shown} ===')}\n{job.text}")


def record(llm: LLM, job: Job) -> dict[str, Any]:
    """A finished job as what ``--json`` prints."""
    ids = job.token_ids
    seconds = job.last - job.started
    logprobs = None
    if job.deltas[0].logprobs is not None:
        logprobs = [_logprob(llm, item) for delta in job.deltas for item in delta.logprobs or ()]
    scores = job.stream.prompt_logprobs
    return {
        "prompt": job.prompt,
        "text": job.text,
        "token_ids": ids,
        "finish_reason": job.deltas[-1].finish_reason,
        "logprobs": logprobs,
        "prompt_logprobs": scores and [None if item is None else _logprob(llm, item) for item in scores],
        "drafted_tokens": job.stream.drafted_tokens,
        "accepted_tokens": job.stream.accepted_tokens,
        "timing": {
            "prompt_tokens": job.prompt_tokens,
            "generated_tokens": len(ids),
            "first_token_seconds": round((job.first or job.last) - job.started, 6),
            "seconds": round(seconds, 6),
            "tokens_per_second": round(len(ids) / seconds, 3) if seconds else None,
        },
    }


def _logprob(llm: LLM, item: TokenLogprob) -> dict[str, Any]:
    known = item.token_id < llm.tokenizer.vocab_size  # rows that only pad the embedding have no name
    return {
        "token_id": item.token_id,
        "token": llm.tokenizer.token(item.token_id) if known else None,
        "logprob": item.logprob if math.isfinite(item.logprob) else None,
        "top": [[token, value] for token, value in item.top],
    }


def _closing(llm: LLM, jobs: list[Job], seconds: float) -> str:
    made = sum(len(job.token_ids) for job in jobs)
    first = min((job.first or job.last) - job.started for job in jobs)
    cut = sum(job.deltas[-1].finish_reason == "length" for job in jobs)
    which = "the text was" if len(jobs) == 1 else f"{cut} of {len(jobs)} texts were"
    full = any(job.prompt_tokens + len(job.token_ids) >= llm.plan.context for job in jobs)
    why = (
        f"the context of {llm.plan.context:,}"
        if full
        else f"max_tokens {llm.default_params.max_tokens:,} (raise it with -n)"
    )
    return (
        f"polyhead: {sum(job.prompt_tokens for job in jobs):,} prompt tokens, {made:,} generated in {seconds:.2f} s: "
        f"{made / seconds if seconds else 0:.1f} tok/s, the first after {first:.2f} s"
        + guesses_text(sum(job.stream.drafted_tokens for job in jobs), sum(job.stream.accepted_tokens for job in jobs))
        + (f"; {which} cut at {why}" if cut else "")
    )
