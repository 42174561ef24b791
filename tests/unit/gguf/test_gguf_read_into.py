"""Reading parts of tensors from the file to a given place."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.errors import ModelFileError, TensorError, TruncatedFileError
from polyhead.gguf import GGUFFile, open_gguf

needs_preadv = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama-mixed")


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "own.gguf"
    path.write_bytes(model.read_bytes())
    return path


def read(file: GGUFFile, name: str, start: int, count: int) -> np.ndarray:
    out = np.full(count, 0xEE, np.uint8)
    file.read_into(name, start, out)
    return out


def descriptors(path: Path) -> int:
    found = 0
    for entry in os.scandir("/proc/self/fd"):
        try:
            found += os.readlink(entry.path) == str(path)
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


@given(st.data())
def test_any_part_of_any_tensor_is_what_the_mapping_shows(model: Path, data: st.DataObject) -> None:
    with open_gguf(model) as file:
        name = data.draw(st.sampled_from(list(file.tensors)))
        start = data.draw(st.integers(0, file.info(name).nbytes))
        stop = data.draw(st.integers(start, file.info(name).nbytes))
        assert np.array_equal(read(file, name, start, stop - start), file.data(name)[start:stop])


@needs_preadv
@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_reads_are_continued(model: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:most]], at))
    with open_gguf(model) as file:
        name, info = next((name, info) for name, info in file.tensors.items() if info.nbytes < 20_000)
        assert np.array_equal(read(file, name, 0, info.nbytes), file.data(name))


def test_a_system_without_preadv_copies_from_the_mapping(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    with open_gguf(model) as file:
        name = next(iter(file.tensors))
        assert np.array_equal(read(file, name, 3, 50), file.data(name)[3:53])


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 10**6), (1 << 62, 1)])
def test_bytes_outside_a_tensor_are_refused(model: Path, start: int, count: int) -> None:
    with open_gguf(model) as file:
        name, info = next((name, info) for name, info in file.tensors.items() if info.nbytes < 10**6)
        with pytest.raises(ValueError, match=f"has {info.nbytes} bytes, not"):
            read(file, name, start, count)
        with pytest.raises(TensorError, match="no tensor 'nothing'"):
            read(file, "nothing", 0, 1)
    with pytest.raises(ValueError, match="is closed"):
        read(file, name, 0, 1)


@needs_preadv
def test_a_file_cut_short_since_it_was_opened_is_an_error_with_the_numbers(own: Path) -> None:
    with open_gguf(own) as file:
        info = max(file.tensors.values(), key=lambda info: info.offset)
        os.truncate(own, info.offset + 5)
        with pytest.raises(TruncatedFileError) as caught:
            read(file, info.name, 0, info.nbytes)
    for part in (str(own), info.name, str(info.offset + info.nbytes), str(info.offset + 5)):
        assert part in str(caught.value), part


@needs_preadv
def test_a_failing_disk_is_an_error_that_names_file_and_tensor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with open_gguf(model) as file:
        name = next(iter(file.tensors))
        with pytest.raises(ModelFileError, match=name) as caught:
            read(file, name, 0, 1)
    assert str(model) in str(caught.value)
    assert os.strerror(errno.EIO) in str(caught.value)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list descriptors")
def test_no_descriptor_is_left_open(own: Path) -> None:
    with open_gguf(own) as file:
        assert descriptors(own) >= 1
    assert file.paths == (own,)
    assert descriptors(own) == 0
    own.write_bytes(b"GGUF" + bytes(3))
    with pytest.raises(ModelFileError):
        open_gguf(own)
    assert descriptors(own) == 0


@needs_preadv
def test_closing_in_one_thread_does_not_close_under_anothers_read(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, inside, closed = os.preadv, threading.Event(), threading.Event()

    def slow(fd: int, buffers: list[memoryview], at: int) -> int:
        inside.set()
        closed.wait(10)
        return whole(fd, buffers, at)

    with open_gguf(own) as file, ThreadPoolExecutor(1) as pool:
        name, info = next(iter(file.tensors.items()))
        expected = file.data(name).copy()
        monkeypatch.setattr(os, "preadv", slow)
        job = pool.submit(read, file, name, 0, info.nbytes)
        inside.wait(10)
        file.close()
        closed.set()
        assert np.array_equal(job.result(), expected)
