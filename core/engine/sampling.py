"""SamplingParams: what a user may ask of one generation, checked once, when it is made.

Knows nothing of models, tokenizers or devices; token ids are checked against a vocabulary by ``validate_for``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NoReturn

from ..errors import RequestError
from .structured import StructuredOutputs

MAX_STOPS = 16
MAX_STOP_CHARS = 1_000
MAX_STOP_TOKENS = 256
MAX_BIASES = 1_024
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
_SEED_END = 2**64
_INT32_MAX = 2**31 - 1  # token ids and counts are 32-bit integers on a device


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a generation ends. Immutable; a wrong value raises ``RequestError``.

    The steps run in this order: logit bias, repetition penalty, presence and frequency penalty, temperature, top-k,
    top-p, min-p, draw.

    temperature: finite, >= 0; 0 is greedy (the most likely token, the lowest id among equals).
    top_p: 0 < p <= 1; the smallest set of most likely tokens whose probabilities sum to at least p. 1 is off.
    top_k: 0 to 2**31 - 1; the k most likely tokens. 0 is off.
    min_p: 0 to 1; drops tokens less likely than min_p times the most likely one. 0 is off.
    repetition_penalty: 0.01 to 100; logits of tokens in prompt or output are divided by it where positive, multiplied
        where negative. 1 is off.
    presence_penalty, frequency_penalty: -2 to 2; subtracted from the logits of tokens in the output, once or as often
        as they occur there. 0 is off.
    seed: 0 to 2**64 - 1; None draws one for each request. Equal seed, prompt and parameters give equal tokens, whatever
        else runs beside.
    max_tokens: 1 to 2**31 - 1; the most tokens to generate. The model's context may end a generation earlier.
    min_tokens: 0 to max_tokens; until so many are generated, no token or string ends the generation.
    stop: a string or up to 16 strings of 1 to 1,000 characters; the text ends before the first that occurs.
    stop_token_ids: up to 256 token ids that end the generation, beside the model's own end tokens.
    ignore_eos: the model's own end tokens do not end the generation.
    logit_bias: up to 1,024 token ids, each with a number from -100 to 100 added to its logit, or -inf, which bans the
        token. The mapping is copied; treat the copy as read-only.
    logprobs: None, or 0 to 20: report the log-probability of each token and of so many of the most likely. They come
        from the model's own logits, before any of the above.
    prompt_logprobs: None, or 0 to 20: the same for each token of the prompt but the first. The prompt is then computed
        whole, whatever of it is in the cache; a long one once more for the other samples, if there are any.
    n: 1 to 128; so many samples of the prompt, which is computed once. Sample i has the seed
        ``(seed + i * 0x9E3779B97F4A7C15) mod 2**64``, so sample 0 is what n = 1 gives; greedy samples are alike.
    structured_outputs: None, or the form that the text must have: a StructuredOutputs, or a mapping with one of its
        keys (json, regex, choice, grammar). Tokens that would break it are banned after the logit bias, and the model's
        own end tokens until it is complete; so it goes with neither min_tokens nor ignore_eos, which would go on after
        the end. A stop string, a stop token or max_tokens can still cut the text short.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 128
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._set("temperature", _number("temperature", self.temperature, 0.0))
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0, open_low=True))
        self._set("top_k", _integer("top_k", self.top_k, 0, note="; 0 turns it off"))
        self._set("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        self._set("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0))
        self._set("presence_penalty", _number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        self._set("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, 0, _SEED_END - 1, note=", or None"))
        self._set("max_tokens", _integer("max_tokens", self.max_tokens, 1))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0, self.max_tokens, note=" (max_tokens)"))
        self._set("stop", _stops(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            _refuse("ignore_eos", self.ignore_eos, "True or False")
        self._set("logit_bias", _logit_bias(self.logit_bias))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, _integer(name, value, 0, MAX_LOGPROBS, note=", or None"))
        self._set("n", _integer("n", self.n, 1, MAX_SAMPLES))
        if self.structured_outputs is not None:
            self._set("structured_outputs", StructuredOutputs.of(self.structured_outputs))
            for name, given in (("min_tokens", self.min_tokens > 0), ("ignore_eos", self.ignore_eos)):
                if given:
                    raise RequestError(
                        f"structured_outputs cannot be combined with {name}: a text that is complete can only end"
                    )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken and nothing is drawn."""
        return self.temperature == 0.0

    @property
    def stops(self) -> tuple[str, ...]:
        """``stop`` as the tuple that it was normalised to."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def structured(self) -> StructuredOutputs | None:
        """``structured_outputs`` as what it was normalised to."""
        return None if self.structured_outputs is None else StructuredOutputs.of(self.structured_outputs)

    def validate_for(self, vocab_size: int) -> None:
        """Raises ``RequestError`` if a token id in ``logit_bias`` or ``stop_token_ids`` is not below vocab_size."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise RequestError(
                        f"{name} has token id {token_id}, but the model's vocabulary has ids 0 to {vocab_size - 1}"
                    )


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits
        shown = "a far larger number"
    if len(shown) > 80:
        shown = shown[:77] + "..."
    raise RequestError(f"{name} must be {allowed}, got {shown}")


def _number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False, ban: bool = False
) -> float:
    """A finite number between low and high (NumPy scalars included, bool excluded); -inf too where it is a ban."""
    if math.isinf(high):
        allowed = f"a finite number >= {low:g}"
    elif open_low:
        allowed = f"a number > {low:g} and <= {high:g}"
    else:
        allowed = f"a number from {low:g} to {high:g}" + (", or -inf" if ban else "")
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse(name, value, allowed)
    try:
        number = float(value)
    except OverflowError:
        _refuse(name, value, allowed)
    if ban and number == -math.inf:
        return number
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        _refuse(name, value, allowed)
    return number


def _integer(name: str, value: Any, low: int, high: int = _INT32_MAX, *, note: str = "") -> int:
    """An integer between low and high (NumPy integers included, bool and 3.0 excluded)."""
    allowed = f"an integer from {low} to {high}{note}"
    if isinstance(value, bool):
        _refuse(name, value, allowed)
    try:
        number = operator.index(value)
    except TypeError:
        _refuse(name, value, allowed)
    if not low <= number <= high:
        _refuse(name, value, allowed)
    return number


def _collect(name: str, values: Any, limit: int, what: str) -> list[Any]:
    """A list of at most ``limit`` items; reads one item more than that and no further, however long the input."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        _refuse(name, values, f"a sequence of at most {limit} {what}")
    items: list[Any] = []
    for item in values:
        if len(items) == limit:
            raise RequestError(f"{name} may hold at most {limit} {what}, got more")
        items.append(item)
    return items


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else _collect("stop", value, MAX_STOPS, "strings")
    for index, stop in enumerate(stops):
        if not isinstance(stop, str):
            _refuse(f"stop[{index}]", stop, "a string")
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise RequestError(f"stop[{index}] must have 1 to {MAX_STOP_CHARS} characters, got {len(stop)}")
        try:
            stop.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError(f"stop[{index}] has a lone surrogate, which no generated text contains") from None
    return tuple(dict.fromkeys(stops))


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    ids = _collect("stop_token_ids", value, MAX_STOP_TOKENS, "token ids")
    return tuple(dict.fromkeys(_integer(f"stop_token_ids[{i}]", token, 0) for i, token in enumerate(ids)))


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        _refuse("logit_bias", value, "a mapping of token id to number")
    if len(value) > MAX_BIASES:
        raise RequestError(f"logit_bias may hold at most {MAX_BIASES} token ids, got {len(value)}")
    return {
        _integer("a token id of logit_bias", token, 0): _number(f"logit_bias[{token!r}]", bias, -100.0, 100.0, ban=True)
        for token, bias in value.items()
    }
