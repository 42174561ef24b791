"""Guides: whatever is chosen of what they allow, the text has the form asked for, on any vocabulary."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead.engine import StructuredOutputs
from polyhead.errors import RequestError
from polyhead.tokenizer import Tokenizer
from polyhead.tokenizer.bpe import byte_alphabet
from polyhead.tokenizer.tiny import tiny_vocabulary

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'polyhead[structured]'")

from polyhead.structured import Guides

REFERENCE = Path(__file__).parents[2] / "reference"
G = "tokenizer.ggml."
PADDING = 37  # rows of logits beyond the tokenizer's vocabulary


def golden(name: str) -> Any:
    return json.loads((REFERENCE / f"tokenizer_{name}.json").read_text(encoding="utf-8"))


def pieces_of_all_kinds() -> dict[str, Any]:
    """A SentencePiece vocabulary with byte tokens, two tokens of one text, an empty one, and names of every kind."""
    words = ["▁", "a", "b", "c", "▁a", "ab", "bc", "▁b", "é", "<u>", "<0x61>a", "[unused]", "", '"', "{", "}", '{"']
    kinds = [1] * 9 + [4, 1, 5, 1, 1, 1, 1, 1]
    tokens = ["<unk>", "<s>", "</s>", "<fim>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    return {
        f"{G}model": "llama",
        f"{G}tokens": tokens,
        f"{G}scores": [0.0] * len(tokens),
        f"{G}token_type": [2, 3, 3, 3] + [6] * 256 + kinds,
        f"{G}unknown_token_id": 0,
        f"{G}bos_token_id": 1,
        f"{G}eos_token_id": 2,
    }


def all_bytes() -> dict[str, Any]:
    """A byte-level vocabulary that can write everything, with tokens that begin or end inside a character."""
    spell = {byte: chr(char) for char, byte in byte_alphabet().items()}
    merges = ["Ã ©", "© Ã", "a b", "Ġ a", '{ "', "ð Ł", "ðŁ ĺ"]
    tokens = [*(spell[byte] for byte in range(256)), *(merge.replace(" ", "") for merge in merges)]
    return {
        f"{G}model": "gpt2",
        f"{G}pre": "gpt-2",
        f"{G}tokens": [*tokens, "<s>", "</s>", "<|im_end|>", "<u>", "<pad>"],
        f"{G}token_type": [1] * len(tokens) + [3, 3, 3, 4, 5],
        f"{G}merges": merges,
        f"{G}bos_token_id": len(tokens),
        f"{G}eos_token_id": len(tokens) + 1,
    }


def without_kinds() -> dict[str, Any]:
    """A byte-level vocabulary whose file marks no token as special."""
    metadata = dict(tiny_vocabulary(300))
    del metadata[f"{G}token_type"]
    return metadata


TOKENIZERS = {
    "byte-level": Tokenizer.from_gguf(all_bytes()),
    "some bytes": Tokenizer.from_gguf(golden("byte_level")["metadata"]),
    "sentencepiece": Tokenizer.from_gguf(golden("sentencepiece")["llama"]["metadata"]),
    "without bytes": Tokenizer.from_gguf(golden("sentencepiece")["squeezed"]["metadata"]),
    "pieces": Tokenizer.from_gguf(pieces_of_all_kinds()),
    "tiny": Tokenizer.from_gguf(tiny_vocabulary(300)),
    "without kinds": Tokenizer.from_gguf(without_kinds()),
}
GUIDES = {name: Guides(each, each.vocab_size + PADDING, each.stop_ids) for name, each in TOKENIZERS.items()}


def writable(tokenizer: Tokenizer) -> set[int]:
    """The tokens that may be written: text that is not empty, and nobody's role."""
    roles = {tokenizer.bos_id, tokenizer.unk_id, tokenizer.pad_id, *tokenizer.stop_ids}
    found = {token for token in range(tokenizer.vocab_size) if tokenizer.is_text(token)}
    return {token for token in found - roles if tokenizer.token_bytes(token) not in (b"", b"\xff")}


TEXT = {name: writable(each) for name, each in TOKENIZERS.items()}


def ids(words: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def walk(name: str, spec: StructuredOutputs, choose: Any, most: int = 400) -> str | None:
    """The text of random allowed tokens up to an end token; None where that did not come. Checks every step."""
    tokenizer, guide = TOKENIZERS[name], GUIDES[name].guide(spec)
    stops, taken = set(tokenizer.stop_ids), []
    for _ in range(most):
        words = guide.allowed()
        assert words.dtype == np.int32
        assert words.shape == (-(-(tokenizer.vocab_size + PADDING) // 32),)
        allowed = ids(words)
        assert allowed - stops <= TEXT[name]
        assert allowed & stops in (set(), stops)
        assert guide.ended == (allowed <= stops)
        token = choose(sorted(allowed))
        guide.accept(token)
        if token in stops:
            assert guide.ended
            assert ids(guide.allowed()) == stops
            with pytest.raises(RequestError, match="its text has ended"):
                guide.accept(token)
            stream = tokenizer.stream(continues=True)
            text = "".join(stream.push(token) for token in taken) + stream.flush()
            assert text == tokenizer.decode(taken, continues=True)
            return text
        taken.append(token)
    return None


def chooser(data: st.DataObject, tokenizer: Tokenizer, eager: bool) -> Any:
    """Draws tokens; an eager one ends as soon as it may."""

    def choose(allowed: list[int]) -> int:
        if eager:
            for stop in tokenizer.stop_ids:
                if stop in allowed:
                    return stop
        return allowed[data.draw(st.integers(0, len(allowed) - 1))]

    return choose


REGEXES = [
    "[ab]{2,5}",
    " ?[a-z]+( [0-9]{1,3})*",
    "a|bc|",
    "(?i)yes|no",
    "[é-í]?[😀☃]{1,2}",
    r"[0-9]{3}-[a-z]+",
    "(a|b)*a(a|b){3}",
    "<u>[<>us/]*",
    r"x\/y|/",
    "[^a-y]",
    r"^\{\}$",
    "a*?b+?",
]
SPELT_EVERYWHERE = ("byte-level", "sentencepiece", "pieces")


@pytest.mark.parametrize("name", SPELT_EVERYWHERE)
@pytest.mark.parametrize("regex", REGEXES)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), eager=st.booleans())
def test_a_text_matches_its_regular_expression(name, regex, data, eager):
    text = walk(name, StructuredOutputs(regex=regex), chooser(data, TOKENIZERS[name], eager), 60)
    assert text is None or re.fullmatch(regex, text)
    assert text is not None or not eager or "+" in regex or "*" in regex


CHOICES = [
    ["yes", "no"],
    [" a", "a", "ab", "abc"],
    ['q"/\\', "line\nbreak\t", "é☃😀", "(x|y)*"],
    ["<s>", "</s>", "<u>"],
]


@pytest.mark.parametrize("name", SPELT_EVERYWHERE)
@settings(max_examples=15, deadline=None)
@given(
    choice=st.sampled_from(CHOICES)
    | st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=5, unique=True
    ),
    data=st.data(),
)
def test_a_text_is_one_of_the_choices(name, choice, data):
    text = walk(name, StructuredOutputs(choice=choice), chooser(data, TOKENIZERS[name], False))
    assert text in choice


@pytest.mark.parametrize("name", SPELT_EVERYWHERE)
def test_every_choice_can_be_written(name):
    tokenizer = TOKENIZERS[name]
    for choice in CHOICES:
        for text in choice:
            guide = GUIDES[name].guide(StructuredOutputs(choice=choice))
            left = text.encode()
            while left:
                token = max(
                    (t for t in ids(guide.allowed()) - tokenizer.stop_ids if left.startswith(tokenizer.token_bytes(t))),
                    key=lambda t: len(tokenizer.token_bytes(t)),
                )
                guide.accept(token)
                left = left.removeprefix(tokenizer.token_bytes(token))
            assert tokenizer.stop_ids <= ids(guide.allowed())


SCHEMA = {
    "type": "object",
    "properties": {
        "zeta": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": -3, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é", None, 1.5]}, "minItems": 1, "maxItems": 3},
        "inner": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "additionalProperties": False},
    },
    "required": ["zeta", "count", "tags", "inner"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": "[ \n]{1,2}"},
}


def check_schema(value: Any) -> None:
    """What SCHEMA says, written out."""
    assert list(value) == ["zeta", "count", "tags", "inner"]
    assert isinstance(value["zeta"], str)
    assert len(value["zeta"]) <= 8
    assert isinstance(value["count"], int)
    assert -3 <= value["count"] <= 120
    assert 1 <= len(value["tags"]) <= 3
    assert all(tag in ("a", "é", None, 1.5) for tag in value["tags"])
    assert list(value["inner"]) in ([], ["ok"])
    assert all(isinstance(item, bool) for item in value["inner"].values())


@pytest.mark.parametrize("name", SPELT_EVERYWHERE)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_text_is_json_that_its_schema_accepts(name, data):
    text = walk(name, StructuredOutputs(json=SCHEMA), chooser(data, TOKENIZERS[name], True))
    assert text is not None
    check_schema(json.loads(text))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_object_is_json(data):
    text = walk("byte-level", StructuredOutputs(json=True), chooser(data, TOKENIZERS["byte-level"], True))
    assert text is None or isinstance(json.loads(text), dict)


def test_blanks_come_to_an_end_unless_the_schema_says_otherwise():
    for extra, most in ({}, 64), ({"x-guidance": {"whitespace_flexible": False}}, 0):
        guide = GUIDES["tiny"].guide(StructuredOutputs(json={"type": "object", **extra}))
        guide.accept(TOKENIZERS["tiny"].encode("{")[0])
        blank = TOKENIZERS["tiny"].encode("\n")[0]
        count = 0
        while blank in ids(guide.allowed()):
            guide.accept(blank)
            count += 1
        assert count == most


SUMS = 'start: sum\nsum: sum "+" term | term\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]{1,3}/\n'


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_text_follows_its_grammar(data):
    text = walk("byte-level", StructuredOutputs(grammar=SUMS), chooser(data, TOKENIZERS["byte-level"], True))
    if text is not None:
        assert re.fullmatch(r"[0-9+()]+", text)
        assert eval(re.sub(r"[0-9]+", "1", text)) > 0


def test_a_fork_goes_its_own_way():
    tokenizer, spec = TOKENIZERS["byte-level"], StructuredOutputs(choice=["aac", "abb"])
    a, b = (tokenizer.encode(text)[0] for text in "ab")
    guide = GUIDES["byte-level"].guide(spec)
    guide.accept(a)
    before = ids(guide.allowed())
    forks = [guide.fork() for _ in range(3)]
    forks[0].accept(a)
    forks[1].accept(b)
    assert ids(guide.allowed()) == ids(forks[2].allowed()) == before
    assert ids(forks[0].allowed()) != ids(forks[1].allowed())
    forks[0].accept(tokenizer.encode("c")[0])
    forks[1].accept(b)
    assert [each.ended for each in (guide, *forks)] == [False, True, True, False]
    forks[0].accept(min(tokenizer.stop_ids))
    assert forks[0].fork().ended


def test_masks_are_not_written_to():
    guide = GUIDES["tiny"].guide(StructuredOutputs(regex="[ab]*c"))
    first = guide.allowed()
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    kept = first.copy()
    guide.accept(TOKENIZERS["tiny"].encode("c")[0])
    assert guide.allowed() is not first
    assert (first == kept).all()


def test_tokens_that_are_no_text_cannot_be_reached_by_writing_their_names():
    for name, tokenizer in TOKENIZERS.items():
        control = [t for t in range(tokenizer.vocab_size) if tokenizer.is_control(t)]
        assert control or name == "without kinds"
        guide = GUIDES[name].guide(StructuredOutputs(regex="(?s:.*)"))
        allowed = ids(guide.allowed())
        assert allowed.isdisjoint(set(control) - tokenizer.stop_ids)
        assert tokenizer.stop_ids <= allowed
    pieces = TOKENIZERS["pieces"]
    texts = [pieces.token(t) for t in ids(GUIDES["pieces"].guide(StructuredOutputs(regex="(?s:.+)")).allowed())]
    assert "" not in texts
    assert "[unused]" not in texts
    assert "<u>" in texts  # user-defined: text
    twice = StructuredOutputs(regex="a")
    assert {pieces.token(t) for t in ids(GUIDES["pieces"].guide(twice).allowed())} == {"a", "<0x61>"}


def test_a_leading_space_is_a_part_of_the_text():
    pieces = TOKENIZERS["pieces"]
    allowed = {pieces.token(t) for t in ids(GUIDES["pieces"].guide(StructuredOutputs(regex="a+")).allowed())}
    assert allowed == {"a", "<0x61>"}
    allowed = {pieces.token(t) for t in ids(GUIDES["pieces"].guide(StructuredOutputs(regex=" a")).allowed())}
    assert allowed == {"▁", "<0x20>", "▁a"}


def test_a_model_without_end_tokens_ends_by_itself():
    tokenizer = TOKENIZERS["tiny"]
    guide = Guides(tokenizer, tokenizer.vocab_size, ()).guide(StructuredOutputs(choice=["a"]))
    assert ids(guide.allowed()) == set(tokenizer.encode("a"))
    guide.accept(tokenizer.encode("a")[0])
    assert guide.ended
    assert not guide.allowed().any()


@pytest.mark.parametrize("extra", [0, 1, 31, 32, 100])
def test_rows_that_only_pad_the_vocabulary_are_never_allowed(extra):
    tokenizer = TOKENIZERS["tiny"]
    vocab = tokenizer.vocab_size + extra
    guide = Guides(tokenizer, vocab, tokenizer.stop_ids).guide(StructuredOutputs(regex="(?s:.*)"))
    assert guide.allowed().shape == (-(-vocab // 32),)
    assert max(ids(guide.allowed())) < tokenizer.vocab_size


@pytest.mark.parametrize("token", [-1, 10**6, 2])
def test_a_token_that_is_not_allowed_is_refused(token):
    tokenizer = TOKENIZERS["tiny"]
    guide = GUIDES["tiny"].guide(StructuredOutputs(regex="ab"))
    with pytest.raises(RequestError, match=r"structured_outputs.regex cannot be followed after [01] tokens: "):
        guide.accept(tokenizer.encode("cde")[0] if token == 2 else token)
    with pytest.raises(RequestError, match="is not allowed here"):
        GUIDES["tiny"].guide(StructuredOutputs(regex="ab")).accept(min(tokenizer.stop_ids))


def test_requests_that_come_together_with_one_form_compile_it_once(monkeypatch):
    tokenizer = TOKENIZERS["tiny"]
    guides = Guides(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    compiled, compile_ = [], guides._compile
    monkeypatch.setattr(guides, "_compile", lambda spec, *more: (compiled.append(spec), compile_(spec, *more))[1])
    forms = [StructuredOutputs(regex=regex) for regex in ("ab", "a+")]
    together = threading.Barrier(8)

    def ask(number: int) -> set[int]:
        together.wait(60)
        return ids(guides.guide(forms[number % 2]).allowed())

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert sorted(compiled, key=forms.index) == forms
    assert found == found[:2] * 4


def test_what_the_vocabulary_cannot_write_is_told():
    with pytest.raises(RequestError, match=r"structured_outputs.choice\[1\] cannot be written: .* lacks bytes"):
        GUIDES["tiny"].guide(StructuredOutputs(choice=["ok", "caf\xe9"]))
    with pytest.raises(RequestError, match=r"choice\[0\] cannot be written"):
        GUIDES["without bytes"].guide(StructuredOutputs(choice=["\u2603"]))
    with pytest.raises(RequestError, match="regex allows no text that can be written with the model's vocabulary"):
        GUIDES["tiny"].guide(StructuredOutputs(regex="é+"))
    guide = GUIDES["tiny"].guide(StructuredOutputs(regex="aé|b"))
    guide.accept(TOKENIZERS["tiny"].encode("a")[0])
    with pytest.raises(RequestError, match="regex cannot be followed after 1 tokens: it allows nothing here"):
        guide.allowed()
    optional = GUIDES["tiny"].guide(StructuredOutputs(regex="aé?"))
    optional.accept(TOKENIZERS["tiny"].encode("a")[0])
    assert optional.ended  # what could go on cannot be written


@pytest.mark.model
def test_a_published_vocabulary(smollm2_path, registry):
    from polyhead.model import Model

    with Model(smollm2_path, registry) as model:
        TOKENIZERS["smollm2"], vocab = model.tokenizer, model.decoder.vocab
    TEXT["smollm2"] = writable(TOKENIZERS["smollm2"])
    GUIDES["smollm2"] = Guides(TOKENIZERS["smollm2"], vocab + PADDING, TOKENIZERS["smollm2"].stop_ids)
    random = np.random.default_rng(0)
    for _ in range(10):
        text = walk("smollm2", StructuredOutputs(json=SCHEMA), random.choice)
        check_schema(json.loads(text))
        assert re.fullmatch(
            r"[a-zà-ü ]{3,30}", walk("smollm2", StructuredOutputs(regex=r"[a-zà-ü ]{3,30}"), random.choice)
        )
    with pytest.raises(RequestError, match=r"choice\[0\] cannot be written"):
        GUIDES["smollm2"].guide(StructuredOutputs(choice=["\x04"]))
