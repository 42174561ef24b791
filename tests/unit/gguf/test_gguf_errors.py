"""Files that cannot be used: each reason has an error of its own that says what was found and what helps."""

from __future__ import annotations

import errno
import os
import struct
import sys
import tracemalloc

import numpy as np
import pytest
from polyhead.errors import (
    CorruptFileError,
    ModelFileError,
    ModelNotFoundError,
    NotGGUFError,
    SourceError,
    TruncatedFileError,
    UnsupportedTypeError,
)
from polyhead.gguf import open_gguf


def failure(make, content, kind):
    path = make.write(content)
    with pytest.raises(ModelFileError) as caught:
        open_gguf(path)
    assert caught.type is kind
    assert str(path) in str(caught.value)
    return str(caught.value)


NOT_GGUF = {
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-LFS pointer"),
    "json": (b'{"error": "not found"}', "JSON"),
    "safetensors": (struct.pack("<Q", 18) + b'{"a":{"dtype":"F"}}', "safetensors"),
    "torch": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "ggml": (b"lmgg" + bytes(40), "legacy GGML"),
    "ggjt": (b"tjgg" + bytes(40), "legacy GGJT"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "gzip"),
    "zeros": (bytes(4096), "zeros"),
    "text": (b"hello world, this is text", "b'hello world, thi'"),
    "short": (b"GG", "b'GG'"),
    "empty": (b"", "empty"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1;"),
    "version 4": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "newer polyhead"),
    "big-endian 3": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "big-endian 2": (b"GGUF" + struct.pack(">IQQ", 2, 0, 0), "big-endian"),
}


@pytest.mark.parametrize("case", NOT_GGUF)
def test_a_file_that_is_something_else_says_what_it_looks_like(make, case):
    content, words = NOT_GGUF[case]
    assert words in failure(make, content, NotGGUFError)


def test_no_file(tmp_path):
    (tmp_path / "link.gguf").symlink_to(tmp_path / "gone.gguf")
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "no.gguf", tmp_path / "file" / "model.gguf", tmp_path / "link.gguf"):
        with pytest.raises(ModelNotFoundError, match=path.name) as caught:
            open_gguf(path)
        assert isinstance(caught.value, SourceError)
    with pytest.raises(ModelNotFoundError, match="symbolic link"):
        open_gguf(tmp_path / "link.gguf")


def test_a_directory_names_the_models_in_it(tmp_path):
    with pytest.raises(NotGGUFError, match=r"directory; no \.gguf"):
        open_gguf(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"")
    with pytest.raises(NotGGUFError, match=r"directory; .*small\.gguf"):
        open_gguf(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotGGUFError, match="not a regular file"):
        open_gguf(tmp_path / "pipe")


def test_what_the_system_refuses_is_said_in_its_words(tmp_path):
    with pytest.raises(ModelFileError, match=os.strerror(errno.ENAMETOOLONG)):
        open_gguf(tmp_path / ("n" * 5000))
    with pytest.raises(ModelFileError, match="null byte"):
        open_gguf("a\0b")


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="needs a user whom file permissions stop; this one is root"
)
def test_no_permission(make):
    path = make.write(make.file())
    path.chmod(0)
    with pytest.raises(ModelFileError, match=os.strerror(errno.EACCES)):
        open_gguf(path)


@pytest.mark.parametrize("field", ["n_tensors", "n_keys"])
@pytest.mark.parametrize("count", [1 << 60, 2**64 - 1, 1 << 21])
def test_an_absurd_count_is_corrupt(make, field, count):
    assert str(count) in failure(make, make.file(**{field: count}) + bytes(100), CorruptFileError)


@pytest.mark.parametrize(
    "payload",
    [(8, struct.pack("<Q", 1 << 31)), (9, struct.pack("<IQ", 0, 1 << 31)), (9, struct.pack("<IQ", 8, 1 << 28))],
    ids=["string", "numbers", "strings"],
)
def test_a_header_of_gigabytes_is_refused_even_where_the_file_has_them(make, payload):
    path = make.write(make.file([("huge", *payload)]))
    os.truncate(path, 5 << 30)  # sparse: takes no space
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFileError, match="past the 268435456 that a header may have"):
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field", ["n_tensors", "n_keys"])
def test_a_count_that_the_file_has_no_room_for_is_truncation(make, field):
    assert "124" in failure(make, make.file(**{field: 1000}) + bytes(100), TruncatedFileError)


def test_every_cut_of_a_file_is_truncation(make):
    metadata = [make.text("general.name", "x"), make.texts("t", ["ab", "c"]), make.numbers("n", "int16", [1, 2])]
    content = make.file(metadata, [make.f32("first", [1, 2]), make.f32("second", [3])])
    for size in range(4, len(content)):
        message = failure(make, content[:size], TruncatedFileError)
        assert f"{size}" in message


def test_a_cut_last_string_of_a_file_that_ends_with_it_is_truncation(make):
    content = make.file([make.texts("t", ["ab", "cdef"])])
    for cut in range(1, 12):
        failure(make, content[:-cut], TruncatedFileError)


def test_missing_data_is_counted_and_the_first_tensor_without_it_named(make):
    content = make.file(tensors=[make.f32("whole", [0] * 8), make.f32("cut", [0] * 8), make.f32("gone", [0] * 8)])
    message = failure(make, content[:-40], TruncatedFileError)
    assert f"has {len(content) - 40} bytes" in message
    assert f"promises {len(content)} (40 more)" in message
    assert "'cut'" in message
    assert "gone" not in message


FLOATS = np.zeros(64, "<f4").tobytes()


def f32(name="w", dims=(64,), kind=0, offset=None, data=FLOATS):
    return name, dims, kind, offset, data


CORRUPT = {
    "5 dims": ([f32(dims=(2, 2, 2, 2, 4))], "5 dimensions"),
    "2^32-1 dims": ([f32(dims=(64,) * 9)], "9 dimensions"),
    "dimension 0": ([f32(dims=(64, 0))], "[64, 0]"),
    "product": ([f32(dims=(2**32, 2**32, 4))], str(2**66)),
    "dimension 2^63": ([f32(dims=(2**63,))], str(2**63)),
    "row of 48": ([f32(dims=(48, 32), kind=2)], "rows of 48 weights, not a multiple of the 32 in a Q4_0"),
    "row of 128": ([f32(dims=(128, 2), kind=12)], "256 in a Q4_K"),
    "scalar Q4_0": ([f32(dims=(), kind=2)], "rows of 1"),
    "unaligned": ([f32(offset=4)], "multiple of the alignment 32"),
    "far offset": ([f32(offset=2**64 - 32)], "more than any file holds"),
    "same name": ([f32(), f32()], "two tensors have the name 'w'"),
    "no name": ([f32(name="")], "is empty"),
    "name not UTF-8": ([f32(name=b"\xff")], "not UTF-8"),
    "long name": ([f32(name="n" * 300)], "300 bytes long"),
    "same place": ([f32("a"), f32("b", offset=0)], "'a' (256 bytes at 96) and 'b' (at 96) overlap"),
    "partly": ([f32("a"), f32("b", offset=224)], "overlap"),
    "inside": ([f32("a"), f32("b", dims=(1,), offset=32)], "overlap"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_an_impossible_tensor_is_corrupt(make, case):
    tensors, words = CORRUPT[case]
    assert words in failure(make, make.file(tensors=tensors), CorruptFileError)


def test_the_smallest_overlap_is_corrupt(make):
    metadata = [make.number("general.alignment", "uint32", 8)]
    tensors = [make.f32("a", [1, 2, 3]), make.f32("b", [4, 5], offset=8)]
    assert "overlap" in failure(make, make.file(metadata, tensors, alignment=8), CorruptFileError)


@pytest.mark.parametrize("alignment", [0, 4, 24, 33, 1 << 21, 2**32 - 1])
def test_an_impossible_alignment_is_corrupt(make, alignment):
    message = failure(make, make.file([make.number("general.alignment", "uint32", alignment)]), CorruptFileError)
    assert f"general.alignment is {alignment}," in message


@pytest.mark.parametrize("kind", ["float32", "bool"])
def test_an_alignment_that_is_no_integer_is_corrupt(make, kind):
    content = make.file([make.number("general.alignment", kind, 1)])
    assert "not an integer" in failure(make, content, CorruptFileError)


@pytest.mark.parametrize(("number", "words"), [(31, "type 31 (Q4_0_4_4"), (99, "type 99"), (2**32 - 1, str(2**32 - 1))])
def test_an_unknown_tensor_type_names_tensor_type_and_what_is_supported(make, number, words):
    message = failure(make, make.file(tensors=[f32("blk.0.w", kind=number)]), UnsupportedTypeError)
    assert words in message
    assert "'blk.0.w'" in message
    assert "Q4_K" in message


def test_names_from_a_file_reach_no_terminal_unescaped(make):
    message = failure(make, make.file(tensors=[f32("\x1b[2Jw\n" + "x" * 200, dims=(0,))]), CorruptFileError)
    assert "\x1b" not in message
    assert "\n" not in message
    assert "x" * 100 not in message
