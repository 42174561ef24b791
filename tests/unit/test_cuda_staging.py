"""Reading ahead of the copies to a GPU: chunks, threads, errors and interrupts. Needs no GPU."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource
from numpy.typing import NDArray
from polyhead.errors import TruncatedFileError
from polyhead.gguf import open_gguf
from polyhead.runtime.cuda.staging import Cargo, Chunk, ReadAhead, Whole, plan_chunks, stored


def bring(cargoes: Sequence[Cargo], size: int, threads: int = 3, buffers: int = 2, read_bytes: int = 64) -> list[Any]:
    """The bytes that arrive of each cargo. Memory is overwritten and lent again as soon as it was looked at."""
    chunks = plan_chunks(cargoes, size)
    room = max(chunk.nbytes for chunk in chunks)
    found = {id(cargo): np.zeros(cargo.rows * cargo.row_bytes, np.uint8) for cargo in cargoes}
    with ReadAhead(chunks, threads, read_bytes) as ahead:
        for _ in range(buffers):
            ahead.lend(np.full(room, 0xEE, np.uint8))
        while (taken := ahead.take()) is not None:
            chunk, memory = taken
            for piece in chunk.pieces:
                row = piece.cargo.row_bytes
                found[id(piece.cargo)][piece.start * row : piece.stop * row] = memory[piece.offset :][: piece.nbytes]
            memory[:] = 0xEE
            ahead.lend(memory)
    return [found[id(cargo)] for cargo in cargoes]


def cargo(data: NDArray[np.uint8], row_bytes: int, multiple: int = 1, name: str = "t") -> Cargo:
    def read(start: int, out: NDArray[np.uint8]) -> None:
        out[:] = data[start : start + out.size]

    return Cargo(name, len(data) // row_bytes, row_bytes, len(data) // 2, read, multiple)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("polyhead-read")]


TENSORS = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 90), st.sampled_from([1, 16])), min_size=1, max_size=8)


@given(TENSORS, st.integers(1, 5000))
def test_chunks_hold_every_row_once_in_order_within_their_size_and_aligned(
    tensors: list[tuple[int, int, int]], size: int
) -> None:
    cargoes = [cargo(np.zeros(rows * row, np.uint8), row, multiple) for rows, row, multiple in tensors]
    chunks = plan_chunks(cargoes, size)
    pieces = [piece for chunk in chunks for piece in chunk.pieces]
    for each in cargoes:
        own = [piece for piece in pieces if piece.cargo is each]
        assert [piece.start for piece in own] == [0, *(piece.stop for piece in own[:-1])]
        assert own[-1].stop == each.rows
        assert all(piece.start % each.multiple == 0 and piece.stop > piece.start for piece in own)
        assert sum(piece.progress for piece in own) == each.nbytes
    order = [cargoes.index(piece.cargo) for piece in pieces]
    assert order == sorted(order)
    for chunk in chunks:
        end = 0
        for piece in chunk.pieces:
            assert piece.offset % 256 == 0
            assert piece.offset >= end
            end = piece.offset + piece.nbytes
        assert chunk.nbytes == end
        least = chunk.pieces[0].cargo.multiple * chunk.pieces[0].cargo.row_bytes
        assert end <= max(size, least)


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.integers(1, 3000), st.integers(1, 5), st.integers(1, 4), st.integers(1, 300))
def test_every_byte_arrives_and_is_read_once(
    tensors: list[tuple[int, int, int]], size: int, threads: int, buffers: int, read_bytes: int
) -> None:
    rng = np.random.default_rng(0)
    lock = threading.Lock()
    counts = [np.zeros(rows * row, np.int64) for rows, row, _ in tensors]

    def counted(each: Cargo, count: NDArray[np.int64]) -> Cargo:
        def read(start: int, out: NDArray[np.uint8]) -> None:
            with lock:
                count[start : start + out.size] += 1
            each.read(start, out)

        return Cargo(each.name, each.rows, each.row_bytes, each.nbytes, read, each.multiple)

    data = [rng.integers(0, 256, rows * row, np.uint8) for rows, row, _ in tensors]
    cargoes = [
        counted(cargo(bytes_, row, multiple), count)
        for bytes_, (_, row, multiple), count in zip(data, tensors, counts, strict=True)
    ]
    for found, expected in zip(bring(cargoes, size, threads, buffers, read_bytes), data, strict=True):
        assert np.array_equal(found, expected)
    assert all((count == 1).all() for count in counts)
    assert not reading_threads()


def chunks_of_ten(read: Callable[[int, NDArray[np.uint8]], None], count: int) -> list[Chunk]:
    chunks = plan_chunks([Cargo("t", 10 * count, 1, 10 * count, read)], 10)
    assert len(chunks) == count
    return chunks


def test_it_reads_no_further_ahead_than_memory_was_lent() -> None:
    begun: list[int] = []
    memory = [np.empty(10, np.uint8) for _ in range(2)]
    with ReadAhead(chunks_of_ten(lambda start, out: begun.append(start), 9), 4) as ahead:
        assert all(ahead.lend(item) for item in memory)
        for item in memory:
            taken = ahead.take()
            assert taken is not None
            assert taken[1] is item
        assert ahead.take() is None
        assert sorted(begun) == [0, 10]
        for _ in range(7):
            assert ahead.lend(memory[0])
            assert ahead.take() is not None
        assert not ahead.lend(memory[0])
    assert sorted(begun) == list(range(0, 90, 10))


def test_an_error_while_reading_comes_out_at_its_chunk_and_ends_the_threads() -> None:
    started: list[int] = []

    def read(start: int, out: NDArray[np.uint8]) -> None:
        started.append(start)
        if start == 30:
            raise TruncatedFileError("tensor t is not all there")

    taken: list[Chunk] = []

    def take_all() -> None:
        with ReadAhead(chunks_of_ten(read, 100), 2) as ahead:
            ahead.lend(np.empty(10, np.uint8))
            while (item := ahead.take()) is not None:
                taken.append(item[0])
                ahead.lend(item[1])

    with pytest.raises(TruncatedFileError, match="tensor t"):
        take_all()
    assert len(taken) == 3
    assert started == [0, 10, 20, 30]
    assert not reading_threads()


@pytest.mark.parametrize("impatient", [False, True])
def test_an_interrupt_waits_for_reads_under_way_and_drops_the_others(impatient: bool) -> None:
    inside, go_on, ended = threading.Event(), threading.Event(), []

    def read(start: int, out: NDArray[np.uint8]) -> None:
        inside.set()
        go_on.wait(10)
        out[:] = 1
        ended.append(start)

    memory = [np.zeros(10, np.uint8) for _ in range(5)]
    main = threading.main_thread().ident
    assert main is not None
    timers = [threading.Timer(0.4, go_on.set)]
    if impatient:  # Ctrl-C again, while the first one waits for the read
        timers += [threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT)) for delay in (0.1, 0.2)]

    def interrupted() -> None:
        with ReadAhead(chunks_of_ten(read, 5), 1) as ahead:
            for item in memory:
                ahead.lend(item)
            inside.wait(10)
            for timer in timers:
                timer.start()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        # Were the memory returned before this read had ended, it would write to what is not there.
        assert ended == [0]
        assert [int(item[0]) for item in memory] == [1, 0, 0, 0, 0]
        assert not reading_threads()
    finally:
        for timer in timers:
            timer.join()
        signal.signal(signal.SIGINT, before)


def test_what_exists_only_as_a_whole_is_made_once_and_dropped_after_its_last_part() -> None:
    made: list[NDArray[np.uint8]] = []

    def make() -> NDArray[np.uint8]:
        made.append(np.arange(200, dtype=np.uint8))
        return made[-1]

    whole = Whole(make, 200)
    (found,) = bring([Cargo("t", 200, 1, 200, whole)], 30, threads=4, read_bytes=7)
    assert np.array_equal(found, made[0])
    assert len(made) == 1
    whole(0, np.empty(1, np.uint8))
    assert len(made) == 2, "it still held the first"


def cargoes_of(source: Any) -> list[Cargo]:
    return [Cargo(name, info.nbytes, 1, info.nbytes, stored(source, name), 1) for name, info in source.tensors.items()]


def test_a_file_and_arrays_in_memory_arrive_as_stored(tiny_model: Callable[[str], Path]) -> None:
    with open_gguf(tiny_model("llama-mixed")) as file:
        for name, found in zip(file.tensors, bring(cargoes_of(file), 1 << 14, read_bytes=1000), strict=True):
            assert np.array_equal(found, file.data(name)), name
    source = MemorySource({"a": np.random.default_rng(1).random((40, 30), np.float32), "b": np.ones(3, np.float32)})
    for name, found in zip(source.tensors, bring(cargoes_of(source), 1000), strict=True):
        assert np.array_equal(found, source.data(name))


def test_a_file_cut_short_while_it_is_read_is_an_error_that_names_tensor_and_file(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_model("llama-gqa").read_bytes())
    with open_gguf(path) as file:
        last = max(file.tensors.values(), key=lambda info: info.offset)
        os.truncate(path, last.offset + 1)
        with pytest.raises(TruncatedFileError) as caught:
            bring(cargoes_of(file), 4096)
    assert last.name in str(caught.value)
    assert str(path) in str(caught.value)
    assert not reading_threads()
