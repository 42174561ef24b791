"""Experts: the layer as data. Knows nothing of how it is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyhead.arch import Module, TensorSpec
from polyhead.errors import ConfigError

MOST_EXPERTS = 1024


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every row goes to: sigmoid(x · gate_input) · down(silu(gate(x)) · up(x)).

    ``size`` is its inner width. ``flat`` says that the file has ``gate_input`` as [hidden] and not as [1, hidden].
    """

    size: int
    gate_input: str
    gate: str
    up: str
    down: str
    flat: bool = True


@dataclass(frozen=True)
class Experts(Module):
    """Each row goes through the ``used`` experts with the highest router scores; their results are weighted and added.

    y = scale · Σ over the chosen e of p_e · down_e(silu(gate_e(x)) · up_e(x)), then the shared expert's. p is the
    softmax of the router's scores over all ``count`` experts, or where ``normalise`` over the chosen ones.
    ``router`` names [count, hidden], ``gate`` and ``up`` [count, size, hidden], ``down`` [count, hidden, size].
    """

    count: int
    used: int
    size: int
    router: str
    gate: str
    up: str
    down: str
    normalise: bool = True
    scale: float = 1.0
    shared: SharedExpert | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_EXPERTS:
            raise ConfigError(f"Experts: count is {self.count}, expected 1 to {MOST_EXPERTS}")
        if not 1 <= self.used <= self.count:
            raise ConfigError(f"Experts: used is {self.used}, expected 1 to {self.count}")
        if self.size < 1 or not math.isfinite(self.scale):
            raise ConfigError(f"Experts: size is {self.size} and scale {self.scale}, expected numbers above 0")

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        yield TensorSpec(self.router, (self.count, hidden), "router")
        yield TensorSpec(self.gate, (self.count, self.size, hidden), "gate")
        yield TensorSpec(self.up, (self.count, self.size, hidden), "up")
        yield TensorSpec(self.down, (self.count, hidden, self.size), "down")
        if (shared := self.shared) is not None:
            yield TensorSpec(shared.gate_input, (hidden,) if shared.flat else (1, hidden), "shared.gate_input")
            yield TensorSpec(shared.gate, (shared.size, hidden), "shared.gate")
            yield TensorSpec(shared.up, (shared.size, hidden), "shared.up")
            yield TensorSpec(shared.down, (hidden, shared.size), "shared.down")

    def scratch(self, hidden: int) -> Mapping[str, int]:
        # A pair is a row and one of its experts. Tiles of pairs are three integers, at most one for each pair; `inner`
        # and what the shared expert needs are of the activations' type, two bytes a value.
        sizes = {
            "scores": self.count,
            "chosen": self.used,
            "shares": self.used + 1,
            "order": self.used,
            "tiles": 3 * self.used,
            "inner": -(-self.used * self.size // 2),
            "results": self.used * hidden,
        }
        if self.shared is not None:
            sizes |= {"shared_both": self.shared.size, "shared_inner": -(-self.shared.size // 2)}
        return sizes
