"""Text from tokens that arrive one by one: bytes are held back until they are whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Callable


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each byte that is part of no character, as SentencePiece decodes byte tokens."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


EACH_BYTE = "polyhead.each_byte"
codecs.register_error(EACH_BYTE, _each_byte)


class StreamDecoder:
    """Decodes one sequence incrementally. Joined, what ``push`` and ``flush`` return is ``decode`` of all its ids."""

    def __init__(self, piece: Callable[[int], bytes], errors: str, strip_space: bool) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._errors = errors
        self._strip_space = strip_space
        self._strip_next = strip_space

    def push(self, token_id: int) -> str:
        """The text that is certain now; '' while a character is incomplete. RequestError for an id out of range."""
        return self._out(self._utf8.decode(self._piece(token_id)))

    def flush(self) -> str:
        """What was held back (U+FFFD for an incomplete character). The decoder then starts a new sequence."""
        text = self._out(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        self._strip_next = self._strip_space
        return text

    def _out(self, text: str) -> str:
        if text and self._strip_next:
            self._strip_next = False
            text = text.removeprefix(" ")
        return text
