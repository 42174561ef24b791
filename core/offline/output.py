"""Output: the file of answers, to which whole lines are appended, and what it holds from earlier runs.

A line counts when its line end is in the file: what a killed run left half written is cut off and made again.
"""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from ..errors import PolyheadError, RequestError

MAX_LINE = 1 << 30
SYNC_SECONDS = 5.0
_PREFIX = "batch_req_"


class Output:
    """The answers of one batch. A context manager; one writer at a time, which a lock on the file sees to.

    ``ids``: the lines that are answered, each with the line here; ``failed``: so many of them with an error;
    ``fingerprints``: which settings the answers were made with, each with its first line; ``torn``: bytes after the
    last whole line.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Opens or makes the file and reads what it holds; changes nothing in it. ``overwrite``: it holds nothing.

        Raises RequestError if it is no file, is written by another process, or holds what is no answer.
        """
        self.path = path
        self.ids: dict[str, int] = {}
        self.failed = 0
        self.fingerprints: dict[str, int] = {}
        self.torn = 0
        self._end = 0
        self._begun = False
        self._synced = time.monotonic()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            raise RequestError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise RequestError(f"{path} is no regular file; a batch can only be continued in one")
            self._lock()
            if not overwrite:
                self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def same_file(self, path: Path) -> bool:
        """Whether ``path`` is this very file."""
        return os.path.samestat(os.fstat(self._fd), path.stat())

    def append(self, line_id: str, custom_id: str | None, *, response: Any, error: Any) -> None:
        """Writes the answer to a line, whole. The first one cuts off what does not count.

        Raises PolyheadError where the disk takes no more; the answers before are sound.
        """
        record = {"id": _PREFIX + line_id, "custom_id": custom_id, "response": response, "error": error}
        text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        # Half of a surrogate pair cannot be encoded; written as an escape it is JSON again.
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            self._begin()
            at = self._end
            while at < self._end + len(data):
                at += os.pwrite(self._fd, data[at - self._end :], at)
            self._end = at
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()
        except OSError as error_:
            raise PolyheadError(
                f"{self.path} cannot be written: {error_.strerror}. Its {len(self.ids):,} answers are whole; run this "
                "again when there is room"
            ) from None
        self.ids[line_id] = len(self.ids) + 1

    def sync(self) -> None:
        """Makes the answers so far outlast a power cut; that of the process they outlast anyway."""
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Cuts off what an interrupt left half written, and lets others write. Safe to call twice."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            if self._begun:
                os.ftruncate(fd, self._end)
                os.fsync(fd)
        finally:
            os.close(fd)

    def _begin(self) -> None:
        if not self._begun:
            os.ftruncate(self._fd, self._end)
            self._begun = True

    def _lock(self) -> None:
        import fcntl  # not on Windows

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{self.path} is being written by another process; wait for it, or end it") from None
        except OSError as error:
            raise RequestError(f"{self.path} cannot be locked: {error.strerror}; use another disk") from None

    def _recover(self) -> None:
        number = 0
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            while raw := file.readline(MAX_LINE):
                if not raw.endswith(b"\n"):
                    self.torn = os.fstat(self._fd).st_size - self._end
                    break
                number += 1
                self._take(raw, number)
                self._end += len(raw)

    def _take(self, raw: bytes, number: int) -> None:
        try:
            record = json.loads(raw)
            line_id, response, error = record["id"], record["response"], record["error"]
            if not line_id.startswith(_PREFIX):
                raise ValueError
            failed = error is not None or response["status_code"] != 200
            fingerprint = None if failed else response["body"]["system_fingerprint"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RequestError(
                f"{self.path}, line {number:,}, is no answer of a batch; name another output, or overwrite this one"
            ) from None
        line_id = line_id.removeprefix(_PREFIX)
        before = self.ids.setdefault(line_id, number)
        if before != number:
            raise RequestError(f"{self.path}: lines {before:,} and {number:,} answer the same request; remove one")
        self.failed += failed
        if fingerprint is not None:
            self.fingerprints.setdefault(fingerprint, number)
