"""Bytes on their way to the GPU: several threads read ahead into page-locked memory, which is copied chunk by chunk.

A chunk is what one copy takes: a part of a large tensor, or several small ones. ``plan_chunks``, ``ReadAhead`` and
``Whole`` know no device; ``upload`` does. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract import PartialSource, WeightSource
from .device import CudaDevice
from .memory import ALIGNMENT, Array, HostBuffer, Pool

STAGE = 16 << 20
"""Bytes of a chunk, unless a tensor's rows that belong together are more."""
_STAGES = 5  # of page-locked memory: one is copied, the others are being filled or wait
_READ = 4 << 20  # what one thread reads at once
_READERS = 8
Bytes = NDArray[np.uint8]
Progress = Callable[[int, int], None]
Read = Callable[[int, Bytes], None]
"""Fills an array with bytes from a given one on."""


@dataclass(frozen=True, slots=True)
class Cargo:
    """A tensor to bring: ``rows`` of ``row_bytes``, cut only between multiples of ``multiple`` rows.

    ``read(start, out)`` fills ``out`` with bytes from ``start`` on; several threads call it. ``nbytes`` is what the
    tensor counts for in a progress bar.
    """

    name: str
    rows: int
    row_bytes: int
    nbytes: int
    read: Read
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``start:stop`` of a cargo, ``offset`` bytes into their chunk."""

    cargo: Cargo
    start: int
    stop: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return (self.stop - self.start) * self.cargo.row_bytes

    @property
    def progress(self) -> int:
        """The piece's share of ``cargo.nbytes``; those of all pieces add up to it."""
        rows, whole = self.cargo.rows, self.cargo.nbytes
        return whole * self.stop // rows - whole * self.start // rows


@dataclass(slots=True)
class Chunk:
    """Pieces that travel together, each at a multiple of 256 bytes."""

    pieces: list[Piece] = field(default_factory=list)
    nbytes: int = 0


def plan_chunks(cargoes: Iterable[Cargo], size: int) -> list[Chunk]:
    """Cuts tensors into chunks of up to ``size`` bytes (more only for rows that may not be cut), in order."""
    chunks: list[Chunk] = []
    for cargo in cargoes:
        start = 0
        while start < cargo.rows:
            offset = -(-chunks[-1].nbytes // ALIGNMENT) * ALIGNMENT if chunks else size
            fitting = max(0, size - offset) // cargo.row_bytes
            if fitting < cargo.rows - start:
                fitting -= fitting % cargo.multiple
            if not fitting:
                chunks.append(Chunk())
                offset, fitting = 0, max(cargo.multiple, size // cargo.row_bytes // cargo.multiple * cargo.multiple)
            piece = Piece(cargo, start, min(start + fitting, cargo.rows), offset)
            chunks[-1].pieces.append(piece)
            chunks[-1].nbytes = offset + piece.nbytes
            start = piece.stop
    return chunks


class ReadAhead:
    """Fills memory that it is lent with chunks, in their order, by several threads. A context manager.

    It holds no memory of its own: what is lent bounds how far it runs ahead. Leaving it waits for reads under way, so
    that the memory may go; what was not begun is dropped. Not thread-safe itself.
    """

    def __init__(self, chunks: Iterable[Chunk], threads: int, read_bytes: int = _READ) -> None:
        self._chunks = iter(chunks)
        self._read_bytes = read_bytes
        self._threads = ThreadPoolExecutor(threads, "polyhead-read")
        self._begun: deque[tuple[Chunk, Bytes, list[Future[None]]]] = deque()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def lend(self, memory: Bytes) -> bool:
        """Begins to read the next chunk into ``memory``, which must hold it; False where none is left."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        jobs: list[Future[None]] = []
        self._begun.append((chunk, memory, jobs))
        for piece in chunk.pieces:
            step = max(1, self._read_bytes // piece.cargo.row_bytes) * piece.cargo.row_bytes
            first = piece.start * piece.cargo.row_bytes
            for at in range(0, piece.nbytes, step):
                out = memory[piece.offset + at : piece.offset + min(at + step, piece.nbytes)]
                jobs.append(self._threads.submit(piece.cargo.read, first + at, out))
        return True

    def take(self) -> tuple[Chunk, Bytes] | None:
        """Waits for the oldest chunk that was begun and gives it with its memory; None where none is under way.

        Raises what reading it raised.
        """
        if not self._begun:
            return None
        chunk, memory, jobs = self._begun[0]
        for job in jobs:
            job.result()
        self._begun.popleft()  # Only now: until its reads have ended, close must know of them.
        return chunk, memory

    def close(self) -> None:
        """Waits for reads under way and ends the threads. Closing twice is harmless."""
        running = [job for _, _, jobs in self._begun for job in jobs if not job.cancel()]
        self._begun.clear()
        interrupt: KeyboardInterrupt | None = None
        while running:
            try:
                wait(running)
                break
            except KeyboardInterrupt as error:  # Impatience must not take the memory from under a read.
                interrupt = error
        # This alone would not do: Python 3.11 takes a thread for ended when waiting for it was interrupted.
        self._threads.shutdown()
        if interrupt is not None:
            raise interrupt


class Whole:
    """Reads parts of bytes that exist only as a whole: made when the first part is wanted, dropped after the last."""

    def __init__(self, make: Callable[[], Bytes], nbytes: int) -> None:
        self._make = make
        self._left = nbytes
        self._made: Bytes | None = None
        self._lock = threading.Lock()

    def __call__(self, start: int, out: Bytes) -> None:
        """Fills ``out`` with bytes from ``start`` on; each byte is to be taken once."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            made = self._made
        np.copyto(out, made[start : start + out.size])
        with self._lock:
            self._left -= out.size
            if not self._left:
                self._made = None


def stored(source: WeightSource, name: str) -> Read:
    """Reads a tensor's stored bytes, in parts where the source can."""
    if isinstance(source, PartialSource):
        read_into = source.read_into
        return lambda start, out: read_into(name, start, out)
    return Whole(lambda: source.data(name), source.tensors[name].nbytes)


def upload(
    device: CudaDevice,
    cargoes: Sequence[Cargo],
    place: Callable[[Piece, Array], None],
    progress: Progress | None = None,
) -> None:
    """Brings all tensors to the device.

    ``place(piece, bytes)`` is called for each piece, in order, and enqueues on the device's stream what is to be done
    with them: u8, aligned to 256 bytes, the piece's until that work has run. Raises what reading raises.
    """
    chunks = plan_chunks(cargoes, STAGE)
    size = max((chunk.nbytes for chunk in chunks), default=0)
    total, done = sum(cargo.nbytes for cargo in cargoes), 0
    copies: deque[tuple[Any, Bytes]] = deque()
    with (
        Pool(device, "staging") as pool,
        ExitStack() as buffers,
        ReadAhead(chunks, min(_READERS, os.cpu_count() or 1)) as ahead,  # left first: it writes to the buffers
    ):
        for _ in chunks[:_STAGES]:  # Reading begins while the next buffer is being page-locked.
            ahead.lend(buffers.enter_context(HostBuffer(device, size)).array(np.uint8, size))
        landing = pool.array(size, "u8")  # One is enough: the stream copies and places one chunk after the other.
        while (taken := ahead.take()) is not None:
            chunk, memory = taken
            device.copy_in(landing.view("u8", chunk.nbytes), memory[: chunk.nbytes])
            copies.append((device.stream.record(), memory))
            for piece in chunk.pieces:
                place(piece, landing.at(piece.offset, "u8", piece.nbytes))
                done += piece.progress
            if len(copies) > 1:
                copied, memory = copies.popleft()
                copied.sync()
                ahead.lend(memory)
            if progress is not None:
                progress(done, total)
