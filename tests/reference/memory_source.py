"""MemorySource: weights from NumPy arrays, where a test wants to choose or change them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from polyhead.arch import Decoder


@dataclass(frozen=True)
class Info:
    shape: tuple[int, ...]
    type: str = "F32"

    @property
    def nbytes(self) -> int:
        return 4 * int(np.prod(self.shape))


class MemorySource:
    """Answers as an open model file does."""

    def __init__(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        self.arrays = dict(arrays)
        self.tensors = {name: Info(array.shape) for name, array in self.arrays.items()}

    def data(self, name: str) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self.arrays[name], np.float32).view(np.uint8).reshape(-1)

    def dequantise(self, name: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        if out is None:
            return self.arrays[name].copy()
        out[...] = self.arrays[name]
        return out


def random_weights(decoder: Decoder, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights for every tensor of a decoder, sized so that attention is far from uniform and nothing saturates."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[np.float32]] = {}
    for spec in decoder.tensors():
        if spec.owner.endswith("rope.factors"):
            value = rng.uniform(1.0, 4.0, spec.shape)
        elif len(spec.shape) == 1:
            value = rng.normal(1.0 if "norm" in spec.owner and spec.name.endswith("weight") else 0.0, 0.3, spec.shape)
        else:
            value = rng.normal(0.0, 1.5 / np.sqrt(spec.shape[-1]), spec.shape)
        arrays[spec.name] = value.astype(np.float32)
    return arrays
