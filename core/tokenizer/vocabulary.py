"""A vocabulary as a GGUF file describes it: tokens, their kinds, scores, and the ids with a role. Data and checks only.

Knows nothing of how text becomes tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from ..errors import TokenizerError

MAX_TOKENS = 4_000_000

# Tokens that end a turn, or a document, in the chat formats known. A model may be given one of them by name only, so
# a generation ends at any of them; the list is the one that GGUF readers agree on.
_END_TOKENS = (
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> "
    "<|end_of_text|> <|end_of_turn|> <|END_OF_TURN_TOKEN|> <EOT> _<EOT> [EOT] [EOS] <end_of_utterance> </s> <turn|> "
    "<｜end▁of▁sentence｜> <|fim_pad|> <|repo_name|> <|file_sep|>"
)
END_TOKENS = frozenset(_END_TOKENS.split())


class TokenKind(IntEnum):
    """``tokenizer.ggml.token_type``. Control tokens steer the model and are not text; user-defined ones are text."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Kinds that never come out of merging: they are matched in the text as a whole, and left out of decoded text.
HIDDEN_KINDS = frozenset({TokenKind.CONTROL, TokenKind.UNKNOWN})


def strings(value: Any, key: str) -> list[str]:
    """A string array of the metadata (a list, or an object with ``.strings()``) as a list."""
    try:
        items = value.strings() if hasattr(value, "strings") else value
    except TypeError as error:
        raise TokenizerError(f"{key} must be an array of strings, not {value!r}") from error
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise TokenizerError(f"{key} must be an array of strings, not {type(value).__name__}")
    items = list(items)
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise TokenizerError(f"{key}[{index}] is {item!r}, not a string")
    return items


def numbers(value: Any, key: str) -> list[Any]:
    """A numeric array of the metadata (a list, or an object with ``.numpy()``) as a list of Python numbers."""
    try:
        value = value.numpy() if hasattr(value, "numpy") else value
    except TypeError as error:
        raise TokenizerError(f"{key} must be an array of numbers, not {value!r}") from error
    items = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise TokenizerError(f"{key} must be an array of numbers, not {type(value).__name__}")
    items = list(items)
    for index, item in enumerate(items):
        if not isinstance(item, int | float):
            raise TokenizerError(f"{key}[{index}] is {item!r}, not a number")
    return items


def scalar(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """The value of ``key``, which must be of ``kind`` where present."""
    value = metadata.get(key)
    if value is None:
        return default
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TokenizerError(f"{key} is {value!r}, expected {kind.__name__}")
    return value


def token_id(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    """The id in ``tokenizer.ggml.<name>_token_id``, or None where the file has no such key."""
    key = f"tokenizer.ggml.{name}_token_id"
    value: int | None = scalar(metadata, key, int)
    if value is not None and not 0 <= value < size:
        raise TokenizerError(f"{key} is {value}, but the vocabulary has ids 0 to {size - 1}")
    return value


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token texts by id, in the file's own spelling, with a kind and (SentencePiece) a score for each."""

    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    ids: dict[str, int] = field(repr=False)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], scored: bool) -> Vocabulary:
        """Reads tokens, kinds and, where ``scored``, scores; TokenizerError where they are absent or disagree."""
        if metadata.get("tokenizer.ggml.tokens") is None:
            raise TokenizerError("the model file has no tokenizer.ggml.tokens, so it holds no vocabulary")
        tokens = strings(metadata["tokenizer.ggml.tokens"], "tokenizer.ggml.tokens")
        if not 0 < len(tokens) <= MAX_TOKENS:
            raise TokenizerError(f"tokenizer.ggml.tokens has {len(tokens)} entries, expected 1 to {MAX_TOKENS}")
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
            raise TokenizerError(
                f"tokenizer.ggml.tokens has {twice!r} twice (ids {tokens.index(twice)} and {ids[twice]}), so text "
                "has no single encoding; convert the model again"
            )
        kinds = cls._column(metadata, "tokenizer.ggml.token_type", len(tokens), int(TokenKind.NORMAL))
        for index, kind in enumerate(kinds):
            if not 1 <= kind <= 6 or kind != int(kind):
                raise TokenizerError(f"tokenizer.ggml.token_type[{index}] is {kind}, expected 1 to 6")
        scores: list[float] = []
        if scored:
            if metadata.get("tokenizer.ggml.scores") is None:
                raise TokenizerError("tokenizer.ggml.scores is missing: a 'llama' tokenizer merges by score")
            scores = cls._column(metadata, "tokenizer.ggml.scores", len(tokens), 0.0)
            for index, score in enumerate(scores):
                if score != score:
                    raise TokenizerError(f"tokenizer.ggml.scores[{index}] is not a number")
        return cls(tokens, kinds, scores, ids)

    @staticmethod
    def _column(metadata: Mapping[str, Any], key: str, size: int, default: Any) -> list[Any]:
        if metadata.get(key) is None:
            return [default] * size
        column = numbers(metadata[key], key)
        if len(column) != size:
            raise TokenizerError(f"{key} has {len(column)} entries for {size} tokens")
        return column

    def of_kind(self, *kinds: TokenKind) -> dict[str, int]:
        """Text to id of all tokens of the given kinds."""
        return {self.tokens[i]: i for i, kind in enumerate(self.kinds) if kind in kinds}

    def stop_ids(self, *ids: int | None) -> frozenset[int]:
        """The given ids and those of the well-known end tokens that are marked as more than plain text."""
        unmarked = all(kind == TokenKind.NORMAL for kind in self.kinds)
        found = {i for i in ids if i is not None}
        for text in END_TOKENS:
            index = self.ids.get(text)
            if index is not None and (unmarked or self.kinds[index] != TokenKind.NORMAL):
                found.add(index)
        # In the channel formats <|end|> ends one message of several and another token ends the turn.
        channels = {"<|return|>", "<|call|>"} <= self.ids.keys() or {"<|calls|>", "<|flush|>"} <= self.ids.keys()
        if channels and self.ids.get("<|end|>") not in ids:
            found.discard(self.ids.get("<|end|>", -1))
        return frozenset(found)
