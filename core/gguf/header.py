"""The header of one GGUF file: version, metadata and the list of tensors, with every claim checked against the file.

Source: the GGUF specification (versions 2 and 3, little-endian). Knows nothing of shards or of how blocks are decoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from ..errors import CorruptFileError, NotGGUFError, TruncatedFileError, UnsupportedTypeError
from .arrays import GGUFArray, Scalar
from .blocks import BLOCK_TYPES, REMOVED_TYPES, SUPPORTED_TYPES, TYPE_NAMES, supported_list
from .identify import looks_like
from .reader import MAX_COUNT, MAX_KEY, MAX_NAME, Buffer, Reader, short

Value: TypeAlias = Scalar | GGUFArray

MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
MAX_BYTES = 1 << 62
_DEFAULT_ALIGNMENT = 32
_LEAST_KEY = 8 + 1 + 4 + 1
_LEAST_TENSOR = 8 + 1 + 4 + 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. ``shape`` is in NumPy order, slowest dimension first (GGUF stores the reverse); ``type`` is
    a name such as "Q4_K"; ``offset`` counts bytes from the start of the file of shard number ``shard``."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_elements: int
    nbytes: int
    offset: int
    shard: int = 0

    @property
    def supported(self) -> bool:
        """Whether the tensor can be turned into float32; if not, it can still be listed and read as bytes."""
        return self.type in SUPPORTED_TYPES


@dataclass(frozen=True, slots=True)
class Header:
    """What the start of one file says. ``tensors`` stand in file order."""

    version: int
    alignment: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def parse_header(buffer: Buffer, label: str, shard: int = 0) -> Header:
    """Reads and checks the header of the file in ``buffer``; ``label`` names the file in messages.

    Raises NotGGUFError, TruncatedFileError, CorruptFileError or UnsupportedTypeError.
    """
    version = _version(buffer, label)
    reader = Reader(buffer, label, pos=8)
    n_tensors = reader.u64("the number of tensors")
    n_keys = reader.u64("the number of metadata keys")
    for count, noun in ((n_tensors, "tensors"), (n_keys, "metadata keys")):
        if count > MAX_COUNT:
            raise reader.corrupt(f"it claims {count} {noun}; at most {MAX_COUNT} are possible")
    reader.need(
        n_keys * _LEAST_KEY + n_tensors * _LEAST_TENSOR, f"a header of {n_keys} metadata keys and {n_tensors} tensors"
    )
    metadata: dict[str, Value] = {}
    for index in range(n_keys):
        key = reader.identifier(f"metadata key {index}", MAX_KEY)
        if key in metadata:
            raise reader.corrupt(f"the metadata key {short(key)} occurs twice")
        metadata[key] = reader.value(key)
    alignment = _alignment(reader, metadata)
    entries = [_entry(reader, index) for index in range(n_tensors)]
    start = -(-reader.pos // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, dims, number, offset in entries:
        if name in tensors:
            raise reader.corrupt(f"two tensors have the name {short(name)}")
        tensors[name] = _tensor(reader, name, dims, number, offset, start, alignment, shard)
    _check_layout(reader, tensors, len(buffer))
    return Header(version, alignment, metadata, tensors)


def _version(buffer: Buffer, label: str) -> int:
    head = buffer[:512]
    if not head:
        raise NotGGUFError(f"{label}: the file is empty. Download it again.")
    if head[:4] != b"GGUF":
        guess = looks_like(head)
        raise NotGGUFError(
            f"{label} is not a GGUF file: it starts with {head[:16]!a} instead of b'GGUF'."
            + (f" It looks like {guess}." if guess else "")
        )
    version = Reader(buffer, label, pos=4).u32("the version")
    if version in (2, 3):
        return version
    if int.from_bytes(head[4:8], "big") in (1, 2, 3):
        raise NotGGUFError(
            f"{label} is a big-endian GGUF file; polyhead reads little-endian ones. Convert it with "
            "`gguf-convert-endian FILE little` of the gguf package."
        )
    advice = "convert the original model again" if version < 2 else "a newer polyhead may read it"
    raise NotGGUFError(f"{label} is GGUF version {version}; polyhead reads versions 2 and 3: {advice}.")


def _alignment(reader: Reader, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int):
        raise reader.corrupt(f"general.alignment is {value!r:.80}, not an integer")
    if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise reader.corrupt(f"general.alignment is {value}, not a power of two from 8 to {MAX_ALIGNMENT}")
    return value


def _entry(reader: Reader, index: int) -> tuple[str, tuple[int, ...], int, int]:
    """A line of the tensor list as it stands in the file: name, dims fastest first, type number, offset."""
    name = reader.identifier(f"the name of tensor {index}", MAX_NAME)
    n_dims = reader.u32(f"the dimensions of tensor {short(name)}")
    if n_dims > MAX_DIMS:
        raise reader.corrupt(f"tensor {short(name)} has {n_dims} dimensions; at most {MAX_DIMS} are possible")
    dims = tuple(reader.u64(f"the dimensions of tensor {short(name)}") for _ in range(n_dims))
    return name, dims, reader.u32(f"the type of {short(name)}"), reader.u64(f"the offset of {short(name)}")


def _tensor(
    reader: Reader, name: str, dims: tuple[int, ...], number: int, offset: int, start: int, alignment: int, shard: int
) -> TensorInfo:
    if number not in TYPE_NAMES:
        old = REMOVED_TYPES.get(number)
        known = f" ({old}, which GGUF has dropped; quantise the model again)" if old else ""
        raise UnsupportedTypeError(
            f"{reader.label}: tensor {short(name)} has type {number}{known}, which polyhead does not know. "
            f"It reads {supported_list()}."
        )
    kind = TYPE_NAMES[number]
    block = BLOCK_TYPES[kind]
    count = math.prod(dims)
    if not 0 < count < MAX_BYTES:
        raise reader.corrupt(f"tensor {short(name)} has dimensions {list(dims)}: {count} weights")
    row = dims[0] if dims else 1
    if row % block.weights:
        raise reader.corrupt(
            f"tensor {short(name)} has rows of {row} weights, not a multiple of the {block.weights} in a {kind} block"
        )
    nbytes = count // block.weights * block.nbytes
    if offset % alignment:
        raise reader.corrupt(f"tensor {short(name)} starts at {offset}, not a multiple of the alignment {alignment}")
    if offset + nbytes > MAX_BYTES:
        raise reader.corrupt(f"tensor {short(name)} has {nbytes} bytes at {offset}, more than any file holds")
    return TensorInfo(name, dims[::-1], kind, count, nbytes, start + offset, shard)


def _check_layout(reader: Reader, tensors: dict[str, TensorInfo], size: int) -> None:
    """All tensors lie inside the file and none lies on another."""
    ordered = sorted(tensors.values(), key=lambda t: t.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise reader.corrupt(
                f"tensors {short(before.name)} ({before.nbytes} bytes at {before.offset}) and {short(after.name)} "
                f"(at {after.offset}) overlap"
            )
    outside = next((t for t in ordered if t.offset + t.nbytes > size), None)
    if outside:
        expected = ordered[-1].offset + ordered[-1].nbytes
        raise TruncatedFileError(
            f"{reader.label}: the file has {size} bytes, its header promises {expected} ({expected - size} more); "
            f"the first tensor that is cut off is {short(outside.name)}. The download did not finish; fetch the file "
            "again."
        )


def integer(label: str, metadata: dict[str, Value], key: str) -> int | None:
    """A metadata value that must be a whole number >= 0 where it is present; None where it is absent."""
    if key not in metadata:
        return None
    value = metadata[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CorruptFileError(f"{label}: {key} is {value!r:.80}, not a whole number.")
    return value
