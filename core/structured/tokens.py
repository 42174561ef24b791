"""Which tokens of a vocabulary are text, and the trie of them that llguidance walks.

A token is known by the bytes that decoding it gives in the middle of a text, so that what a grammar allows is what the
user reads: a SentencePiece token's leading space is a space of the text, a byte token is its byte, and a token may end
inside a character. Control tokens, unused ones, BOS, the model's end tokens and rows that only pad the vocabulary have
no text and can never be reached by a grammar.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import llguidance
import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..tokenizer import Tokenizer

Words = NDArray[np.int32]

_LONGEST = 1_000  # bytes; llguidance stops the process at a token of more than 1,024
_MARKER = b"\xff"  # llguidance marks special tokens by it; it is part of no character


@dataclass(frozen=True, slots=True)
class Tokens:
    """``pieces`` are the tokens' bytes, empty where a token is no text; ``text`` and ``stops`` are masks, int32
    [ceil(vocab / 32)], of the tokens that are and of those that end a generation.
    """

    engine: llguidance.LLTokenizer
    pieces: list[bytes]
    text: Words
    stops: Words

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab: int, stop_ids: Iterable[int]) -> Tokens:
        """Those of a model with ``vocab`` rows of logits, of which the tokenizer may know fewer."""
        stop_ids = frozenset(stop_ids)
        hidden = stop_ids | {tokenizer.bos_id, tokenizer.unk_id, tokenizer.pad_id}
        pieces = [b""] * vocab
        for token in range(min(vocab, tokenizer.vocab_size)):
            if token not in hidden and tokenizer.is_text(token):
                piece = tokenizer.token_bytes(token)
                if len(piece) <= _LONGEST and not piece.startswith(_MARKER):
                    pieces[token] = piece
        try:
            # One token more than the model has stands for the end: a model may have several end tokens, or none.
            engine = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary([*pieces, b""])), eos_token=[vocab])
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise RequestError(f"structured outputs cannot be had with this vocabulary: {error}") from None
            raise
        return cls(
            engine,
            pieces,
            mask((token for token, piece in enumerate(pieces) if piece), vocab),
            mask((token for token in stop_ids if token < vocab), vocab),
        )

    def __contains__(self, token: int) -> bool:
        """Whether the token is text."""
        return 0 <= token < len(self.pieces) and bool(self.pieces[token])

    def is_stop(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return 0 <= token < len(self.pieces) and bool(self.stops[token // 32] >> token % 32 & 1)

    def unspellable(self, texts: Sequence[str]) -> int | None:
        """The first of the texts that no sequence of tokens makes; None where each can be made."""
        pieces = set(self.pieces) - {b""}
        known = set(b"".join(pieces))
        alone = {piece[0] for piece in pieces if len(piece) == 1}
        lengths = sorted({len(piece) for piece in pieces})
        for index, text in enumerate(texts):
            data = text.encode()
            if not set(data) <= known or (not set(data) <= alone and not _spelt(data, pieces, lengths)):
                return index
        return None


def _spelt(data: bytes, pieces: set[bytes], lengths: Sequence[int]) -> bool:
    reached = bytearray(len(data) + 1)
    reached[0] = True
    for at in range(len(data)):
        if reached[at]:
            for length in lengths:
                if data[at : at + length] in pieces and at + length <= len(data):
                    reached[at + length] = True
    return bool(reached[-1])


class _Vocabulary:
    """What llguidance asks of a tokenizer. It never encodes, because no grammar here forces tokens."""

    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, pieces: list[bytes]) -> None:
        self.tokens = pieces
        self.eos_token_id = len(pieces) - 1

    def __call__(self, text: bytes) -> list[int]:
        return []


def mask(token_ids: Iterable[int], vocab: int) -> Words:
    """int32 [ceil(vocab / 32)] with the bits of these tokens set, read-only."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[np.fromiter(token_ids, np.intp)] = 1
    words = np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
    words.flags.writeable = False
    return words
