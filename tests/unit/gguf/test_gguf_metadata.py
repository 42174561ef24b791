"""Metadata: every type, arrays, strings of any bytes, versions 2 and 3; the gguf package's writer is read back."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polyhead.errors import CorruptFileError, TruncatedFileError
from polyhead.gguf import GGUFArray, open_gguf

import gguf

RANGES = {f"{sign}int{bits}": (-(2 ** (bits - 1)) if not sign else 0, 2 ** (bits - bool(not sign)) - 1)
          for bits in (8, 16, 32, 64) for sign in ("", "u")}  # fmt: skip


@pytest.mark.parametrize("kind", RANGES)
def test_integers_keep_their_extremes_alone_and_in_arrays(make, kind):
    low, high = RANGES[kind]
    path = make.write(make.file([make.number("low", kind, low), make.number("high", kind, high),
                                 make.numbers("both", kind, [low, high])]))  # fmt: skip
    with open_gguf(path) as file:
        assert file.metadata["low"] == low
        assert file.metadata["high"] == high
        assert type(file.metadata["high"]) is int
        both = file.metadata["both"]
        assert isinstance(both, GGUFArray)
        assert both.kind == kind
        assert list(both) == [low, high]
        assert both.numpy().dtype == np.dtype(kind)


def test_floats_bools_and_strings(make):
    path = make.write(
        make.file(
            [
                make.number("f32", "float32", 0.1),
                make.number("f64", "float64", 0.1),
                make.number("nan", "float32", math.nan),
                make.number("yes", "bool", 1),
                make.number("no", "bool", 0),
                make.text("text", "größe\n"),
                make.text("empty", ""),
                make.numbers("bools", "bool", [1, 0, 1]),
                make.numbers("none", "float32", []),
                make.texts("no_texts", []),
            ]
        )
    )
    with open_gguf(path) as file:
        meta = file.metadata
    assert meta["f32"] == float(np.float32(0.1))
    assert meta["f64"] == 0.1
    assert math.isnan(meta["nan"])
    assert meta["yes"] is True
    assert meta["no"] is False
    assert meta["text"] == "größe\n"
    assert meta["empty"] == ""
    assert list(meta["bools"]) == [True, False, True]
    assert type(meta["bools"][0]) is bool
    assert list(meta["none"]) == []
    assert list(meta["no_texts"]) == meta["no_texts"].strings() == meta["no_texts"].raw() == []
    assert list(meta) == ["f32", "f64", "nan", "yes", "no", "text", "empty", "bools", "none", "no_texts"]


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three_read_alike(make, version):
    content = make.file([make.number("a", "uint32", 7)], [make.f32("w", [1, 2])], version=version)
    with open_gguf(make.write(content)) as file:
        assert file.version == version
        assert file.metadata["a"] == 7
        assert file.dequantise("w").tolist() == [1, 2]


@given(st.lists(st.binary(max_size=20), max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_string_array_behaves_as_a_list_and_loses_no_byte(make, values):
    with open_gguf(make.write(make.file([make.texts("t", values), make.number("after", "uint8", 9)]))) as file:
        array, after = file.metadata["t"], file.metadata["after"]
    assert after == 9
    assert array.raw() == values
    texts = array.strings()
    assert [text.encode("utf-8", "surrogateescape") for text in texts] == values
    assert list(array) == texts
    assert len(array) == len(values)
    assert [array[i] for i in range(-len(values), len(values))] == texts + texts
    assert array[1:-1] == texts[1:-1]
    assert array[::-2] == texts[::-2]
    for index in (len(values), -len(values) - 1):
        with pytest.raises(IndexError):
            array[index]


def test_a_string_value_of_any_bytes_survives(make):
    with open_gguf(make.write(make.file([make.text("k", b"\xff\x00ok")]))) as file:
        assert file.metadata["k"].encode("utf-8", "surrogateescape") == b"\xff\x00ok"


def test_numbers_index_as_a_list_and_are_read_only(make):
    with open_gguf(make.write(make.file([make.numbers("n", "int32", [5, 6, 7])]))) as file:
        array = file.metadata["n"]
    assert array[0] == 5
    assert type(array[0]) is int
    assert array[-1] == 7
    assert array[1:] == [6, 7]
    assert 6 in array
    assert array.index(7) == 2
    with pytest.raises(IndexError):
        array[3]
    with pytest.raises(ValueError, match="read-only"):
        array.numpy()[0] = 1


def test_the_wrong_kind_of_access_is_a_type_error(make):
    with open_gguf(make.write(make.file([make.numbers("n", "int32", [5]), make.texts("t", ["a"])]))) as file:
        for call in (file.metadata["n"].strings, file.metadata["n"].raw, file.metadata["t"].numpy):
            with pytest.raises(TypeError):
                call()


def test_metadata_cannot_be_changed(make):
    with open_gguf(make.write(make.file([make.number("a", "uint32", 7)]))) as file, pytest.raises(TypeError):
        file.metadata["a"] = 8


def test_what_the_gguf_package_writes_is_read_back(tmp_path):
    path = tmp_path / "w.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_uint64("llama.context_length", 4096)
    writer.add_float32("llama.eps", 0.5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_token_list(["<s>", "é", b"\xe9"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_array("llama.heads", [1, 2, 3])
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    writer.add_tensor("x.weight", weights)
    writer.add_tensor("y.weight", weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(str(path)) as file:
        meta = file.metadata
        assert meta["general.architecture"] == "llama"
        assert (meta["llama.block_count"], meta["llama.context_length"], meta["llama.eps"]) == (3, 4096, 0.5)
        assert meta["tokenizer.ggml.add_bos_token"] is True
        assert meta["tokenizer.ggml.tokens"].raw() == [b"<s>", "é".encode(), b"\xe9"]
        assert meta["tokenizer.ggml.scores"].numpy().tolist() == [0.5, -1.0, 2.0]
        assert list(meta["llama.heads"]) == [1, 2, 3]
        assert file.tensors["x.weight"].shape == (2, 3, 4)
        assert np.array_equal(file.dequantise("x.weight"), weights)
        assert np.array_equal(file.dequantise("y.weight"), weights)


def entry(kind, payload):
    return [("key", kind, payload)]


BAD = {
    "unknown type": (entry(13, bytes(8)), "type 13"),
    "bool 2": (entry(7, b"\x02"), "bool of value 2"),
    "bool array": (entry(9, struct.pack("<IQ", 7, 3) + b"\0\1\2"), "other than 0 and 1"),
    "unknown array type": (entry(9, struct.pack("<IQ", 99, 1) + bytes(8)), "array of type 99"),
    "nested array": (entry(9, struct.pack("<IQIQ", 9, 1, 0, 1) + bytes(8)), "array of arrays"),
    "string of 2^60": (entry(8, struct.pack("<Q", 1 << 60)), str(1 << 60)),
    "string of 2^64-1": (entry(8, struct.pack("<Q", 2**64 - 1)), str(2**64 - 1)),
    "array of 2^60": (entry(9, struct.pack("<IQ", 6, 1 << 60)), str(1 << 60)),
    "strings of 2^60": (entry(9, struct.pack("<IQ", 8, 1 << 60)), str(1 << 60)),
    "array's string of 2^60": (
        entry(9, struct.pack("<IQQ", 8, 2, 1 << 60) + bytes(8)),
        "string 0 of the value of 'key'",
    ),
    "array's string of 2^64-1": (
        entry(9, struct.pack("<IQQQ", 8, 2, 0, 2**64 - 1) + bytes(8)),
        "string 1 of the value of 'key'",
    ),
    "empty key": ([("", 0, b"\0")], "metadata key 0 at byte 24 is empty"),
    "key not UTF-8": ([(b"\xff\xfe", 0, b"\0")], "not UTF-8"),
    "key too long": ([("k" * 70000, 0, b"\0")], "70000 bytes long"),
    "duplicate key": ([("a", 0, b"\0"), ("b", 0, b"\0"), ("a", 0, b"\0")], "'a' occurs twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_metadata_is_corrupt(make, case):
    metadata, words = BAD[case]
    with pytest.raises(CorruptFileError) as caught:
        open_gguf(make.write(make.file(metadata) + bytes(64)))
    assert words in str(caught.value)
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    "payload", [struct.pack("<Q", 1000), struct.pack("<IQ", 8, 1000), struct.pack("<IQQ", 8, 1, 1000)]
)
def test_a_plausible_length_beyond_the_end_is_truncation(make, payload):
    with pytest.raises(TruncatedFileError, match="bytes of file, but there are"):
        open_gguf(make.write(make.file(entry(8 if len(payload) == 8 else 9, payload))))
