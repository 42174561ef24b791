"""Requests for a benchmark: random prompts, lengths and arrivals, the same for the same seed on every machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from .cases import Case

MOST_REQUESTS = 1_000_000
MOST_TOKENS = 1 << 20
MOST_PROMPTS = 1 << 25  # tokens of all prompts: they are held in memory, some 40 bytes each
MOST_SECONDS = 24 * 3600  # until the last request arrives


@dataclass(frozen=True, slots=True)
class Span:
    """Lengths from ``low`` to ``high``, all as likely."""

    low: int
    high: int

    @classmethod
    def of(cls, text: str, name: str) -> Span:
        """``100:1024``, or one number for a fixed length. Raises RequestError."""
        low, _, high = text.partition(":")
        try:
            span = cls(int(low), int(high or low))
        except ValueError:
            raise RequestError(f"{name} is {text!r}; expected a length or two such as 100:1024") from None
        if not 1 <= span.low <= span.high <= MOST_TOKENS:
            raise RequestError(f"{name} is {text!r}; lengths go from 1 to {MOST_TOKENS:,}, the smaller first")
        return span


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to come: its prompt, how many tokens it generates, and when it arrives (seconds from the start)."""

    prompt: tuple[int, ...]
    output: int
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """``count`` requests, served once for each of ``rates``: on average so many arrive in a second, independently of
    one another (a Poisson process). Without rates all are there at once.

    ``shared``: the first so many tokens of every prompt are the same. ``warm_up``: they are served once uncounted.
    """

    count: int
    inputs: Span
    outputs: Span
    seed: int = 1
    shared: int = 0
    rates: Sequence[float] = ()
    warm_up: bool = True

    def check(self) -> None:
        """Raises RequestError for impossible numbers."""
        if not 1 <= self.count <= MOST_REQUESTS:
            raise RequestError(f"requests must be from 1 to {MOST_REQUESTS:,}, got {self.count:,}")
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise RequestError(f"a rate must be a number of requests per second above 0, got {rate:g}")
            if self.count / rate > MOST_SECONDS:
                raise RequestError(
                    f"{self.count:,} requests at {rate:g} a second arrive for {self.count / rate / 3600:,.0f} hours; "
                    f"at most {MOST_SECONDS // 3600} are measured"
                )
        if self.count * self.inputs.high > MOST_PROMPTS:
            raise RequestError(
                f"{self.count:,} requests of up to {self.inputs.high:,} prompt tokens are up to "
                f"{self.count * self.inputs.high:,}; at most {MOST_PROMPTS:,} are held in memory"
            )
        if not 0 <= self.shared <= self.inputs.low:
            raise RequestError(
                f"shared is {self.shared:,}: it must be from 0 to the shortest input, {self.inputs.low:,}"
            )

    def needs(self, max_batch: int) -> Case:
        """What a model must be loaded for: the longest request, and as many at once."""
        return Case("tg", self.outputs.high, self.inputs.high, max_batch)

    def planned(self, vocab: int, rate: float | None = None) -> list[Planned]:
        """The requests in the order of their arrival. Lengths and prompts depend on the seed alone, not on the rate."""
        rng = np.random.default_rng(self.seed)
        lengths = rng.integers(self.inputs.low, self.inputs.high, self.count, endpoint=True).tolist()
        outputs = rng.integers(self.outputs.low, self.outputs.high, self.count, endpoint=True).tolist()
        gaps = rng.exponential(1.0, self.count).tolist()
        begin = rng.integers(0, vocab, self.shared).tolist()
        prompts = [(*begin, *rng.integers(0, vocab, length - self.shared).tolist()) for length in lengths]
        arrivals = [0.0] * self.count if rate is None else [total / rate for total in itertools.accumulate(gaps)]
        return [Planned(*each) for each in zip(prompts, outputs, arrivals, strict=True)]
