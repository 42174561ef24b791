"""A bounds-checked cursor over the header of one GGUF file: numbers, strings and arrays, each checked before use.

Knows nothing of keys, tensors or shards. Every length in the file is compared with what is left of the file before it
is used, so that a hostile count costs neither memory nor time.
"""

from __future__ import annotations

import struct
from array import array
from typing import Protocol

import numpy as np

from ..errors import CorruptFileError, TruncatedFileError
from .arrays import GGUFArray, NumericArray, Scalar, StringArray

MAX_HEADER = 1 << 28
"""Bytes that metadata and tensor list may take. The largest vocabularies need about a twentieth."""
MAX_COUNT = 1 << 20
"""Metadata keys, or tensors, a file may claim to have."""
MAX_KEY = 1 << 16
MAX_NAME = 256
"""Bytes of a tensor name; the format's own limit is 64."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_STRING, _ARRAY, _BOOL = 8, 9, 7
# value type in the file -> (name, struct); bool, string and array are read by hand
_NUMBERS: dict[int, tuple[str, struct.Struct]] = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", _U32),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    _BOOL: ("bool", struct.Struct("<B")),
    10: ("uint64", _U64),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}


class Buffer(Protocol):
    """What the cursor needs of a mapped file: slices of bytes (``mmap`` and ``bytes`` both do)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> bytes: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


def short(name: str) -> str:
    """A name from a file, quoted, with control characters escaped and its length bounded, for messages."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


class Reader:
    """Reads forward through ``buffer``; ``label`` names the file in messages."""

    def __init__(self, buffer: Buffer, label: str, pos: int = 0) -> None:
        self._buffer = buffer
        self._size = len(buffer)
        self._end = min(self._size, MAX_HEADER)
        self.label = label
        self.pos = pos

    @property
    def left(self) -> int:
        """Bytes that the header may still take."""
        return self._end - self.pos

    def corrupt(self, message: str) -> CorruptFileError:
        return CorruptFileError(
            f"{self.label}: {message}. The file is damaged or was written wrongly; download it, or convert it, again."
        )

    def need(self, nbytes: int, what: str) -> None:
        """Raises unless ``nbytes`` more can be read: a size no file has is corrupt, a plausible one truncated."""
        if nbytes <= self.left:
            return
        if self.pos + nbytes > MAX_HEADER:
            raise self.corrupt(
                f"{what} at byte {self.pos} would take {nbytes} bytes, past the {MAX_HEADER} that a header may have"
            )
        raise TruncatedFileError(
            f"{self.label}: {what} needs at least {self.pos + nbytes} bytes of file, but there are {self._size}. "
            "The download did not finish; fetch the file again."
        )

    def u32(self, what: str) -> int:
        self.need(4, what)
        (value,) = _U32.unpack_from(self._buffer, self.pos)
        self.pos += 4
        return int(value)

    def u64(self, what: str) -> int:
        self.need(8, what)
        (value,) = _U64.unpack_from(self._buffer, self.pos)
        self.pos += 8
        return int(value)

    def raw_string(self, what: str, limit: int | None = None) -> bytes:
        length = self.u64(f"the length of {what}")
        if limit is not None and length > limit:
            raise self.corrupt(f"{what} at byte {self.pos - 8} is {length} bytes long, more than {limit}")
        self.need(length, what)
        self.pos += length
        return self._buffer[self.pos - length : self.pos]

    def identifier(self, what: str, limit: int) -> str:
        """A key or a tensor name: not empty, at most ``limit`` bytes, UTF-8."""
        at = self.pos
        raw = self.raw_string(what, limit)
        if not raw:
            raise self.corrupt(f"{what} at byte {at} is empty")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.corrupt(f"{what} at byte {at} is not UTF-8: {raw[:40]!a}") from None

    def value(self, key: str) -> Scalar | GGUFArray:
        """One metadata value: its type's number, then the value itself."""
        what = f"the value of {short(key)}"
        kind = self.u32(what)
        if kind == _STRING:
            return self.raw_string(what).decode("utf-8", "surrogateescape")
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _NUMBERS:
            raise self.corrupt(f"{what} has type {kind}, which GGUF does not define")
        form = _NUMBERS[kind][1]
        self.need(form.size, what)
        (number,) = form.unpack_from(self._buffer, self.pos)
        self.pos += form.size
        if kind != _BOOL:
            return number  # type: ignore[no-any-return]
        if number > 1:
            raise self.corrupt(f"{what} is a bool of value {number}")
        return bool(number)

    def _array(self, what: str) -> GGUFArray:
        kind = self.u32(what)
        count = self.u64(f"the length of {what}")
        if kind == _STRING:
            return self._strings(count, what)
        if kind == _ARRAY:
            # The format would allow it; no known file does, and refusing bounds the recursion.
            raise CorruptFileError(f"{self.label}: {what} is an array of arrays, which polyhead does not read.")
        if kind not in _NUMBERS:
            raise self.corrupt(f"{what} is an array of type {kind}, which GGUF does not define")
        name, form = _NUMBERS[kind]
        nbytes = count * form.size
        self.need(nbytes, f"{what}, an array of {count} {name},")
        self.pos += nbytes
        blob = self._buffer[self.pos - nbytes : self.pos]
        if kind == _BOOL and count and int(np.frombuffer(blob, np.uint8).max()) > 1:
            raise self.corrupt(f"{what} is an array of bools and holds bytes other than 0 and 1")
        return NumericArray(name, blob)

    def _strings(self, count: int, what: str) -> StringArray:
        """Walks the lengths of ``count`` strings; their bytes are kept, and decoded when asked for."""
        self.need(8 * count, f"{what}, an array of {count} strings,")
        start = pos = self.pos
        buffer, unpack = self._buffer, _U64.unpack_from
        offsets = array("q", [0])
        append = offsets.append
        # The hot loop of opening a file: 400,000 strings in a large vocabulary. A length that leads outside makes the
        # next read fail, so one comparison after the loop is enough.
        try:
            for _ in range(count):
                pos += 8 + unpack(buffer, pos)[0]
                append(pos - start)
        except (struct.error, OverflowError):
            pos = max(pos, self._size + 1)
        if pos > self._end:
            self._outside(start, offsets, what)
        self.pos = pos
        return StringArray(self._buffer[start:pos], np.frombuffer(offsets, np.int64))

    def _outside(self, start: int, offsets: array[int], what: str) -> None:
        """Raises for the first string of an array that leaves the header."""
        for index, offset in enumerate(offsets):
            self.pos = start + offset
            self.need(8, f"the length of string {index} of {what}")
            (length,) = _U64.unpack_from(self._buffer, self.pos)
            self.pos += 8
            self.need(length, f"string {index} of {what}")
