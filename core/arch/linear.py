"""Linear and Embedding: the leaves that name matrices. Their sizes come from the container they stand in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .fields import check_fields
from .tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x Wᵀ + b. ``weight`` names a tensor [out_features, in_features], ``bias`` one of [out_features]."""

    weight: str
    bias: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def tensors(self, out_features: int, in_features: int) -> Iterator[TensorSpec]:
        yield TensorSpec(self.weight, (out_features, in_features))
        if self.bias is not None:
            yield TensorSpec(self.bias, (out_features,))


@dataclass(frozen=True, slots=True)
class Embedding:
    """A row per id. ``weight`` names a tensor [rows, hidden]."""

    weight: str

    def __post_init__(self) -> None:
        check_fields(self)

    def tensors(self, rows: int, hidden: int) -> Iterator[TensorSpec]:
        yield TensorSpec(self.weight, (rows, hidden))
