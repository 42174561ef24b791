"""SentencePiece-style BPE (``tokenizer.ggml.model`` llama): characters are merged by score, unknown ones become bytes.

The algorithm is that of SentencePiece's BPE model: of all adjacent pairs that form a token, the one with the highest
score is merged, the leftmost first among equals. Knows nothing of BOS, templates or decoding policy.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from itertools import pairwise

from ..errors import TokenizerError
from .partition import Partition
from .vocabulary import TokenKind, Vocabulary

SPACE = "\u2581"  # stands for a space
_CACHE_WORDS = 1 << 16
_CACHE_LENGTH = 64
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_bytes(token: str, kind: int) -> bytes:
    """The bytes of a token's text: a byte token's byte, else UTF-8 with the space symbol turned into a space."""
    if kind == TokenKind.BYTE:
        match = _BYTE.fullmatch(token)
        if match is None:
            raise TokenizerError(f"token {token!r} is marked as a byte but is not of the form <0x41>")
        return bytes([int(match[1], 16)])
    if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN):
        return token.encode("utf-8", "replace")
    return token.replace(SPACE, " ").encode("utf-8", "replace")


class SentencePieceBPE:
    """Text to ids for one vocabulary."""

    def __init__(
        self, vocabulary: Vocabulary, unk_id: int | None, add_space_prefix: bool, squeeze_spaces: bool
    ) -> None:
        self._add_space_prefix = add_space_prefix
        self._squeeze_spaces = squeeze_spaces
        self._unk_id = unk_id
        self._pieces: dict[str, tuple[float, int]] = {}
        self._unused: set[str] = set()
        self._bytes: dict[int, int] = {}
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
            if kind in (TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED):
                self._pieces[token] = (-vocabulary.scores[index], index)
                if kind == TokenKind.UNUSED:
                    self._unused.add(token)
            elif kind == TokenKind.BYTE:
                self._bytes[piece_bytes(token, kind)[0]] = index
        if self._bytes and len(self._bytes) != 256:
            raise TokenizerError(f"the vocabulary has tokens for {len(self._bytes)} byte values, expected 256 or none")
        # A merge can only join two characters that stand side by side inside some token, so text is cut everywhere
        # else: exact, and it keeps words short whatever the language.
        self._pairs: set[str] = set()
        for token in self._pieces:
            self._pairs.update(map("".join, pairwise(token)))
        text_tokens = vocabulary.of_kind(TokenKind.USER_DEFINED)
        self._control = vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN)
        self._plain = Partition(text_tokens)
        self._special = Partition(text_tokens | self._control)
        self._hidden_ids = frozenset(self._control.values())
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of the text; where ``special``, names of control tokens in it become those tokens.

        The space prefix goes in front of the text and of text after a control token, as in the files that Llama 2
        came in; a user-defined token is a part of the text and takes it where it comes first.
        """
        out: list[int] = []
        fresh = self._add_space_prefix
        if self._squeeze_spaces:
            text = re.sub(" +", " ", text.lstrip(" ")).rstrip(" " + SPACE)
        for piece in (self._special if special else self._plain)(text):
            if isinstance(piece, int):
                if piece in self._hidden_ids:
                    fresh = self._add_space_prefix
                elif fresh:
                    fresh = False
                    self._encode_text(SPACE, out)
                out.append(piece)
                continue
            self._encode_text((SPACE if fresh else "") + piece.replace(" ", SPACE), out)
            fresh = False
        return out

    def _encode_text(self, text: str, out: list[int]) -> None:
        cache = self._cache
        for word in self._words(text):
            ids = cache.get(word)
            if ids is None:
                ids = tuple(self._merge(word))
                if len(word) <= _CACHE_LENGTH:
                    if len(cache) >= _CACHE_WORDS:
                        cache.clear()
                    cache[word] = ids
            if self._unk_id is not None and out and ids[:1] == (self._unk_id,) == tuple(out[-1:]):
                ids = ids[1:]  # a run of unknown characters is one unknown token, across words too
            out += ids

    def _words(self, text: str) -> Iterator[str]:
        pairs, start = self._pairs, 0
        for end in range(1, len(text)):
            if text[end - 1 : end + 1] not in pairs:
                yield text[start:end]
                start = end
        if text:
            yield text[start:]

    def _merge(self, word: str) -> list[int]:
        pieces = self._pieces
        if len(word) == 1 or (word in pieces and len(word) == 2 and word not in self._unused):
            return self._ids(word, {})
        symbols = list(word)
        count = len(symbols)
        after = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        parts: dict[str, tuple[str, str]] = {}
        heap: list[tuple[float, int, str]] = []

        def offer(left: int, right: int) -> None:
            joined = symbols[left] + symbols[right]
            piece = pieces.get(joined)
            if piece is not None:
                heapq.heappush(heap, (piece[0], left, joined))
                if joined in self._unused:
                    parts[joined] = (symbols[left], symbols[right])

        for left in range(count - 1):
            offer(left, left + 1)
        while heap:
            _, left, joined = heapq.heappop(heap)
            right = after[left]
            # An offer is stale once either side has changed; an emptied symbol never matches.
            if not symbols[left] or right >= count or symbols[left] + symbols[right] != joined:
                continue
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        ids: list[int] = []
        for symbol in symbols:
            if symbol:
                found = self._ids(symbol, parts)
                if not (ids and found == [self._unk_id] == ids[-1:]):
                    ids += found
        return ids

    def _ids(self, symbol: str, parts: dict[str, tuple[str, str]]) -> list[int]:
        """The id of a symbol; of its parts where it is marked unused; its bytes, or unknown, where it is no token."""
        if symbol in self._unused and symbol in parts:
            left, right = parts[symbol]
            return self._ids(left, parts) + self._ids(right, parts)
        piece = self._pieces.get(symbol)
        if piece is not None:
            return [piece[1]]
        if self._bytes:
            return [self._bytes[byte] for byte in symbol.encode("utf-8")]
        return [] if self._unk_id is None else [self._unk_id]
