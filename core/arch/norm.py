"""RMSNorm and LayerNorm over the last axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .fields import check_fields
from .tensors import TensorSpec, check


def _check_eps(owner: str, eps: float) -> None:
    check(0.0 < eps < 1.0, f"{owner}: eps is {eps!r}, expected a number between 0 and 1")


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich 2019). ``weight`` names a tensor [size]."""

    weight: str
    eps: float

    def __post_init__(self) -> None:
        check_fields(self)
        _check_eps(f"RMSNorm({self.weight})", self.eps)

    def tensors(self, size: int) -> Iterator[TensorSpec]:
        yield TensorSpec(self.weight, (size,))


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x − mean) / sqrt(var + eps) · weight + bias (Ba et al. 2016), var biased. Tensors of [size]."""

    weight: str
    bias: str | None
    eps: float

    def __post_init__(self) -> None:
        check_fields(self)
        _check_eps(f"LayerNorm({self.weight})", self.eps)

    def tensors(self, size: int) -> Iterator[TensorSpec]:
        yield TensorSpec(self.weight, (size,))
        if self.bias is not None:
            yield TensorSpec(self.bias, (size,))


Norm = RMSNorm | LayerNorm
