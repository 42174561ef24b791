"""RandomWeights: a model's weights made up in memory, for measuring speed at a real shape without a file.

Random, never zeros: zeros run faster than real data. Every quantised block is valid and its scale gives weights of a
trained model's size, so that no activation overflows.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..gguf.blocks import BLOCK_TYPES
from ..gguf.dequant import dequantise_into

UNIT = 1 << 22  # bytes of random content; larger tensors repeat it, each from a place of its own


@dataclass(frozen=True, slots=True)
class _Scales:
    """Byte offsets of a block's float16 scale and minimum, and the RMS of a weight where the scale is 1."""

    scale_at: int
    rms: float
    min_at: int | None = None
    min_ratio: float = 0.0


_SCALES = {
    "Q4_0": _Scales(0, 4.6),
    "Q4_1": _Scales(0, 4.6, 2, -7.5),
    "Q5_0": _Scales(0, 9.2),
    "Q5_1": _Scales(0, 9.2, 2, -15.5),
    "Q8_0": _Scales(0, 74.0),
    "Q2_K": _Scales(80, 14.0, 82, 1.5),
    "Q3_K": _Scales(108, 43.0),
    "Q4_K": _Scales(0, 258.0, 2, 7.5),
    "Q5_K": _Scales(0, 527.0, 2, 15.5),
    "Q6_K": _Scales(208, 1366.0),
}


@dataclass(frozen=True, slots=True)
class RandomInfo:
    """What a file would say of one tensor."""

    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        block = BLOCK_TYPES[self.type]
        return math.prod(self.shape) // block.weights * block.nbytes


class RandomWeights:
    """Answers a runtime as an open model file does."""

    def __init__(self, sizes: Mapping[str, tuple[int, ...]], types: Mapping[str, str], seed: int = 0) -> None:
        self.tensors = {name: RandomInfo(size, types[name]) for name, size in sizes.items()}
        self._rng = np.random.default_rng(seed)
        self._units: dict[tuple[str, int], NDArray[np.uint8]] = {}
        for info in self.tensors.values():  # made now: reads may come from several threads
            self._unit(info)

    def data(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes."""
        info = self.tensors[name]
        unit = self._unit(info)
        block = BLOCK_TYPES[info.type].nbytes
        start = zlib.crc32(name.encode()) % (len(unit) // block) * block
        out = np.empty(info.nbytes, np.uint8)
        first = min(len(unit) - start, len(out))
        out[:first] = unit[start : start + first]
        for at in range(first, len(out), len(unit)):
            out[at : at + len(unit)] = unit[: len(out) - at]
        return out

    def dequantise(self, name: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The values, float32 in the tensor's shape."""
        info = self.tensors[name]
        target = np.empty(info.shape, np.float32) if out is None else out
        dequantise_into(info.type, self.data(name), target.reshape(-1))
        return target

    def _unit(self, info: RandomInfo) -> NDArray[np.uint8]:
        # A weight of RMS 1/sqrt(inputs) keeps activations of the same size from layer to layer.
        inputs = info.shape[-1] if len(info.shape) > 1 else 0
        key = (info.type, inputs)
        if key not in self._units:
            self._units[key] = self._make(info.type, 0.7 / math.sqrt(inputs) if inputs else 1.0, bool(inputs))
        return self._units[key]

    def _make(self, kind: str, rms: float, matrix: bool) -> NDArray[np.uint8]:
        rng, block = self._rng, BLOCK_TYPES[kind]
        if kind in ("F32", "F16", "BF16"):
            values = rng.normal(0.0 if matrix else 1.0, rms if matrix else 0.1, UNIT // block.nbytes).astype(np.float32)
            if kind == "BF16":
                return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
            return values.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)
        scales = _SCALES[kind]
        blocks = rng.integers(0, 256, (UNIT // block.nbytes, block.nbytes), np.uint8)
        scale = (rms / scales.rms * rng.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        blocks[:, scales.scale_at : scales.scale_at + 2] = scale.view(np.uint8).reshape(-1, 2)
        if scales.min_at is not None:
            low = (scale.astype(np.float32) * scales.min_ratio).astype(np.float16)
            blocks[:, scales.min_at : scales.min_at + 2] = low.view(np.uint8).reshape(-1, 2)
        return blocks.reshape(-1)
