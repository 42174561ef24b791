"""StopMatcher: ends streamed text before the first stop string, wherever the pieces of text are cut.

Knows nothing of tokens; characters come in, characters that are safe to show go out.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Filters one stream of text.

    The first stop string to be *completed* ends the text, which is cut before it; of several completed by the same
    character, the longest one counts. So the result depends on the characters alone, never on how they were cut into
    pieces, and a generation ends with the character that completes a stop.

    Each stop is matched by its Knuth-Morris-Pratt automaton: its state is the length of the longest beginning of the
    stop that the text ends with, which is exactly what has to be held back. Time is linear in the text.
    """

    __slots__ = ("_failures", "_held", "_hit", "_states", "_stops")

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """``stops``: non-empty strings, as ``SamplingParams.stop`` checks them."""
        self._stops = tuple(stops)
        if "" in self._stops:
            raise ValueError("a stop string must not be empty")
        self._failures = tuple(_failure_table(stop) for stop in self._stops)
        self._states = [0] * len(self._stops)
        self._held = ""
        self._hit: str | None = None

    @property
    def hit(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._hit

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece of text. Returns what may be shown now, and whether a stop string has ended the text.

        After a hit nothing is emitted any more.
        """
        if self._hit is not None:
            return "", True
        if not self._stops:
            return text, False
        for index, char in enumerate(text):
            stop = self._advance(char)
            if stop is not None:
                self._hit = stop
                seen = self._held + text[: index + 1]
                self._held = ""
                return seen[: len(seen) - len(stop)], True
        seen = self._held + text
        keep = len(seen) - max(self._states)
        self._held = seen[keep:]
        return seen[:keep], False

    def flush(self) -> str:
        """Ends the stream: returns the text held back, which turned out to be no stop string."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        """Moves every automaton by one character; returns the longest stop that it completes."""
        best: str | None = None
        states = self._states
        for i, stop in enumerate(self._stops):
            state = states[i]
            failure = self._failures[i]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            states[i] = state
            if state == len(stop) and (best is None or state > len(best)):
                best = stop
        return best


def _failure_table(stop: str) -> list[int]:
    """For each beginning of ``stop``, the length of its longest proper suffix that is a beginning of it too."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table
