"""The paged KV cache in host memory: blocks of ``block_size`` tokens, an array of K and one of V per layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...arch import Decoder
from ...errors import ConfigError

DTYPES: dict[str, type[np.floating]] = {"auto": np.float32, "f32": np.float32, "f16": np.float16}


def storage_dtype(name: str) -> np.dtype[np.floating]:
    """The NumPy dtype for ``runtime.kv_dtype``. Raises ConfigError for one that the CPU does not store."""
    if name not in DTYPES:
        raise ConfigError(f"runtime.kv_dtype is {name!r}; the CPU runtime stores {', '.join(DTYPES)}")
    return np.dtype(DTYPES[name])


class KVCache:
    """K and V of every layer, [num_blocks · block_size, kv_heads, head_dim]; slot = block · block_size + offset."""

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int, dtype: np.dtype[np.floating]) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        slots = num_blocks * block_size
        # Pages of zeros are committed by the system when first written, so a large cache costs what it holds.
        self.k, self.v = (
            [np.zeros((slots, b.attn.kv_heads, b.attn.head_dim), dtype) for b in decoder.blocks] for _ in range(2)
        )

    def store(self, layer: int, slots: NDArray[np.intp], k: NDArray[np.float32], v: NDArray[np.float32]) -> None:
        """Writes k and v [rows, kv_heads, head_dim] to ``slots`` [rows]."""
        self.k[layer][slots] = k
        self.v[layer][slots] = v

    def read(self, layer: int, slots: NDArray[np.intp] | slice) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """K and V at ``slots`` as float32; a slice of a float32 cache is a view."""
        k, v = self.k[layer][slots], self.v[layer][slots]
        return k.astype(np.float32, copy=False), v.astype(np.float32, copy=False)
