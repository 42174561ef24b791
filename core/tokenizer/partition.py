"""Finding whole tokens in text: control and user-defined tokens are cut out before the rest is merged.

At each place the longest token wins, and places are taken from left to right. Linear in the text, whatever the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping


class Partition:
    """Cuts text at occurrences of the given tokens."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = {text: index for text, index in tokens.items() if text}
        # Only lengths that occur with a given first two characters are tried at a place, longest first.
        lengths: dict[str, set[int]] = {}
        for text in self._tokens:
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        first = "".join(sorted({text[0] for text in self._tokens}))
        self._places = re.compile(f"[{re.escape(first)}]") if first else None

    def __call__(self, text: str) -> Iterator[str | int]:
        """Pieces of the text in order: a token's id where one was found, else a non-empty string."""
        done = 0
        place = self._places.search(text) if self._places else None
        while place is not None and self._places is not None:
            start = place.start()
            length = self._match(text, start)
            if length:
                if start > done:
                    yield text[done:start]
                yield self._tokens[text[start : start + length]]
                done = start + length
            place = self._places.search(text, start + max(length, 1))
        if done < len(text):
            yield text[done:]

    def _match(self, text: str, start: int) -> int:
        """The length of the longest token at ``start``; 0 where there is none."""
        head = text[start : start + 2]
        for length in self._lengths.get(head, ()):
            if text[start : start + length] in self._tokens:
                return length
        return 1 if head[:1] in self._tokens else 0
