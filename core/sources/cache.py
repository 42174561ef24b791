"""The folder of fetched models: where it is, and how a file comes into it whole or not at all.

Knows nothing of where the bytes come from.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import SourceError

try:
    import fcntl
except ImportError:  # Not on Windows; there, two processes may fetch the same file, and the second replaces the first.
    fcntl = None  # type: ignore[assignment]

_STALE_SECONDS = 2 * 24 * 3600


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """``$POLYHEAD_CACHE``, else ``$XDG_CACHE_HOME/polyhead``, else ``~/.cache/polyhead``. It need not exist yet.

    Raises SourceError where none is set and there is no home folder.
    """
    environ = os.environ if environ is None else environ
    if chosen := environ.get("POLYHEAD_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    xdg = environ.get("XDG_CACHE_HOME", "")
    base = xdg if os.path.isabs(xdg) else os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise SourceError("there is no home folder to keep models in; set POLYHEAD_CACHE to a folder")
    return Path(base) / "polyhead"


@contextmanager
def told(doing: str, folder: Path) -> Iterator[None]:
    """Turns the operating system's errors into a SourceError that says what failed and what would help."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = ""
            with contextlib.suppress(OSError):
                free = f", {shutil.disk_usage(folder).free / 1e6:.0f} MB free"
            advice = f"the disk of {folder} is full{free}; make room or set POLYHEAD_CACHE to a folder elsewhere"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"{error.filename or folder} is not writable; set POLYHEAD_CACHE to a folder that is"
        else:
            advice = str(error)
        raise SourceError(f"{doing}: {advice}") from error


@contextmanager
def scratch(cache: Path) -> Iterator[Path]:
    """A folder for unfinished work, on the cache's own disk so that finished files only need renaming."""
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".unfinished-*"):  # By processes that were killed.
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(finished: Path, target: Path) -> None:
    """Moves a finished file to its place in one step: nobody ever sees a part of it, not even after a power cut."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with finished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(finished, target)


@contextmanager
def locked(cache: Path, name: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Lets one process or thread at a time fetch ``name``; ``waiting`` is called when another one is at it.

    Only spares work: files appear in one step in any case. So a file system without locks is no error.
    """
    folder = cache / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("wb") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass
        yield
