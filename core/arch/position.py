"""How a model knows the order of its tokens: learned positions, or rotary embedding with its scalings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .fields import check_fields
from .tensors import TensorSpec, check, check_positive

Pairing = Literal["interleaved", "half"]


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """A row per position, added to the token embedding. ``weight`` names a tensor [context, hidden]."""

    weight: str

    def __post_init__(self) -> None:
        check_fields(self)

    def tensors(self, context: int, hidden: int) -> Iterator[TensorSpec]:
        yield TensorSpec(self.weight, (context, hidden))


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation: every frequency divided by ``factor`` (Chen et al. 2023)."""

    factor: float

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            math.isfinite(self.factor) and self.factor > 0,
            f"LinearScaling: factor is {self.factor!r}, expected a number above 0",
        )


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): low frequencies interpolated by ``factor``, high ones kept, a ramp between.

    ``magnitude`` multiplies cos and sin; None means the paper's 1 + 0.1 ln(factor).
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            math.isfinite(self.factor) and self.factor >= 1,
            f"YarnScaling: factor is {self.factor!r}, expected a number of at least 1",
        )
        check_positive("YarnScaling", original_context=self.original_context)
        check(
            0 < self.beta_slow < self.beta_fast < math.inf,
            f"YarnScaling: beta_slow is {self.beta_slow!r} and beta_fast {self.beta_fast!r}, "
            "expected 0 < beta_slow < beta_fast",
        )
        check(
            self.magnitude is None or (math.isfinite(self.magnitude) and self.magnitude > 0),
            f"YarnScaling: magnitude is {self.magnitude!r}, expected a number above 0",
        )


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) on the first ``dim`` of each head's components.

    Pair i turns by position · theta^(−2i/dim). ``pairing`` says which components make pair i: ``interleaved`` 2i and
    2i+1, ``half`` i and i + dim/2. It follows from how a file was converted and stands nowhere in it. ``factors`` names
    a tensor [dim/2] that divides the frequencies, such as ``rope_freqs.weight``.
    """

    theta: float
    dim: int
    pairing: Pairing
    scaling: LinearScaling | YarnScaling | None = None
    factors: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            math.isfinite(self.theta) and self.theta > 1,
            f"Rope: theta is {self.theta!r}, expected a number above 1",
        )
        check(
            isinstance(self.dim, int) and self.dim >= 2 and self.dim % 2 == 0,
            f"Rope: dim is {self.dim!r}, expected an even integer of at least 2",
        )
        check(
            self.pairing in ("interleaved", "half"),
            f"Rope: pairing is {self.pairing!r}, expected 'interleaved' or 'half'",
        )

    def tensors(self) -> Iterator[TensorSpec]:
        if self.factors is not None:
            yield TensorSpec(self.factors, (self.dim // 2,), "factors", shared=True)
