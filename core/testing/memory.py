"""MemorySource: weights from NumPy arrays, where a test wants to choose or change them; and weights to begin with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arch import Decoder, TensorSpec

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Info:
    """What a file would say of one tensor of float32 values."""

    shape: tuple[int, ...]
    type: str = "F32"

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


class MemorySource:
    """Answers a runtime as an open model file does."""

    def __init__(self, arrays: Mapping[str, F32]) -> None:
        self.arrays = dict(arrays)
        self.tensors = {name: Info(array.shape) for name, array in self.arrays.items()}

    def data(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes."""
        return np.ascontiguousarray(self.arrays[name], np.float32).view(np.uint8).reshape(-1)

    def dequantise(self, name: str, out: F32 | None = None) -> F32:
        """The values, written to ``out`` where given."""
        if out is None:
            return self.arrays[name].copy()
        out[...] = self.arrays[name]
        return out


def random_weights(decoder: Decoder, seed: int) -> dict[str, F32]:
    """Weights for every tensor of a decoder, sized so that attention is far from uniform and nothing saturates.

    Gains are around 1, biases far enough from 0 that one left out shows, RoPE factors between 1 and 4.
    """
    return weights_for(decoder.tensors(), seed)


def weights_for(specs: Iterable[TensorSpec], seed: int) -> dict[str, F32]:
    """As :func:`random_weights`, for these tensors."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, F32] = {}
    owners: set[str] = set()
    for spec in specs:
        # A norm's first vector is its gain, its second its bias.
        gain = spec.owner.rpartition(".")[2].endswith("norm") and spec.owner not in owners
        owners.add(spec.owner)
        if spec.owner.endswith("rope.factors"):
            value = rng.uniform(1.0, 4.0, spec.shape)
        elif len(spec.shape) == 1:
            value = rng.normal(1.0 if gain else 0.0, 0.3, spec.shape)
        else:
            value = rng.normal(0.0, 1.5 / np.sqrt(spec.shape[-1]), spec.shape)
        arrays[spec.name] = value.astype(np.float32)
    return arrays
