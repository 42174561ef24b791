"""Arrays in a file's metadata: numbers as NumPy arrays, strings decoded on demand. Knows nothing of files.

An array owns a copy of its bytes, so it stays valid after the file is closed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

Scalar: TypeAlias = int | float | bool | str

_DTYPES: dict[str, str] = {
    "uint8": "u1",
    "int8": "i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "float32": "<f4",
    "bool": "?",
    "uint64": "<u8",
    "int64": "<i8",
    "float64": "<f8",
}


class GGUFArray(Sequence[Scalar]):
    """An array of a file's metadata: a sequence of Python int, float, bool or str. ``kind`` is the element type:
    "uint8" ... "int64", "float32", "float64", "bool" or "str"."""

    kind: str

    @abstractmethod
    def numpy(self) -> NDArray[Any]:
        """The values as a read-only array [n]. Raises TypeError for strings."""

    @abstractmethod
    def strings(self) -> list[str]:
        """The strings, decoded as UTF-8; bytes that are not UTF-8 become lone surrogates ("surrogateescape"), so no
        two different strings become equal. Raises TypeError for numbers."""

    @abstractmethod
    def raw(self) -> list[bytes]:
        """The strings' bytes as they stand in the file. Raises TypeError for numbers."""

    def __repr__(self) -> str:
        return f"<GGUFArray of {len(self)} {self.kind}>"


class NumericArray(GGUFArray):
    """Numbers or bools; ``blob`` holds them little-endian, a bool as one byte 0 or 1."""

    __slots__ = ("_values", "kind")

    def __init__(self, kind: str, blob: bytes) -> None:
        self.kind = kind
        self._values: NDArray[Any] = np.frombuffer(blob, _DTYPES[kind])

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> Scalar: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scalar]: ...
    def __getitem__(self, index: int | slice) -> Scalar | list[Scalar]:
        if isinstance(index, slice):
            picked: list[Scalar] = self._values[index].tolist()
            return picked
        value: Scalar = self._values[index].item()
        return value

    def __iter__(self) -> Iterator[Scalar]:
        values: list[Scalar] = self._values.tolist()
        return iter(values)

    def numpy(self) -> NDArray[Any]:
        return self._values

    def strings(self) -> list[str]:
        raise TypeError(f"an array of {self.kind} holds no strings")

    def raw(self) -> list[bytes]:
        raise TypeError(f"an array of {self.kind} holds no strings")


class StringArray(GGUFArray):
    """Strings. ``blob`` holds, for each, eight bytes of length and then its bytes; ``offsets`` [n + 1] says where."""

    __slots__ = ("_blob", "_offsets", "kind")

    def __init__(self, blob: bytes, offsets: NDArray[np.int64]) -> None:
        self.kind = "str"
        self._blob = blob
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scalar]: ...
    def __getitem__(self, index: int | slice) -> str | list[Scalar]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} of an array of {len(self)}")
        begin, end = self._offsets[position : position + 2].tolist()
        return self._blob[begin + 8 : end].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return iter(self.strings())

    def numpy(self) -> NDArray[Any]:
        raise TypeError("an array of strings has no NumPy form; use strings() or raw()")

    def strings(self) -> list[str]:
        return [raw.decode("utf-8", "surrogateescape") for raw in self.raw()]

    def raw(self) -> list[bytes]:
        blob = self._blob
        begins = (self._offsets[:-1] + 8).tolist()
        ends = self._offsets[1:].tolist()
        return [blob[begin:end] for begin, end in zip(begins, ends, strict=True)]
