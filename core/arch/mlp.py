"""MLP: the position-wise part of a block, plain or gated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from .fields import check_fields
from .linear import Linear
from .tensors import TensorSpec, check, check_positive, within

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "silu", "relu", "relu_squared"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


@dataclass(frozen=True, slots=True)
class FusedGateUp:
    """One matrix whose first ``size`` rows are the gate and whose last ``size`` rows are up."""

    proj: Linear

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class MLP:
    """down(act(up(x))), or with a gate down(act(gate(x)) · up(x)). ``size`` is the inner width.

    ``gelu`` is the erf form, ``gelu_tanh`` its tanh approximation (Hendrycks and Gimpel 2016), ``gelu_quick``
    x·σ(1.702x).
    """

    size: int
    up: Linear | FusedGateUp
    down: Linear
    activation: Activation
    gate: Linear | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive("MLP", size=self.size)
        check(
            self.activation in ACTIVATIONS,
            f"MLP: activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}",
        )
        check(
            self.gate is None or isinstance(self.up, Linear),
            "MLP: gate is given beside a FusedGateUp, which already holds one",
        )

    @property
    def gated(self) -> bool:
        """Whether the activation is multiplied with a second projection."""
        return self.gate is not None or isinstance(self.up, FusedGateUp)

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        if isinstance(self.up, FusedGateUp):
            yield from within("up.proj", self.up.proj.tensors(2 * self.size, hidden))
        else:
            if self.gate is not None:
                yield from within("gate", self.gate.tensors(self.size, hidden))
            yield from within("up", self.up.tensors(self.size, hidden))
        yield from within("down", self.down.tensors(hidden, self.size))
