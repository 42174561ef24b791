"""Tokenizers made from metadata: what the API promises, on small vocabularies and with random text."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead.errors import RequestError, TokenizerError
from polyhead.gguf.arrays import NumericArray, StringArray
from polyhead.tokenizer import Tokenizer
from polyhead.tokenizer.hf_json import JsonConfig
from polyhead.tokenizer.pretokenizers import build, pre_tokenizer, pre_tokenizer_names

G = "tokenizer.ggml."


def alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies, by byte."""
    printable = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def byte_level(**changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: all bytes, two words, control and user-defined tokens."""
    tokens = [*alphabet(), "he", "ll", "hell", "hello", "Ġhello", "<s>", "</s>", "<|im_end|>", "<u>", "<u><u>", "<pad>"]
    kinds = [1] * 261 + [3, 3, 3, 4, 4, 5]
    metadata = {
        f"{G}model": "gpt2",
        f"{G}pre": "gpt-2",
        f"{G}tokens": tokens,
        f"{G}token_type": kinds,
        f"{G}merges": ["h e", "l l", "he ll", "hell o", "Ġ hello"],
        f"{G}bos_token_id": 261,
        f"{G}eos_token_id": 262,
        f"{G}add_bos_token": True,
    }
    metadata.update({f"{G}{key}": value for key, value in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


def llama(**changes: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece-style vocabulary with byte fallback."""
    words = ["▁", "h", "e", "l", "o", "he", "ll", "▁he", "▁hell", "▁hello", "oh", "<u>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    scores = [0.0] * 259 + [-1.0 - i for i in range(len(words))]
    metadata = {
        f"{G}model": "llama",
        f"{G}tokens": tokens,
        f"{G}scores": scores,
        f"{G}token_type": [2, 3, 3] + [6] * 256 + [1] * (len(words) - 1) + [4],
        f"{G}unknown_token_id": 0,
        f"{G}bos_token_id": 1,
        f"{G}eos_token_id": 2,
    }
    metadata.update({f"{G}{key}": value for key, value in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


BYTE_LEVEL = Tokenizer.from_gguf(byte_level())
LLAMA = Tokenizer.from_gguf(llama())
UNPREFIXED = Tokenizer.from_gguf(llama(add_space_prefix=False))
ANY = {"byte-level": BYTE_LEVEL, "llama": LLAMA, "unprefixed": UNPREFIXED}
unicode_text = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(list("hello <u>\n ▁é😀")), max_size=40
)


@pytest.mark.parametrize("name", ANY)
@settings(max_examples=150, deadline=None)
@given(text=unicode_text)
def test_decoding_undoes_encoding(name: str, text: str) -> None:
    if name != "byte-level":
        text = text.replace("▁", "_")  # SentencePiece cannot tell its space symbol from a space
    assert ANY[name].decode(ANY[name].encode(text)) == text


@pytest.mark.parametrize("name", ANY)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_joined_is_the_decoded_whole(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = ANY[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    stream = tokenizer.stream(skip_special=skip)
    for _ in range(2):  # a flushed stream starts anew
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


def test_a_stream_holds_back_bytes_until_they_are_characters() -> None:
    ids = BYTE_LEVEL.encode("é😀")
    stream = BYTE_LEVEL.stream()
    assert [stream.push(i) for i in ids] == ["", "é", "", "", "", "😀"]
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(text=unicode_text)
def test_no_text_becomes_control_tokens_unless_asked(text: str) -> None:
    for tokenizer in ANY.values():
        for name in ("<s>", "</s>"):
            ids = tokenizer.encode(text + name + text)
            assert not any(tokenizer.is_control(i) for i in ids)


def test_control_tokens_are_found_in_templates_and_user_defined_ones_always() -> None:
    assert BYTE_LEVEL.encode("hello<|im_end|>", special=True, bos=False) == [259, 263]
    assert BYTE_LEVEL.encode("hello<u>")[-1] == 264
    assert BYTE_LEVEL.encode("<u><u><u>") == [265, 264]  # the longest wins
    assert LLAMA.encode(" hello<u>")[-1] == 270


def test_words_are_merged() -> None:
    assert BYTE_LEVEL.encode("hello hello") == [259, 260]
    assert LLAMA.encode("hello") == [268]


def test_bos_is_added_as_the_model_says_and_never_doubled() -> None:
    assert BYTE_LEVEL.encode("hello") == [259]
    assert BYTE_LEVEL.encode("hello", special=True) == [261, 259]
    assert BYTE_LEVEL.encode("<s>hello", special=True) == [261, 259]
    assert BYTE_LEVEL.encode("<s>hello", special=True, bos=True) == [261, 259]
    assert BYTE_LEVEL.encode("hello", special=True, bos=False) == [259]
    assert BYTE_LEVEL.encode("hello", bos=True) == [261, 259]
    assert BYTE_LEVEL.encode("", special=True) == [261]
    both = Tokenizer.from_gguf(byte_level(add_eos_token=True))
    assert both.encode("hello", special=True) == [261, 259, 262]
    assert both.encode("hello</s>", special=True) == [261, 259, 262]
    assert both.encode("hello") == [259]
    without = Tokenizer.from_gguf(byte_level(bos_token_id=None, add_bos_token=None))
    assert without.encode("hello", special=True) == [259]
    with pytest.raises(RequestError, match="no BOS"):
        without.encode("hello", bos=True)


def test_bos_by_default_for_the_families_that_were_trained_with_it() -> None:
    assert LLAMA.add_bos
    assert Tokenizer.from_gguf(byte_level(pre="llama-bpe", add_bos_token=None)).add_bos
    assert not Tokenizer.from_gguf(byte_level(add_bos_token=None)).add_bos


def test_llama_takes_off_one_leading_space_of_a_text_and_none_of_a_continuation() -> None:
    ids = LLAMA.encode("  hello")
    assert LLAMA.decode(ids) == "  hello"
    assert LLAMA.decode([268, 268]) == "hello hello"
    assert LLAMA.decode([268], continues=True) == " hello"
    assert LLAMA.decode([1, 268]) == "hello"
    assert LLAMA.decode([1, 268], skip_special=False) == "<s> hello"
    assert UNPREFIXED.decode([268]) == " hello"
    stream = LLAMA.stream(continues=True)
    assert stream.push(268) == " hello"


def test_text_after_a_control_token_starts_with_a_space_again() -> None:
    assert LLAMA.encode("hello</s>hello", special=True) == [1, 268, 2, 268]


def test_equal_scores_merge_the_leftmost_first() -> None:
    tokens = ["<unk>", "<s>", "a", "b", "c", "ab", "bc"]
    tied = llama(
        tokens=tokens, scores=[0.0] * 7, token_type=[2, 3, 1, 1, 1, 1, 1], eos_token_id=None, add_space_prefix=False
    )
    assert Tokenizer.from_gguf(tied).encode("abc") == [5, 4]
    better = tied | {f"{G}scores": [0.0] * 6 + [1.0]}
    assert Tokenizer.from_gguf(better).encode("abc") == [2, 6]


def test_unused_tokens_are_steps_of_merging_but_never_come_out() -> None:
    tokens = ["<unk>", "<s>", "a", "b", "c", "ab", "abc"]
    base = llama(tokens=tokens, scores=[0.0] * 7, eos_token_id=None, add_space_prefix=False)
    kinds = [2, 3, 1, 1, 1, 5, 1]
    tokenizer = Tokenizer.from_gguf(base | {f"{G}token_type": kinds})
    assert tokenizer.encode("abc") == [6]
    assert tokenizer.encode("ab") == [2, 3]


def test_unknown_characters_without_bytes_are_one_unknown_token() -> None:
    tokens = ["<unk>", "<s>", "a", "▁"]
    tokenizer = Tokenizer.from_gguf(llama(tokens=tokens, scores=[0.0] * 4, token_type=[2, 3, 1, 1], eos_token_id=None))
    assert tokenizer.encode("aéüa") == [3, 2, 0, 2]


def test_a_vocabulary_without_some_bytes_drops_them() -> None:
    metadata = byte_level()
    tokens = list(metadata[f"{G}tokens"])
    tokens[0], tokens[0xC3] = "[gone 0]", "[gone 195]"
    tokenizer = Tokenizer.from_gguf(metadata | {f"{G}tokens": tokens})
    assert tokenizer.encode("a\x00b") == tokenizer.encode("a") + tokenizer.encode("b")
    assert tokenizer.decode(tokenizer.encode("é")) == "\ufffd"


def test_invalid_utf8_becomes_replacement_characters() -> None:
    assert BYTE_LEVEL.decode([0xE2, 0x96]) == "\ufffd"  # one for a truncated character, as the tokenizers library
    assert LLAMA.decode([3 + 0xE2, 3 + 0x96]) == "\ufffd\ufffd"  # one for each byte, as SentencePiece


@pytest.mark.parametrize("bad", [-1, BYTE_LEVEL.vocab_size, 10**12])
def test_an_id_out_of_range_is_named(bad: int) -> None:
    for call in (
        lambda: BYTE_LEVEL.decode([bad]),
        lambda: BYTE_LEVEL.stream().push(bad),
        lambda: BYTE_LEVEL.token(bad),
    ):
        with pytest.raises(RequestError, match=rf"{bad} .*{BYTE_LEVEL.vocab_size} tokens"):
            call()


@pytest.mark.parametrize("bad", ["3", 1.0, None, np.ones((2, 2), int)])
def test_what_is_no_integer_is_no_token_id(bad: Any) -> None:
    for call in (
        lambda: BYTE_LEVEL.decode([bad]),
        lambda: BYTE_LEVEL.stream().push(bad),
        lambda: BYTE_LEVEL.token(bad),
        lambda: BYTE_LEVEL.token_bytes(bad),
        lambda: BYTE_LEVEL.is_control(bad),
    ):
        with pytest.raises(RequestError, match="a token id is an integer, not"):
            call()
    with pytest.raises(RequestError, match="sequence of integers, not NoneType"):
        BYTE_LEVEL.decode(None)


@pytest.mark.parametrize(("text", "message"), [("a\ud800b", "U\\+D800.* 1,"), (b"bytes", "bytes"), (None, "NoneType")])
def test_text_that_is_not_unicode_is_refused(text: Any, message: str) -> None:
    for tokenizer in ANY.values():
        with pytest.raises(RequestError, match=message):
            tokenizer.encode(text)


def test_token_and_token_bytes() -> None:
    assert BYTE_LEVEL.token(260) == "Ġhello"
    assert BYTE_LEVEL.token_bytes(260) == b" hello"
    assert BYTE_LEVEL.token_bytes(0xC3) == b"\xc3"
    assert BYTE_LEVEL.token_bytes(261) == b"<s>"
    assert LLAMA.token_bytes(3 + 0x0A) == b"\n"
    assert LLAMA.token_bytes(268) == b" hello"
    assert LLAMA.unk_id == 0
    assert LLAMA.pad_id is None


def test_text_is_what_is_neither_control_nor_unused() -> None:
    names = {BYTE_LEVEL.token(i) for i in range(BYTE_LEVEL.vocab_size) if not BYTE_LEVEL.is_text(i)}
    assert names == {"<s>", "</s>", "<|im_end|>", "<pad>"}
    assert [LLAMA.is_text(i) for i in (0, 1, 2, 3, 259)] == [False, False, False, True, True]


def test_stop_ids_are_eos_eot_eom_and_known_end_tokens_that_are_not_plain_text() -> None:
    assert BYTE_LEVEL.stop_ids == {262, 263}
    more = Tokenizer.from_gguf(byte_level(eot_token_id=264, eom_token_id=265))
    assert more.stop_ids == {262, 263, 264, 265}
    plain = Tokenizer.from_gguf(byte_level(token_type=[1] * 261 + [3, 3, 1, 4, 4, 5]))
    assert plain.stop_ids == {262}


def test_channel_formats_end_a_turn_at_another_token_than_end() -> None:
    tokens = [*alphabet(), "<|end|>", "<|return|>", "<|call|>"]
    metadata = {f"{G}model": "gpt2", f"{G}pre": "gpt-4o", f"{G}tokens": tokens, f"{G}merges": []}
    metadata |= {f"{G}token_type": [1] * 256 + [3, 3, 3], f"{G}eos_token_id": 257}
    assert Tokenizer.from_gguf(metadata).stop_ids == {257, 258}


class Array:
    """An array as the GGUF reader gives it."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def strings(self) -> list[str]:
        return self.items

    def numpy(self) -> np.ndarray[Any, Any]:
        return np.array(self.items)


def test_arrays_of_the_reader_and_lists_are_the_same() -> None:
    metadata = {key: Array(value) if isinstance(value, list) else value for key, value in llama().items()}
    assert Tokenizer.from_gguf(metadata).encode("hello, oh") == LLAMA.encode("hello, oh")


def test_chat_templates_are_found_by_name() -> None:
    metadata = byte_level() | {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.chat_template == "a"
    assert tokenizer.chat_templates == {"default": "a", "tool_use": "b"}
    assert BYTE_LEVEL.chat_template is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(model=None), "tokenizer.ggml.model is missing"),
        (byte_level(model="t5"), "'t5'.*'gpt2'.*'llama'"),
        (byte_level(pre=None), "tokenizer.ggml.pre is missing.*gguf-new-metadata"),
        (byte_level(pre="mystery"), "'mystery'.*llama-bpe.*smollm"),
        (byte_level(tokens=None), "tokenizer.ggml.tokens"),
        (byte_level(tokens=[]), "0 entries"),
        (byte_level(tokens=["a"] * 267), "'a' twice"),
        (byte_level(tokens="abc"), "array of strings"),
        (byte_level(tokens=[1, 2]), r"tokens\[0\]"),
        (byte_level(tokens=NumericArray("uint8", b"12")), "ggml.tokens must be an array of strings"),
        (byte_level(merges=NumericArray("uint8", b"12")), "merges must be an array of strings"),
        (byte_level(token_type=StringArray(b"", np.zeros(1, np.int64))), "token_type must be an array of numbers"),
        (byte_level(token_type=[1, 1]), "2 entries for 267"),
        (byte_level(token_type=[9] * 267), "expected 1 to 6"),
        (byte_level(merges=None), "merges is missing"),
        (byte_level(merges=["h e", "nospace"]), r"merges\[1\]"),
        (byte_level(merges=["h e", "x hello"]), r"merges\[1\].*'xhello'"),
        (byte_level(bos_token_id=267), "267.*0 to 266"),
        (byte_level(eos_token_id=-1), "-1"),
        (byte_level(eos_token_id="2"), "expected int"),
        (byte_level(add_bos_token=1), "expected bool"),
        (byte_level(bos_token_id=None), "bos_token_id is missing"),
        (byte_level(add_space_prefix=True), "add_space_prefix"),
        (llama(scores=None), "scores is missing"),
        (llama(scores=[1.0]), "1 entries"),
        (llama(scores=[float("nan")] * 271), "not a number"),
        (llama(bos_token_id=None), "bos_token_id"),
        (llama(precompiled_charsmap=[1]), "precompiled_charsmap"),
        (llama(token_type=[6] * 271), "marked as a byte"),
        (llama(token_type=[2, 3, 3] + [6] * 255 + [1] * 13), "255 byte values"),
    ],
)
def test_inconsistent_metadata_is_refused_with_the_key(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=f"(?s){message}"):
        Tokenizer.from_gguf(metadata)


def test_every_known_pre_tokenizer_encodes_and_decodes_any_bytes() -> None:
    text = "I've 12345 naïve ÀÉ HTTPServer\r\n\n  日本語 😀_x[1]!? ½\t$=`~\u00a0\u3000 end"
    assert len(pre_tokenizer_names()) > 30
    for name in pre_tokenizer_names():
        tokenizer = Tokenizer.from_gguf(byte_level(pre=name))
        assert tokenizer.decode(tokenizer.encode(text)) == text, name


def pieces(name: str, text: str) -> list[str]:
    """How a family cuts text, as text."""
    to_byte = {char: byte for byte, char in enumerate(alphabet())}
    _, splitter = build(pre_tokenizer(name))
    return [
        bytes(to_byte[char] for char in piece).decode("utf-8", "replace")
        for piece, _ in splitter.pre_tokenize_str(text)
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'll pay 1234!", ["I", "'ll", " pay", " 1234", "!"]),
        ("smollm", "I'll pay 1234!", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "!"]),
        ("llama-bpe", "I'LL pay 1234!\n\nx", ["I", "'LL", " pay", " ", "123", "4", "!\n\n", "x"]),
        ("qwen2", "I'LL pay 12\n", ["I", "'LL", " pay", " ", "1", "2", "\n"]),
        ("tekken", "camelCase HTTPServer's", ["camel", "Case", " HTTPServer", "'s"]),
        ("gpt-4o", "camelCase I'll 1234", ["camel", "Case", " I'll", " ", "123", "4"]),
        ("falcon", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
        ("deepseek-coder", "x=12 中文\n", ["x", "=", "1", "2", " ", "中文", "\n"]),
        ("deepseek-llm", "abc, 12 \n中  ", ["abc", ",", " ", "1", "2", " ", "\n", "中", "  "]),
        ("default", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
    ],
)
def test_families_cut_text_their_own_way(name: str, text: str, expected: list[str]) -> None:
    assert pieces(name, text) == expected


def test_long_inputs_take_linear_time() -> None:
    texts = ["hello world, " * 20_000, "a" * 100_000, "é" * 100_000, " " * 100_000 + "1", "<" * 100_000, "<u>" * 50_000]
    slow = {"deepseek-llm": Tokenizer.from_gguf(byte_level(pre="deepseek-llm"))}
    for name, tokenizer in (ANY | slow).items():
        for text in texts:
            start = time.perf_counter()
            ids = tokenizer.encode(text, special=True, bos=False)
            assert tokenizer.decode(ids, skip_special=False).lstrip(" ") == text.lstrip(" "), name
            assert time.perf_counter() - start < 5, (name, text[:10])


def test_tokenizer_json_with_its_config(tmp_path: Path) -> None:
    data = json.loads((Path(__file__).parents[1] / "reference" / "tokenizer_byte_level.json").read_text())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data["tokenizer_json"]))
    bare = Tokenizer.from_json(path)
    assert bare.bos_id is None
    assert bare.chat_template is None
    assert [bare.encode(text, special=True) for text, _ in data["special"]] == [ids for _, ids in data["special"]]
    assert [bare.encode(text) for text, _ in data["plain"]] == [ids for _, ids in data["plain"]]
    config = {"bos_token": {"content": "<|user|>"}, "eos_token": "<|end|>", "add_bos_token": True, "chat_template": "t"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    full = Tokenizer.from_json(path)
    assert (full.bos_id, full.eos_id, full.add_bos, full.chat_template) == (1, 0, True, "t")
    assert full.stop_ids == {0}
    assert full.encode("x", special=True)[0] == 1
    over = Tokenizer.from_json(path, {f"{G}bos_token_id": 0, f"{G}add_bos_token": False})
    assert (over.bos_id, over.add_bos) == (0, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("{", "not JSON"), ("[1]", "expected an object"), ("{}", "not a tokenizer.json")],
)
def test_a_broken_tokenizer_json_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "NUL"])
def test_a_tokenizer_json_that_is_no_regular_file_is_not_read(tmp_path: Path, kind: str) -> None:
    path = {"pipe": tmp_path / "pipe", "device": Path("/dev/zero"), "NUL": tmp_path / "a\0b"}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(TokenizerError, match=r"not a regular file|cannot be the name of a file"):
        Tokenizer.from_json(path)


@pytest.mark.parametrize(("content", "message"), [(b"\xff", "not UTF-8"), (b"x" * (2 << 20), "more than the")])
def test_a_template_beside_the_tokenizer_is_text_of_bounded_size(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(TokenizerError, match=f"chat_template.jinja.*{message}"):
        JsonConfig.beside(tmp_path / "tokenizer.json")
