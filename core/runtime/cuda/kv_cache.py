"""KVCache: every layer's keys and values on the device, in blocks. Knows nothing of which sequence owns a block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...arch import Decoder
from .device import CudaDevice
from .memory import Array, Pool
from .ops.checks import Scales

#: ``runtime.kv_dtype`` for e4m3 codes with scales.
FP8 = "fp8"


def decode_e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The values of e4m3 codes (OCP 8-bit floating point, 2023): a sign, 4 bits of exponent, 3 of mantissa."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[(code & 127) == 127] = np.nan
    table = np.where(code < 128, values, -values).astype(np.float32)
    return np.asarray(table[codes])


class KVCache:
    """K and V of each layer, [num_blocks, kv_heads, block_size, head_dim].

    ``dtype`` is f16, bf16 or fp8. In fp8 each token has for each KV head a scale of its own for K and one for V: a
    block that grows never changes what it holds, so results do not depend on how a sequence was cut into chunks.
    """

    def __init__(self, pool: Pool, decoder: Decoder, num_blocks: int, block_size: int, dtype: str) -> None:
        """Takes zeroed memory from ``pool``; raises CapacityError where there is too little."""
        self._block_size = block_size
        self.layers: list[tuple[Array, Array]] = []
        #: Of each layer, None unless the cache is fp8.
        self.scales: list[Scales | None] = []
        for block in decoder.blocks:
            shape = (num_blocks, block.attn.kv_heads, block_size, block.attn.head_dim)
            stored = "u8" if dtype == FP8 else dtype
            self.layers.append((pool.array(shape, stored, zero=True), pool.array(shape, stored, zero=True)))
            self.scales.append(None)
            if dtype == FP8:
                of = shape[:3]
                self.scales[-1] = (pool.array(of, "f32", zero=True), pool.array(of, "f32", zero=True))

    def read(
        self, device: CudaDevice, layer: int, slots: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """K and V [len(slots), kv_heads, head_dim] as attention sees them; slot = block · block_size + offset."""
        at = np.asarray(slots, np.intp)
        block, offset = at // self._block_size, at % self._block_size
        scales = self.scales[layer]
        found = []
        for i, cache in enumerate(self.layers[layer]):
            values = device.download(cache)[block, :, offset]
            if scales is None:
                found.append(np.asarray(values, np.float32))
            else:
                found.append(decode_e4m3(values) * device.download(scales[i])[block, :, offset, None])
        return found[0], found[1]
