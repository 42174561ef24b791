"""SHA-256 of files, computed once: results are kept in the cache under the file's identity.

The identity is path, size, modification and change time and inode: whatever writes to a file changes at least one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path

from ..errors import SourceError
from .cache import told
from .progress import Progress

_CHUNK = 1 << 20
_SLOW = 256 << 20
"""Bytes from which on hashing is worth a progress report (about a second)."""


def file_sha256(path: Path, cache: Path, progress: Progress) -> str:
    """The file's SHA-256 in lower-case hexadecimal. Raises SourceError where it cannot be read."""
    with told(f"reading {path}", path.parent):
        memo = cache / "sha256" / _identity(path)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            known = memo.read_text("ascii")
            if re.fullmatch(r"[0-9a-f]{64}", known):
                return known
        size = path.stat().st_size
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            tick = stack.enter_context(progress.task(f"checking {path.name}", size)) if size >= _SLOW else None
            file = stack.enter_context(path.open("rb"))
            done = 0
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if tick:
                    tick(done)
        result = digest.hexdigest()
        if memo.name == _identity(path):  # Else it changed meanwhile, and the sum is nobody's.
            _note(memo, result)
        return result


def check(path: Path, expected: str, cache: Path, progress: Progress, advice: str) -> None:
    """Raises SourceError with both sums and the advice unless the file's SHA-256 is ``expected``."""
    actual = file_sha256(path, cache, progress)
    if actual != expected.lower():
        raise SourceError(mismatch(str(path), expected, actual, advice))


def mismatch(name: str, expected: str, actual: str, advice: str) -> str:
    """The message for a wrong checksum."""
    return f"{name}: SHA-256 is {actual}, but {expected.lower()} was expected; {advice}"


def _identity(path: Path) -> str:
    stat = path.stat()
    parts = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()


def remember(path: Path, sha256: str, cache: Path) -> None:
    """Notes a checksum that was computed while the file was written."""
    _note(cache / "sha256" / _identity(path), sha256)


def _note(memo: Path, sha256: str) -> None:
    # A cache that cannot be written costs time at the next start, nothing else.
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memo.parent)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(sha256)
        os.replace(name, memo)
