"""What commands print and where: results on stdout, everything else on stderr. Knows no command and no model."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# All control characters but tab and line end, and what stands for bytes that are not UTF-8. Text from a file must not
# be able to command the terminal.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def printable(text: str) -> str:
    """The text with control characters and lone surrogates written as escapes."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def lost_output(error: OSError) -> str | None:
    """What to tell of an error that means that standard output takes no more, as on a full disk; None for others."""
    if error.filename is not None or error.errno not in _FULL:
        return None
    # Python flushes once more as it ends, and would complain once more.
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return f"standard output cannot be written: {error.strerror}"


class Console:
    """How much to say, and saying it. ``-v`` and ``-q`` set it; the group makes one for each call."""

    def __init__(self) -> None:
        self.verbose = False
        self.quiet = False

    def result(self, text: str) -> None:
        """A line of what the command is for, on stdout."""
        click.echo(printable(text))

    def json(self, value: Any, indent: int | None = 2) -> None:
        """The result as JSON, in ASCII so that no encoding can spoil it; numbers that are not finite become null."""
        click.echo(json.dumps(_finite(value), indent=indent, allow_nan=False))

    def note(self, text: str) -> None:
        """A line on stderr, unless ``-q``."""
        if not self.quiet:
            click.echo(printable(text), err=True)

    def detail(self, text: str) -> None:
        """A line on stderr, only with ``-v``."""
        if self.verbose:
            click.echo(printable(text), err=True)

    def warn(self, text: str) -> None:
        """A warning on stderr, in any case."""
        click.echo(f"polyhead: warning: {printable(text)}", err=True)

    def error(self, text: str) -> None:
        """An error on stderr."""
        click.echo(f"polyhead: {'' if text.startswith('internal ') else 'error: '}{printable(text)}", err=True)

    def heading(self, text: str) -> str:
        """The text in bold where stdout is a terminal that may show it."""
        return click.style(text, bold=True) if is_terminal(sys.stdout) and "NO_COLOR" not in os.environ else text

    @contextmanager
    def loading(self, label: str = "loading weights") -> Iterator[Callable[[int, int], None] | None]:
        """A bar for ``progress(bytes done, bytes in all)`` on a terminal; None elsewhere. Gone when left."""
        if self.quiet or not is_terminal(sys.stderr):
            yield None
            return
        from ..sources.progress import Bar

        with ExitStack() as stack:
            tick: Callable[[int], None] | None = None

            def progress(done: int, total: int) -> None:
                nonlocal tick
                if tick is None:
                    tick = stack.enter_context(Bar().task(label, total))
                tick(done)

            yield progress

    @contextmanager
    def counting(self, label: str) -> Iterator[Callable[[int, int, str], None]]:
        """A line on a terminal that is rewritten by ``tick(done, total, remark)`` and gone when left."""
        shown = not self.quiet and is_terminal(sys.stderr)

        def tick(done: int, total: int, remark: str) -> None:
            if shown:
                click.echo(f"\r\x1b[K{label} {done:,}/{total:,} {printable(remark)}", err=True, nl=False)

        try:
            yield tick
        finally:
            if shown:
                click.echo("\r\x1b[K", err=True, nl=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def is_terminal(stream: Any) -> bool:
    """Whether a person watches the stream on a terminal that understands more than lines."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), right: Collection[int] = ()) -> str:
    """Rows as aligned columns; those in ``right`` are flush right. Wide rows are not cut."""
    lines = [list(header), *rows] if header else list(rows)
    lines = [[printable(cell) for cell in line] for line in lines]
    wide = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))] if lines else []
    return "\n".join(
        "  ".join(
            cell.rjust(wide[column]) if column in right else cell.ljust(wide[column])
            for column, cell in enumerate(line)
        ).rstrip()
        for line in lines
    )


def verbosity(command: Decorated) -> Decorated:
    """The options ``-v`` and ``-q``, before or after the name of a command."""

    def set_to(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
        def callback(ctx: click.Context, _: click.Parameter, value: bool) -> None:
            if value:
                setattr(ctx.ensure_object(Console), name, True)

        return callback

    for flags, name, text in (
        (("-q", "--quiet"), "quiet", "Print results, warnings and errors only."),
        (("-v", "--verbose"), "verbose", "Print more about what happens, and tracebacks of errors."),
    ):
        option = click.option(*flags, is_flag=True, expose_value=False, callback=set_to(name), help=text)
        command = option(command)
    return command


pass_console = click.make_pass_decorator(Console, ensure=True)


def guesses_text(drafted: int, accepted: int) -> str:
    """How good the guesses of runtime.speculation were; empty where there were none."""
    if not drafted:
        return ""
    return f"; {accepted:,} of {drafted:,} guessed tokens were right ({accepted / drafted:.0%})"
