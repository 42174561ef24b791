"""Byte-level BPE (``tokenizer.ggml.model`` gpt2): UTF-8 bytes are written in a printable alphabet and merged by rank.

The merging itself is the ``tokenizers`` library's; this module feeds it. Knows nothing of BOS, templates or decoding
policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import TokenizerError
from .partition import Partition
from .pretokenizers import PreTokenizer, build
from .vocabulary import TokenKind, Vocabulary, strings


def byte_alphabet() -> dict[int, int]:
    """GPT-2's alphabet as code point of the printable character -> byte: printable Latin-1 stands for itself, the
    other 68 bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


def unescape_bytes(token: str) -> bytes:
    """The bytes that a token in the printable alphabet stands for; a token with other characters is plain text."""
    if all(ord(char) in _ALPHABET for char in token):
        return bytes(_ALPHABET[ord(char)] for char in token)
    return token.encode("utf-8", "replace")


class ByteLevelBPE:
    """Text to ids for one vocabulary. Bytes for which the vocabulary has no token are dropped."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any], rules: PreTokenizer) -> None:
        import tokenizers

        if metadata.get("tokenizer.ggml.merges") is None:
            raise TokenizerError("tokenizer.ggml.merges is missing: a 'gpt2' tokenizer cannot encode without it")
        lines = strings(metadata["tokenizer.ggml.merges"], "tokenizer.ggml.merges")
        # A token may start with the separator itself only in text that is not byte-level, hence the plain split.
        merges: list[tuple[str, str]] = []
        for line in lines:
            left, space, right = line.partition(" ")
            if not (left and space and right):
                raise TokenizerError(f"tokenizer.ggml.merges[{len(merges)}] is {line!r}, expected two tokens")
            merges.append((left, right))
        ids = vocabulary.ids
        if rules.whole_words:
            # Words are looked up whole here, and a control token's name must never be met as a word.
            hidden = vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.UNUSED)
            ids = {token: index for token, index in ids.items() if token not in hidden}
        try:
            model = tokenizers.models.BPE(vocab=ids, merges=merges, ignore_merges=rules.whole_words)
        except Exception as error:
            raise self._explain(ids, merges, error) from error
        self._engine = tokenizers.Tokenizer(model)
        normalizer, pre_tokenizer = build(rules)
        if normalizer is not None:
            self._engine.normalizer = normalizer
        self._engine.pre_tokenizer = pre_tokenizer
        text_tokens = vocabulary.of_kind(TokenKind.USER_DEFINED)
        hidden_tokens = vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN)
        self._plain = Partition(text_tokens)
        self._special = Partition(text_tokens | hidden_tokens)

    @staticmethod
    def _explain(ids: Mapping[str, int], merges: list[tuple[str, str]], error: Exception) -> TokenizerError:
        for index, (left, right) in enumerate(merges):
            for token in (left, right, left + right):
                if token not in ids:
                    return TokenizerError(
                        f"tokenizer.ggml.merges[{index}] ({left!r} + {right!r}) needs the token {token!r}, which the "
                        "vocabulary lacks"
                    )
        return TokenizerError(f"the vocabulary cannot be used for byte-level BPE: {error}")

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of the text; where ``special``, names of control tokens in it become those tokens."""
        pieces = list((self._special if special else self._plain)(text))
        texts = [piece for piece in pieces if isinstance(piece, str)]
        # The batch call skips the bookkeeping of offsets and is twice as fast, for one text too.
        encoded = iter(self._engine.encode_batch_fast(texts, add_special_tokens=False))
        out: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                out.append(piece)
            else:
                out += next(encoded).ids
        return out
