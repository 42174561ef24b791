"""What one rendering of a template may cost: time, bytes made, depth, and the size of values that are walked through.

Bytes are counted when something is made and never given back, so the count bounds memory whatever the template keeps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import Undefined
from jinja2.exceptions import TemplateRuntimeError

MAX_SECONDS = 1.0
MAX_BYTES = 24 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 50
_BYTES_PER_INPUT = 12


class Limit(TemplateRuntimeError):
    """A template asks for more than it may have."""


def bytes_in(value: str | list[Any] | tuple[Any, ...]) -> int:
    """Bytes that the items take when the value is copied into a longer one, at most."""
    if isinstance(value, str):
        return len(value) * (1 if value.isascii() else 4)
    return len(value) * 8


class Meter:
    """The account of one rendering. ``given`` are the bytes of the caller's own input, which allow for more."""

    def __init__(self, given: int = 0, values: int = 0) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS + given / 4e6
        self._limit = MAX_BYTES + _BYTES_PER_INPUT * given
        self._left = self._limit
        self._max_values = MAX_VALUES + 2 * values
        self._depth = 0

    def step(self, size: int = 0) -> None:
        """One unit of work that keeps ``size`` bytes."""
        self._left -= size
        if self._left < 0:
            raise Limit(f"it makes more than {self._limit} bytes of text and lists")
        if time.monotonic() > self._deadline:
            raise Limit(f"it takes longer than {MAX_SECONDS:g} s")

    def expect(self, size: int) -> None:
        """Refuses, before it is made, what would have ``size`` bytes."""
        self.step()
        if size > self._left:
            raise Limit(f"it would make {size} bytes at once; {self._left} of {self._limit} are left")

    def made(self, value: Any) -> Any:
        """Counts a new string or container, and returns it."""
        self.step(sys.getsizeof(value) if isinstance(value, str | list | tuple | dict) else 0)
        return value

    def text(self, value: Any) -> str:
        """The value as text, counted."""
        if isinstance(value, str):
            return str(self.made(value))
        if isinstance(value, Undefined):
            return str(value)
        if isinstance(value, list | tuple | dict):
            values, size, _ = self.measure(value)
            self.expect(size * 2 + values * 8)
        return str(self.made(str(value)))

    def measure(self, value: Any) -> tuple[int, int, int]:
        """(values, bytes of text, depth) of a nested value, counting shared parts as often as they occur."""
        values = size = deepest = 0
        stack = [(value, 1)]
        while stack:
            item, depth = stack.pop()
            values += 1
            if values > self._max_values:
                raise Limit(f"it walks through a value with more than {self._max_values} parts")
            if values % 256 == 0:
                self.step()
            deepest = max(deepest, depth)
            if isinstance(item, str):
                size += sys.getsizeof(item)
            elif isinstance(item, dict):
                stack += [(part, depth + 1) for pair in item.items() for part in pair]
            elif isinstance(item, list | tuple):
                stack += [(part, depth + 1) for part in item]
            else:
                size += 32
        return values, size, deepest

    @contextmanager
    def nested(self) -> Iterator[None]:
        """A call within calls."""
        self.step()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Limit(f"calls are nested more than {MAX_DEPTH} deep")
        try:
            yield
        finally:
            self._depth -= 1


_METER: ContextVar[Meter] = ContextVar("polyhead_template_meter")


def meter() -> Meter:
    """The meter of the rendering that is under way."""
    return _METER.get()


@contextmanager
def metering(now: Meter) -> Iterator[Meter]:
    """Makes ``now`` the meter of what runs inside."""
    token = _METER.set(now)
    try:
        yield now
    finally:
        _METER.reset(token)
