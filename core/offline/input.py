"""Input: the lines of a batch file, read one at a time, and what is wrong with each. Nothing in them is trusted.

A line is OpenAI's ``{"custom_id", "method": "POST", "url", "body"}``, or a body alone: an object with ``prompt`` or
``messages``, whose custom_id is ``line-N`` if it has none.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import RequestError
from ..openai import Endpoint

MAX_LINE = 16 << 20
MAX_CUSTOM_ID = 1_024
_CHUNK = 1 << 20
_URLS: dict[str, Endpoint] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Line:
    """One request. ``id`` stands for the line's content, so that an answer tells which line it was made from.

    ``problem`` says why there is nothing to run; then ``endpoint`` is None. ``custom_id`` is None where it could not
    be read.
    """

    number: int
    id: str
    custom_id: str | None
    endpoint: Endpoint | None = None
    body: Any = None
    problem: str | None = None

    @property
    def place(self) -> str:
        """How a message names the line."""
        return f"line {self.number:,}" + (f" ({self.custom_id!r:.80})" if self.custom_id is not None else "")


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first look at all lines found: how many there are, and how many are answered."""

    lines: int
    answered: int


class Input:
    """A batch file. It may be read several times, so it must be a file and not a pipe. Blank lines do not count."""

    def __init__(self, path: Path) -> None:
        """Raises RequestError for what cannot be read as a file."""
        self.path = path
        try:
            self._file: BinaryIO = os.fdopen(_opened(path), "rb")
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name.
            raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.close()
            raise RequestError(f"{path} is no regular file; a batch is read more than once, so save it as a file first")
        self._state = self._look()

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Line]:
        """The lines from the beginning. Raises RequestError at the end if the file changed meanwhile."""
        for number, raw, digest in self._raw():
            yield _line(number, raw, digest)
        if self._look() != self._state:
            raise RequestError(f"{self.path} changed while it was read; run this again when it is complete")

    def survey(self, answers: Mapping[str, int], tick: Callable[[int, int], None] = lambda done, total: None) -> Survey:
        """Looks through all lines. ``answers``: the ids that the output has, each with its line there.

        Raises RequestError if a custom_id stands twice, if an answer is of no line of this file, or if there is no
        line at all.
        """
        first: dict[bytes, int] = {}
        left = dict(answers)
        count = 0
        for line in self:
            count += 1
            left.pop(line.id, None)
            if line.custom_id is not None:
                key = _digest(line.custom_id.encode("utf-8", "surrogatepass"))
                before = first.setdefault(key, line.number)
                if before != line.number:
                    raise RequestError(
                        f"{self.path}: lines {before:,} and {line.number:,} have the same custom_id "
                        f"{line.custom_id!r:.80}; give each line one of its own"
                    )
            if count % 256 == 0:
                tick(self._file.tell(), self._state[0])
        if not count:
            raise RequestError(f"{self.path} has no lines")
        if left:
            at = min(left.values())
            raise RequestError(
                f"the output has {len(left):,} answers to lines that {self.path} does not have as they were then (the "
                f"first is line {at:,} of the output). Name another output, or overwrite this one"
            )
        return Survey(count, len(answers))

    def _raw(self) -> Iterator[tuple[int, bytes | None, bytes]]:
        """(number, content or None if it is too long, digest) of every line that is not blank."""
        self._file.seek(0)
        number = 0
        while raw := self._file.readline(MAX_LINE + 1):
            number += 1
            if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
                yield number, None, self._skip(raw)
                continue
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.strip()
            if raw:
                yield number, raw, _digest(raw)

    def _skip(self, begin: bytes) -> bytes:
        """The digest of a line of which ``begin`` was read; the rest is read and dropped."""
        found = hashlib.sha256(begin)
        while part := self._file.readline(_CHUNK):
            found.update(part.rstrip(b"\r\n"))
            if part.endswith(b"\n"):
                break
        return found.digest()[:16]

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


def _line(number: int, raw: bytes | None, digest: bytes) -> Line:
    """A line's request, or what is wrong with it."""
    if raw is None:
        return _bad(number, digest, f"the line has more than {MAX_LINE:,} bytes")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return _bad(number, digest, f"byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        return _bad(number, digest, f"not JSON: {error.msg} at character {error.pos + 1}")
    except ValueError as error:  # a number of too many digits, or NaN
        return _bad(number, digest, f"not JSON: {error}")
    except RecursionError:
        return _bad(number, digest, "nested too deeply")
    if not isinstance(value, dict):
        return _bad(number, digest, "not a JSON object")
    alone = "body" not in value and "url" not in value and ("prompt" in value or "messages" in value)
    custom_id = value.get("custom_id", f"line-{number}" if alone else None)
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        what = "no custom_id" if custom_id is None else "a custom_id that is not"
        return _bad(number, digest, f"{what}: a string of 1 to {MAX_CUSTOM_ID:,} characters is needed")
    line_id = _id(custom_id.encode("utf-8", "surrogatepass"), digest)
    if alone:
        body = {name: item for name, item in value.items() if name != "custom_id"}
        return Line(number, line_id, custom_id, "chat" if "messages" in value else "completions", body)
    problem = _envelope(value)
    if problem is not None:
        return Line(number, line_id, custom_id, problem=problem)
    return Line(number, line_id, custom_id, _URLS[value["url"]], value["body"])


def _envelope(value: dict[str, Any]) -> str | None:
    """What is wrong with what stands around a body."""
    for name in value:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name[:80], _FIELDS, 1)
            return f"unknown field {name[:80]!r} beside the body" + (f"; did you mean {near[0]!r}?" if near else "")
    if value.get("method", "POST") != "POST":
        return f"method must be 'POST', got {value['method']!r:.40}"
    if "body" not in value:
        return "the field 'body' is missing"
    url = value.get("url")
    if not isinstance(url, str) or url not in _URLS:
        return f"url must be one of {', '.join(_URLS)}; got {url!r:.80}"
    return None


def _bad(number: int, digest: bytes, problem: str) -> Line:
    # Two such lines may be alike, so the number takes part.
    return Line(number, _id(number.to_bytes(8, "big"), digest), None, problem=f"line {number:,}: {problem}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _id(name: bytes, digest: bytes) -> str:
    return hashlib.sha256(len(name).to_bytes(8, "big") + name + digest).hexdigest()[:24]


def _opened(path: Path) -> int:
    """A descriptor for reading, without waiting for the other end of a pipe."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
