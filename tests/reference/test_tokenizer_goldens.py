"""Tokens and chats equal those of SentencePiece, tokenizers and transformers (see make_tokenizer_goldens.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from polyhead.chat import ChatTemplate
from polyhead.tokenizer import Tokenizer
from polyhead.tokenizer.pretokenizers import build, pre_tokenizer

HERE = Path(__file__).parent


def golden(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


SENTENCEPIECE = golden("tokenizer_sentencepiece.json")


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(name: str) -> None:
    case = SENTENCEPIECE[name]
    tokenizer = Tokenizer.from_gguf(case["metadata"])
    for text, ids in case["encoded"]:
        assert tokenizer.encode(text) == ids, text
    for ids, text in case["decoded"]:
        assert tokenizer.decode(ids) == text, ids


def test_byte_level() -> None:
    case = golden("tokenizer_byte_level.json")
    tokenizer = Tokenizer.from_gguf(case["metadata"])
    for text, ids in case["plain"]:
        assert tokenizer.encode(text) == ids, text
    for text, ids in case["special"]:
        assert tokenizer.encode(text, special=True) == ids, text
    for ids, visible, everything in case["decoded"]:
        assert tokenizer.decode(ids) == visible
        assert tokenizer.decode(ids, skip_special=False) == everything


@pytest.mark.parametrize(("name", "cases"), golden("tokenizer_splits.json").items())
def test_splits_of_real_tokenizers(name: str, cases: list[Any]) -> None:
    normalizer, splitter = build(pre_tokenizer(name))
    for text, expected in cases:
        normal = normalizer.normalize_str(text) if normalizer else text
        assert [piece for piece, _ in splitter.pre_tokenize_str(normal)] == expected, text


CHATS = golden("chat_templates.json")


@pytest.mark.parametrize("case", CHATS, ids=[f"{case['name']}-{i}" for i, case in enumerate(CHATS)])
def test_chat_templates(case: dict[str, Any]) -> None:
    template = ChatTemplate(case["source"], "<s>", "</s>")
    assert template.render(case["messages"], case["tools"], add_generation_prompt=case["prompt"]) == case["text"]


@pytest.mark.model
def test_smollm2(smollm2_path: Path) -> None:
    from polyhead.gguf import open_gguf

    case = golden("tokenizer_smollm2.json")
    with open_gguf(smollm2_path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    for text, ids in case["encoded"]:
        assert tokenizer.encode(text, special=True) == ids, text
    for ids, text in case["decoded"]:
        assert tokenizer.decode(ids, skip_special=False) == text, ids
    assert {tokenizer.token(i) for i in tokenizer.stop_ids} == {"<|endoftext|>", "<|im_end|>"}
    assert not tokenizer.add_bos
    template = ChatTemplate(tokenizer.chat_template, "<|im_start|>", "<|im_end|>")
    for messages, prompt, text in case["chats"]:
        assert template.render(messages, add_generation_prompt=prompt) == text
