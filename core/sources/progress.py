"""How long work is reported to a person: a bar on a terminal, one line elsewhere, or nothing. Always on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Tick = Callable[[int], None]
"""Told how many bytes are done in all."""


class Progress(Protocol):
    """Reports tasks. ``task(label, total)`` is a context; what it gives is called with the bytes done so far."""

    def task(self, label: str, total: int | None) -> AbstractContextManager[Tick]:
        """Begins a task of ``total`` bytes (None: not known)."""
        ...


class Silent:
    """Reports nothing."""

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Tick]:
        """A task nobody hears of."""
        yield lambda done: None


class Lines:
    """One line for each task, when it begins: for logs and pipes."""

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Tick]:
        """Prints the label, and the size where it is known."""
        size = f" ({total / 1e6:.1f} MB)" if total else ""
        print(f"{label}{size}", file=sys.stderr, flush=True)
        yield lambda done: None


class Bar:
    """A bar that is gone when the task is done. rich leaves out the colours where NO_COLOR is set."""

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Tick]:
        """Draws the bar; without a total it only pulses and counts bytes."""
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.update(task, completed=done)


def choose(progress: Progress | bool | None) -> Progress:
    """The given one; nothing for False; else a bar on a terminal and lines elsewhere."""
    if progress is False:
        return Silent()
    if progress is not None and progress is not True:
        return progress
    return Bar() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else Lines()
