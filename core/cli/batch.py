"""``polyhead batch``: a file of requests in, a file of answers out, resumable."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import RequestError
from .console import Console, guesses_text, is_terminal, pass_console, verbosity
from .loading import load_settings, look_for_model, open_llm
from .options import settings, source_argument

if TYPE_CHECKING:
    from ..offline import Output, Survey, Tally

_DRAWS_PER_SECOND = 10


@click.command("batch")
@source_argument
@click.argument("lines", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="OUT.jsonl", type=click.Path(path_type=Path), help="Answers.")
@click.option("--overwrite", is_flag=True, help="Begin anew where OUT exists, instead of continuing it.")
@settings(sampling=True)
@verbosity
@pass_console
@click.pass_context
def command(
    ctx: click.Context, console: Console, source: str, lines: Path, output: Path, overwrite: bool, overrides: list[str]
) -> None:
    """Answer a file of requests.

    A line of IN is a line of OpenAI's batches, {"custom_id": …, "method": "POST", "url": "/v1/chat/completions" or
    "/v1/completions", "body": {…}}, or a body alone: {"prompt": …} or {"messages": […]}. OUT gets a line
    for each, in the order in which they finish. What a body does not say comes from CONFIG; a line without a seed
    gets one of its custom_id and sampling.seed.

    Where OUT exists it is continued: lines that it answers are skipped, also after a kill or a power cut. It is
    refused if it was made from other lines or with another model or sampling. Exit code 1: some lines have an error.
    """
    from ..offline import Input, OfflineRun, Output, settings_fingerprint

    loaded = load_settings(console, source, overrides)
    look_for_model(loaded)
    fingerprint = settings_fingerprint(loaded.config)
    with closing(Input(lines)) as batch, Output(output, overwrite=overwrite) as answers:
        if answers.same_file(lines):
            raise RequestError(f"{output} is the input; name another file for the answers")
        _check_settings(answers, fingerprint)
        with console.counting("polyhead: reading, bytes") as count:
            survey = batch.survey(answers.ids, lambda done, total: count(done, total, ""))
        if answers.torn:
            console.note(f"polyhead: {output} ends in {answers.torn:,} bytes of an unfinished line; it is made again")
        if survey.answered:
            console.note(f"polyhead: {survey.answered:,} of {survey.lines:,} lines are answered in {output}")
        if survey.answered == survey.lines:
            ctx.exit(1 if answers.failed else 0)
        with open_llm(console, loaded) as llm, _interruptible() as stop, _bar(console, survey, answers) as tick:
            tally = OfflineRun(llm, iter(batch), answers, fingerprint=fingerprint).run(stop, tick)
        failed = answers.failed + tally.failed
    console.note(_closing(survey, tally, failed, output))
    if tally.stopped:
        ctx.exit(130)
    ctx.exit(1 if failed else 0)


def _check_settings(answers: Output, fingerprint: str) -> None:
    for other, number in answers.fingerprints.items():
        if other != fingerprint:
            raise RequestError(
                f"line {number:,} of {answers.path} was made with another model, system message or sampling. Use the "
                "settings of then, name another output, or begin anew with --overwrite"
            )


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; a second one interrupts at once."""
    pressed = False
    if threading.current_thread() is not threading.main_thread():  # signals go elsewhere
        yield lambda: False
        return

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bar(console: Console, survey: Survey, answers: Output) -> Iterator[Callable[[Tally], None]]:
    """A bar on a terminal: lines done, tokens per second, errors, time left. Nothing elsewhere."""
    if console.quiet or not is_terminal(sys.stderr):
        yield lambda tally: None
        return
    from rich.console import Console as Screen
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("polyhead:"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[remark]}", markup=False),
    )
    drawn = 0.0
    screen = Screen(stderr=True, no_color=True if "NO_COLOR" in os.environ else None)
    with Progress(*columns, console=screen, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=survey.lines, completed=survey.answered, remark="")

        def tick(tally: Tally) -> None:
            nonlocal drawn
            now = time.perf_counter()
            if now - drawn < 1 / _DRAWS_PER_SECOND:
                return
            drawn = now
            remark = _remark(tally, survey.lines - survey.answered, answers.failed + tally.failed)
            progress.update(task, completed=survey.answered + tally.lines, remark=remark, refresh=True)

        yield tick


def _remark(tally: Tally, lines: int, failed: int) -> str:
    """Speed, errors and time left, ``lines`` of this run being the whole."""
    parts = [f"{_rate(tally.steps_tokens, tally.seconds)} tok/s"]
    if failed:
        parts.append(f"{failed:,} failed")
    if tally.lines:
        parts.append(f"{_duration(tally.seconds / tally.lines * (lines - tally.lines))} left")
    return ", ".join(parts)


def _closing(survey: Survey, tally: Tally, failed: int, output: Path) -> str:
    done = survey.answered + tally.lines
    failing = f", {failed:,} of them with an error" if failed else ""
    more = f"; {survey.lines - done:,} are left: run this again" if tally.stopped else ""
    return (
        f"polyhead: {done:,} of {survey.lines:,} lines in {output}{failing}; this run {tally.lines:,} lines, "
        f"{tally.prompt_tokens:,} prompt tokens, {tally.generated_tokens:,} generated in {tally.seconds:.2f} s: "
        f"{_rate(tally.generated_tokens, tally.seconds)} tok/s"
        f"{guesses_text(tally.drafted_tokens, tally.accepted_tokens)}{more}"
    )


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds if seconds else 0.0:,.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
