"""Running a plugin's code: whatever it raises or prints, the command goes on and its results stay clean.

Knows nothing of what a plugin provides.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import EntryPoint
from typing import Any, TextIO, cast

from .errors import PluginError, PolyheadError, summary

_VALUE = re.compile(r"\w[\w.]*\s*(:\s*\w[\w.]*\s*)?(\[.*\])?\s*")


def load(entry: EntryPoint) -> Any:
    """What the entry point names. Raises PluginError, whatever the module does as it is imported."""
    if not _VALUE.fullmatch(entry.value):
        raise PluginError(f"its entry point names {entry.value!r}, expected a module, such as polyhead_{entry.name}")
    return entry.load()


@contextmanager
def contained(doing: str) -> Iterator[None]:
    """Whatever a plugin's code raises in here becomes a PluginError; what it prints goes to stderr.

    Errors of polyhead's own pass as they are, and KeyboardInterrupt, for that is the user's. ``doing`` says in a
    message when the plugin ended the program.
    """
    try:
        with aside():
            yield
    except (PolyheadError, KeyboardInterrupt):
        raise
    except SystemExit as error:  # a plugin that calls sys.exit() must not end the command
        raise PluginError(f"called sys.exit({error.code!r}) {doing}") from error
    except BaseException as error:  # also a test's skip, or a cancelled task, which are no Exception
        raise PluginError(summary(error)) from error


class _Aside:
    """Stands for stdout while a plugin's code runs: stderr, but for being closed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def close(self) -> None:
        """Stderr stays open."""


@contextmanager
def aside() -> Iterator[None]:
    """What a plugin's code prints in here goes to stderr: a command's results are its own."""
    # stdout is the whole process's: of several threads, one would put back what another has replaced.
    if sys.stderr is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with redirect_stdout(cast(TextIO, _Aside())):
        yield
