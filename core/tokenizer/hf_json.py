"""A Hugging Face ``tokenizer.json`` beside the model, with ``tokenizer_config.json`` where there is one.

The file says everything about encoding, so the ``tokenizers`` library runs it as it is; this module adds what the
library leaves open: ids with a role, the bytes of each token, the chat template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .vocabulary import TokenKind, Vocabulary

MAX_JSON_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20


def read_text(path: Path, most: int) -> str:
    """The text of a regular file of at most ``most`` bytes; TokenizerError names the file and what is wrong with it."""
    try:
        if path.exists() and not path.is_file():  # A pipe would wait for a writer, a device may never end.
            raise TokenizerError(f"cannot read {path}: it is not a regular file")
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # A NUL or a lone surrogate in the name.
        raise TokenizerError(f"{str(path)!r} cannot be the name of a file: {error}") from error
    if len(raw) > most:
        raise TokenizerError(f"{path} has more than the {most} bytes that are read")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; TokenizerError names the file and what is wrong with it."""
    try:
        data = json.loads(read_text(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} holds {type(data).__name__}, expected an object")
    return data


@dataclass(frozen=True, slots=True)
class JsonConfig:
    """What ``tokenizer_config.json`` and a chat template file beside it say; absent files leave fields None."""

    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_template: str | None = None

    @classmethod
    def beside(cls, path: Path) -> JsonConfig:
        """Reads the files beside ``tokenizer.json``."""
        config_path = path.with_name("tokenizer_config.json")
        config = read_json(config_path) if config_path.is_file() else {}

        def text(key: str) -> str | None:
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            return value if isinstance(value, str) else None

        def flag(key: str) -> bool | None:
            value = config.get(key)
            return value if isinstance(value, bool) else None

        template = config.get("chat_template")
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        template_path = path.with_name("chat_template.jinja")
        if template_path.is_file():
            template = read_text(template_path, MAX_TEMPLATE_BYTES)
        return cls(
            text("bos_token"),
            text("eos_token"),
            text("unk_token"),
            text("pad_token"),
            flag("add_bos_token"),
            flag("add_eos_token"),
            template if isinstance(template, str) else None,
        )


class JsonEncoder:
    """Text to ids through the file's own pipeline, and its vocabulary in the form that decoding needs."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        data = read_json(path)
        try:
            full = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise TokenizerError(f"{path} is not a tokenizer.json that can be used: {error}") from error
        full.no_truncation()
        full.no_padding()
        added = full.get_added_tokens_decoder()
        self._full, self._plain = full, self._without_special(full, added, path)
        start = full.encode("", add_special_tokens=True).ids
        self.first_id: int | None = start[0] if start else None
        self.byte_level, self.strips_space = self._decoding(data, path)
        self.vocabulary = self._read_vocabulary(full, added)

    @staticmethod
    def _without_special(full: Any, added: dict[int, Any], path: Path) -> Any:
        """A second view of the same model, in which the names of special tokens are plain text."""
        import tokenizers

        plain = tokenizers.Tokenizer(full.model)
        if full.normalizer is not None:
            plain.normalizer = full.normalizer
        if full.pre_tokenizer is not None:
            plain.pre_tokenizer = full.pre_tokenizer
        for _, token in sorted(added.items()):  # in the order of ids, which are given out one by one
            (plain.add_special_tokens if token.special else plain.add_tokens)([token])
        if plain.get_added_tokens_decoder().keys() != added.keys():
            plain = tokenizers.Tokenizer.from_file(str(path))
            plain.no_truncation()
            plain.no_padding()
        plain.encode_special_tokens = True
        return plain

    @staticmethod
    def _decoding(data: dict[str, Any], path: Path) -> tuple[bool, bool]:
        """How tokens become text: (byte-level alphabet, one leading space is taken off)."""
        decoder = data.get("decoder") or {}
        steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
        kinds = [step.get("type") for step in steps if isinstance(step, dict)]
        if kinds == ["ByteLevel"]:
            return True, False
        if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
            metaspace = [step for step in steps if step.get("type") == "Metaspace"]
            prefix = any(step.get("prepend_scheme", "always") != "never" for step in metaspace)
            return False, prefix or "Strip" in kinds
        raise TokenizerError(
            f"{path} decodes with {kinds or 'nothing'}; only byte-level and SentencePiece-style tokenizers are read"
        )

    def _read_vocabulary(self, full: Any, added: Any) -> Vocabulary:
        ids: dict[str, int] = full.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1
        if not 0 < size <= 2 * len(ids) + 1024:
            raise TokenizerError(f"the tokenizer's ids go up to {size - 1} for {len(ids)} tokens")
        tokens = [f"[unused {i}]" for i in range(size)]
        kinds = [int(TokenKind.UNUSED)] * size
        for token, index in ids.items():
            tokens[index] = token
            is_byte = not self.byte_level and len(token) == 6 and token.startswith("<0x") and token[5] == ">"
            kinds[index] = int(TokenKind.BYTE if is_byte else TokenKind.NORMAL)
        for index, token in added.items():
            kinds[index] = int(TokenKind.CONTROL if token.special else TokenKind.USER_DEFINED)
        return Vocabulary(tokens, kinds, [], ids)

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of the text; where ``special``, names of special tokens in it become those tokens."""
        engine = self._full if special else self._plain
        ids: list[int] = engine.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids
