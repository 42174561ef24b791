"""Drafting: guesses at the next tokens of a request, which one step of the model then checks all at once.

Knows nothing of the model: a guess costs a little of a step where it is wrong, and never changes a result.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol

from ..errors import ConfigError

MAX_DRAFT = 32
_LONGEST_PAUSE = 16
_CHARACTERS = sys.maxunicode + 1


@dataclass(slots=True)
class Lookup:
    """What a drafter keeps of one request: its tokens, and how its guesses went lately.

    ``text`` has a character for each token, at most four bytes, because Python searches no other sequence as fast. Ids
    beyond the last character share one with others, which can only make a guess a wrong one.
    ``length`` is the most tokens worth guessing now; None: not tried yet. After guesses of which none was right it
    rests for ``pause`` tokens, twice as many each time.
    """

    text: str = ""
    length: int | None = None
    pause: int = 0
    rests: int = 0


class Drafted(Protocol):
    """What a drafter sees of a request."""

    lookup: Lookup | None

    @property
    def num_tokens(self) -> int: ...

    def tokens(self, start: int, stop: int) -> list[int]: ...


class NgramDrafter:
    """Prompt lookup: where the last tokens stand earlier in prompt or output, what followed there is the guess.

    The longest of ``ngram_max`` to ``ngram_min`` last tokens that occurs counts, at its latest place. A guess may run
    into itself, so that a repetition of any period is guessed to go on. Good for texts that quote their prompt: edits,
    summaries, code, answers about a document.
    """

    def __init__(self, max_tokens: int = 7, ngram_max: int = 4, ngram_min: int = 2) -> None:
        """``max_tokens``: the most tokens of a guess. Raises ConfigError for a number that makes no sense."""
        for name, value, low, high in (
            ("max_tokens", max_tokens, 1, MAX_DRAFT),
            ("ngram_max", ngram_max, 1, MAX_DRAFT),
            ("ngram_min", ngram_min, 1, ngram_max),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{name} of speculation must be a whole number from {low} to {high}, got {value!r}")
        self.max_tokens, self.ngram_max, self.ngram_min = max_tokens, ngram_max, ngram_min

    def draft(self, request: Drafted, most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens that may follow the request's last one; none where nothing suggests any."""
        lookup = request.lookup
        if lookup is None:
            lookup = request.lookup = Lookup()
        if lookup.rests > 0:
            lookup.rests -= 1
            return ()
        lookup.text += "".join([chr(t % _CHARACTERS) for t in request.tokens(len(lookup.text), request.num_tokens)])
        most = min(most, self.max_tokens if lookup.length is None else lookup.length)
        at = self._find(lookup.text) if most > 0 else -1
        if at < 0:
            return ()
        guess = request.tokens(at, min(at + most, request.num_tokens))
        period = len(guess)
        while len(guess) < most:  # it reached the end: what it guessed so far is what comes there
            guess.append(guess[len(guess) - period])
        return tuple(guess)

    def learn(self, request: Drafted, drafted: int, accepted: int) -> None:
        """Takes note that ``accepted`` of ``drafted`` tokens were right."""
        lookup = request.lookup
        if lookup is None:
            return
        if accepted == 0:
            lookup.pause = min(max(1, 2 * lookup.pause), _LONGEST_PAUSE)
            lookup.rests = lookup.pause
            lookup.length = max(1, drafted // 2)
        else:
            lookup.pause = 0
            lookup.length = min(self.max_tokens, 2 * drafted if accepted == drafted else max(1, accepted + 1))

    def _find(self, text: str) -> int:
        """The number of the token after the latest earlier place of the longest ending that occurs, or -1."""
        end = len(text)
        for size in range(min(self.ngram_max, end - 1), self.ngram_min - 1, -1):
            at = text.rfind(text[end - size :], 0, end - 1)
            if at >= 0:
                return at + size
        return -1
