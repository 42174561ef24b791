"""MatcherGuide: a Guide that llguidance's matcher works out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llguidance import LLMatcher

from ..engine import StructuredOutputs
from ..errors import RequestError
from .grammar import reason
from .tokens import Tokens, Words


class MatcherGuide:
    """Where one generation is in its grammar; see ``engine.Guide``.

    Copies of a compiled grammar share the states that its regular expressions were found to have, which are bounded in
    number. What earlier requests have used up must not end this one, so a guide that cannot go on begins once more with
    a grammar of its own, from ``fresh``, which raises RequestError.
    """

    __slots__ = ("_fresh", "_matcher", "_over", "_restarted", "_spec", "_taken", "_tokens", "_words")

    def __init__(
        self, spec: StructuredOutputs, tokens: Tokens, matcher: LLMatcher, fresh: Callable[[], LLMatcher]
    ) -> None:
        self._spec, self._tokens, self._matcher, self._fresh = spec, tokens, matcher, fresh
        self._taken: list[int] = []
        self._words: Words | None = None
        self._over = self._restarted = False

    @property
    def ended(self) -> bool:
        """Nothing but an end may follow. Raises RequestError as ``allowed`` does."""
        if self._over or (self._matcher.is_stopped() and not self._matcher.is_error()):
            return True
        return self._matcher.is_accepting() and not (self.allowed() & self._tokens.text).any()

    def allowed(self) -> Words:
        """Which tokens may come next, int32 [ceil(vocab / 32)]; an end token only where the text is complete.

        Raises RequestError where the grammar is too complex, or allows nothing that the vocabulary can write.
        """
        if self._words is None:
            self._words = self._compute()
            self._words.flags.writeable = False
        return self._words

    def accept(self, token: int) -> None:
        """Goes on past a token. Raises RequestError for one that is not allowed, or if the grammar is too complex."""
        if self._over:
            raise self._error("its text has ended")
        if token not in self._tokens:
            if not (self._tokens.is_stop(token) and self._matcher.is_accepting()):
                raise self._error(f"token {token} is not allowed here")
            self._over = True
            self._words = self._tokens.stops
            return
        self._words = None
        self._taken.append(token)
        if not self._matcher.consume_token(token):
            self._restart()

    def fork(self) -> MatcherGuide:
        """An independent copy in the present state."""
        copy = MatcherGuide(self._spec, self._tokens, self._matcher.deep_copy(), self._fresh)
        copy._taken = self._taken.copy()
        copy._words, copy._over, copy._restarted = self._words, self._over, self._restarted
        return copy

    def _compute(self) -> Words:
        tokens = self._tokens
        found = np.frombuffer(self._matcher.compute_bitmask(), "<i4")
        if self._matcher.is_error():
            if "NoExtensionBias" in self._matcher.get_error():
                raise self._error("it allows nothing here that can be written with the model's vocabulary")
            self._restart()
            return self._compute()
        words: Words = found[: len(tokens.text)].astype(np.int32) & tokens.text
        if self._matcher.is_accepting():
            words |= tokens.stops
        elif not words.any():
            raise self._error("it allows nothing here that can be written with the model's vocabulary")
        return words

    def _restart(self) -> None:
        """Takes the same way with a matcher of its own; raises RequestError where that has been tried, or ends so."""
        if self._restarted:
            raise self._error(reason(self._matcher.get_error()))
        self._restarted = True
        self._matcher = self._fresh()
        if self._taken and not self._matcher.consume_tokens(self._taken):
            raise self._error(reason(self._matcher.get_error()))

    def _error(self, what: str) -> RequestError:
        return RequestError(
            f"structured_outputs.{self._spec.kind} cannot be followed after {len(self._taken):,} tokens: {what}"
        )
