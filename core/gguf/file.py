"""An open GGUF model: its metadata, the index of its tensors, their bytes and their weights as float32.

Maps one file, or all shards of a split model. Knows nothing of architectures, of tokenizers or of devices.
"""

from __future__ import annotations

import contextlib
import difflib
import mmap
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np
from numpy.typing import NDArray

from ..errors import (
    CorruptFileError,
    MissingShardError,
    ModelFileError,
    ModelNotFoundError,
    NotGGUFError,
    TensorError,
    TruncatedFileError,
    UnsupportedTypeError,
)
from .blocks import BLOCK_TYPES, supported_list
from .dequant import dequantise_into
from .header import Header, TensorInfo, Value, integer, parse_header
from .reader import short
from .shards import MAX_SHARDS, sibling_paths


class _Descriptor:
    """A file descriptor that is closed when nothing refers to it any more: not under a read in another thread."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(frozen=True, slots=True)
class _Part:
    """One mapped file."""

    path: Path
    header: Header
    mapping: mmap.mmap
    descriptor: _Descriptor

    def close(self) -> None:
        # Where a caller still holds a view of the file, the mapping goes when that view does.
        with contextlib.suppress(BufferError):
            self.mapping.close()


class GGUFFile:
    """A model file, or the shards of one, mapped read-only. Made by `open_gguf`; a context manager.

    ``metadata`` maps keys to int, float, bool, str or `GGUFArray` (that of the first shard); strings are decoded as
    UTF-8 with "surrogateescape", so stray bytes neither fail nor get lost. ``tensors`` maps names to `TensorInfo` in
    file order. ``paths`` are the files, the first shard first. Reading is thread-safe. Metadata and views that were
    handed out stay valid after `close`. A file that another program truncates while it is open ends the process with
    SIGBUS, as for every mapped file; `read_into` alone raises an error then.
    """

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    paths: tuple[Path, ...]
    version: int

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts: tuple[_Part, ...] = tuple(parts)
        self.metadata = MappingProxyType(parts[0].header.metadata)
        self.tensors = MappingProxyType({n: t for part in parts for n, t in part.header.tensors.items()})
        self.paths = tuple(part.path for part in parts)
        self.version = parts[0].header.version

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {str(self.paths[0])!r}: {len(self.tensors)} tensors, {len(self.metadata)} metadata keys>"

    def close(self) -> None:
        """Unmaps the file; views handed out by `data` keep their part of it mapped. May be called again."""
        parts, self._parts = self._parts, ()
        for part in parts:
            part.close()

    def info(self, name: str) -> TensorInfo:
        """The tensor's description. Raises TensorError, with the closest names, if there is none."""
        info = self.tensors.get(name)
        if info is None:
            close = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f" Did you mean {', '.join(map(short, close))}?" if close else ""
            raise TensorError(f"{self.paths[0]} has no tensor {short(name)} among its {len(self.tensors)}.{hint}")
        return info

    def data(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, uint8 [nbytes]: a read-only view of the mapped file, nothing is copied.

        Raises TensorError for an unknown name and ValueError when the file is closed.
        """
        info = self.info(name)
        parts = self._parts
        if not parts:
            raise ValueError(f"{self.paths[0]} is closed")
        return np.frombuffer(parts[info.shard].mapping, np.uint8, info.nbytes, info.offset)

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fills ``out`` (uint8 [n], contiguous) with the tensor's bytes ``start:start + n``.

        Reads the file instead of copying from the mapping, so that a file cut short is an error and not SIGBUS. Several
        threads may read at once. Raises TensorError for an unknown name, ValueError for bytes that the tensor does not
        have or a closed file, TruncatedFileError where the file was cut short since it was opened, ModelFileError where
        it cannot be read.
        """
        info = self.info(name)
        parts = self._parts  # Held to the end of the read, and with it the descriptor, should another thread close.
        if not parts:
            raise ValueError(f"{self.paths[0]} is closed")
        if start < 0 or start + out.nbytes > info.nbytes:
            raise ValueError(f"{short(name)} has {info.nbytes} bytes, not {start}:{start + out.nbytes}")
        if not hasattr(os, "preadv"):  # Windows
            np.copyto(out, self.data(name)[start : start + out.nbytes])
            return
        part, at = parts[info.shard], info.offset + start
        left = out.data
        while len(left):
            try:
                count = os.preadv(part.descriptor.number, [left], at)  # may read less; after a signal it goes on
            except OSError as error:
                raise ModelFileError(f"{part.path}: reading tensor {short(name)} failed: {error.strerror}.") from error
            if not count:
                raise TruncatedFileError(
                    f"{part.path}: tensor {short(name)} ends at byte {info.offset + info.nbytes}, but the file ends at "
                    f"byte {at} by now. It was cut short while it was open; fetch it again."
                )
            left, at = left[count:], at + count

    def dequantise(
        self, name: str, out: NDArray[np.float32] | None = None, rows: slice | None = None
    ) -> NDArray[np.float32]:
        """The tensor's weights as float32 of its shape, in native byte order.

        ``rows`` (step 1) picks a range of the first axis. ``out``, if given, is filled and returned: float32,
        C-contiguous, of exactly the result's shape; a range of rows of a larger array will do. Needs only a few MB
        beside the result, and may be called from several threads at once.

        Raises TensorError for an unknown name, UnsupportedTypeError for a type without a decoder, ValueError for an
        ``out`` or ``rows`` that does not fit or a closed file.
        """
        info = self.info(name)
        self.check_supported((info,))
        data = self.data(name)
        shape = info.shape
        if rows is not None:
            start, stop = _row_range(info, rows)
            block = BLOCK_TYPES[info.type]
            per_row = info.n_elements // info.shape[0]
            if start * per_row % block.weights or stop * per_row % block.weights:
                raise ValueError(f"rows {start}:{stop} of {short(name)} do not end where a {info.type} block ends")
            shape = (stop - start, *info.shape[1:])
            scale = block.nbytes
            data = data[start * per_row // block.weights * scale : stop * per_row // block.weights * scale]
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(
                f"out for {short(name)} must be writeable, C-contiguous float32 of shape {shape}, not {out.dtype} of "
                f"shape {out.shape} with strides {out.strides}"
            )
        dequantise_into(info.type, data, out.reshape(-1))
        return out

    def check_supported(self, tensors: Iterable[TensorInfo] | None = None) -> None:
        """Raises UnsupportedTypeError that names all of ``tensors`` (by default all in the file) without a decoder."""
        chosen = self.tensors.values() if tensors is None else tensors
        bad = [info for info in chosen if not info.supported]
        if not bad:
            return
        shown = ", ".join(f"{short(info.name)} ({info.type})" for info in bad[:8]) + (", ..." if len(bad) > 8 else "")
        noun = "1 tensor is" if len(bad) == 1 else f"{len(bad)} tensors are"
        raise UnsupportedTypeError(
            f"{self.paths[0]}: {noun} stored in a type that polyhead cannot decode: {shown}. "
            f"It reads {supported_list()}; quantise the model to one of these."
        )


def _row_range(info: TensorInfo, rows: slice) -> tuple[int, int]:
    if not info.shape:
        raise ValueError(f"{short(info.name)} is a scalar and has no rows")
    start, stop, step = rows.indices(info.shape[0])
    if step != 1:
        raise ValueError(f"rows of {short(info.name)} can be read with step 1 only, not {step}")
    return start, max(start, stop)


def open_gguf(path: str | Path) -> GGUFFile:
    """Maps the GGUF file at ``path`` and, where it is the first part of a split model, the other parts beside it.

    Reads only the headers. Versions 2 and 3, little-endian. Raises ModelNotFoundError, NotGGUFError,
    TruncatedFileError, CorruptFileError, UnsupportedTypeError (a type whose size is unknown), MissingShardError, or
    ModelFileError where the system refuses to read the file.
    """
    path = Path(path)
    parts = [_open_part(path, 0)]
    try:
        header = parts[0].header
        count = integer(str(path), header.metadata, "split.count") or 1
        index = integer(str(path), header.metadata, "split.no") or 0
        if count > MAX_SHARDS or index >= count:
            raise CorruptFileError(f"{path}: it says that it is part number {index} (from 0) of {count}.")
        if count > 1:
            for number, sibling in enumerate(sibling_paths(path, index, count)[1:], start=1):
                parts.append(_open_part(sibling, number))
            _check_shards(parts)
        return GGUFFile(parts)
    except BaseException:
        for part in parts:
            part.close()
        raise


def _check_shards(parts: Sequence[_Part]) -> None:
    """Every part says that it is the one its name says, no tensor occurs twice, and none is absent."""
    seen: dict[str, Path] = {}
    total = sum(len(part.header.tensors) for part in parts)
    for number, part in enumerate(parts):
        metadata, label = part.header.metadata, str(part.path)
        claims = {"split.no": number, "split.count": len(parts), "split.tensors.count": total}
        for key, value in claims.items():
            found = integer(label, metadata, key)
            if found != value:
                said = "missing" if found is None else str(found)
                raise MissingShardError(
                    f"{label} does not belong to {parts[0].path}: its {key} is {said}, expected {value}. "
                    f"Download all {len(parts)} parts of the same model again."
                )
        for name in part.header.tensors:
            if name in seen:
                raise MissingShardError(
                    f"{label} does not belong to {parts[0].path}: tensor {short(name)} is in {seen[name].name} already."
                )
            seen[name] = part.path


def _open_part(path: Path, shard: int) -> _Part:
    mapping, descriptor = _map(path)
    try:
        return _Part(path, parse_header(mapping, str(path), shard), mapping, descriptor)
    except BaseException:
        mapping.close()
        raise


def _map(path: Path) -> tuple[mmap.mmap, _Descriptor]:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            inside = sorted(entry.name for entry in path.glob("*.gguf"))[:3]
            hint = f"give one of the files in it: {', '.join(inside)}" if inside else "no .gguf file is in it"
            raise NotGGUFError(f"{path} is a directory; {hint}.")
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for its writer.
            raise NotGGUFError(f"{path} is not a regular file.")
        descriptor = _Descriptor(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
        if not os.fstat(descriptor.number).st_size:
            raise NotGGUFError(f"{path}: the file is empty. Download it again.")
        return mmap.mmap(descriptor.number, 0, access=mmap.ACCESS_READ), descriptor
    except (FileNotFoundError, NotADirectoryError):
        broken = " (a symbolic link to a file that is gone)" if path.is_symlink() else ""
        raise ModelNotFoundError(f"There is no file at {path}{broken}.") from None
    except (OSError, ValueError) as error:
        # ValueError: a path with a zero byte in it.
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelFileError(f"{str(path)!r} cannot be read: {reason}.") from error
