"""Guides: the guides of one model, compiled by llguidance within bounds and kept for requests that ask alike."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..engine import Guide, StructuredOutputs
from ..errors import CapacityError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from ..tokenizer import Tokenizer
    from .tokens import Tokens

INSTALL = "structured outputs need llguidance: pip install 'polyhead[structured]'"
KEPT = 16  # grammars; a hostile one may hold some 40 MB
STACK = 512 << 20  # bytes of address space, of which a hostile grammar may touch half
# What a grammar may cost. In llguidance's units; on a slow core, seconds to compile and tenths of a second a mask.
LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 25_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
T = TypeVar("T")
_COMPILING = threading.Lock()  # the size of new threads' stacks is the process's


class Guides:
    """Makes guides for a model with ``vocab`` rows of logits, of which ``tokenizer`` knows as many or fewer.

    ``stop_ids`` are the tokens that end a generation. Thread-safe; a guide itself is not.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, stop_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab, self._stop_ids = tokenizer, vocab, frozenset(stop_ids)
        self._lock = threading.Lock()
        self._missing = threading.Lock()
        self._loaded: Tokens | None = None
        self._kept: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()

    def guide(self, spec: StructuredOutputs) -> Guide:
        """A guide at the beginning of a text.

        Raises RequestError where llguidance is not installed or refuses the grammar, and for one that allows no text
        or asks for something that would be ignored; CapacityError where there is no room to compile it.
        """
        tokens = self._tokens()  # raises where llguidance is missing
        from .matcher import MatcherGuide

        matcher = self._known(spec)
        if matcher is None:
            with self._missing:  # of those who come together with one form, the first compiles it for all
                matcher = self._known(spec)
                if matcher is None:
                    matcher = self._compile(spec, tokens)
        return MatcherGuide(spec, tokens, matcher.deep_copy(), partial(self._compile, spec, tokens))

    def _known(self, spec: StructuredOutputs) -> LLMatcher | None:
        with self._lock:
            matcher = self._kept.get(spec)
            if matcher is not None:
                self._kept.move_to_end(spec)
            return matcher

    def _tokens(self) -> Tokens:
        with self._lock:
            if self._loaded is None:
                try:
                    from .tokens import Tokens
                except ImportError as error:
                    raise RequestError(INSTALL) from error
                self._loaded = Tokens.of(self._tokenizer, self._vocab, self._stop_ids)
            return self._loaded

    def _compile(self, spec: StructuredOutputs, tokens: Tokens) -> LLMatcher:
        """A new matcher, of which a copy is kept in place of an earlier one."""
        from llguidance import LLMatcher, LLParserLimits

        from .grammar import complaint, grammar_of

        if isinstance(spec.content, tuple):
            index = tokens.unspellable(spec.content)
            if index is not None:
                raise RequestError(
                    f"structured_outputs.choice[{index}] cannot be written: the model's vocabulary lacks bytes of it"
                )
        text = grammar_of(spec)
        limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]

        def compile_() -> tuple[LLMatcher, list[str]]:
            matcher = LLMatcher(tokens.engine, text, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # an empty language, and one too large to begin with, are told at once
            return matcher, matcher.get_grammar_warnings()

        matcher, warnings = _with_stack(compile_)
        if matcher.is_error():
            raise complaint(spec, matcher.get_error())
        if warnings:  # all of them tell of something that would be ignored
            raise complaint(spec, warnings[0])
        with self._lock:
            self._kept[spec] = matcher.deep_copy()
            self._kept.move_to_end(spec)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return matcher


def _with_stack(function: Callable[[], T]) -> T:
    """Calls a function where recursion that follows the user's nesting does not overflow. One at a time."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((function(), None))
        except BaseException as error:
            done.append((None, error))

    with _COMPILING:
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=run, name="polyhead grammar", daemon=True)
            thread.start()
        except RuntimeError as error:
            raise CapacityError(
                f"no thread with a stack of {STACK >> 20} MiB can be had to compile a grammar"
            ) from error
        finally:
            threading.stack_size(before)
        thread.join()
    value, raised = done[0]
    if raised is not None:
        raise raised
    result: T = value
    return result
