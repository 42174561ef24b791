"""Quantised blocks to float32 with NumPy. Knows nothing of files: blocks come in as bytes, weights go out.

Work is cut into pieces that stay in a core's cache, so a call needs a few MB beside its result whatever the tensor's
size, and NumPy releases the interpreter lock inside a piece, so several threads may work at once. F32, F16, BF16,
Q4_0, Q4_1 and Q8_0 are decoded here; the other formats by the `gguf` package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedTypeError
from .blocks import BLOCK_TYPES

_BLOCKS = 4096
"""Blocks of 32 weights per piece of the decoders below: half a MB of result."""
_PIECE = 1 << 18
_ROW = 1 << 12
"""Weights per call of the `gguf` package, and per row of it: measured to be the fastest there."""

_LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
_FOUR = np.uint64(4)


def dequantise_into(kind: str, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decodes ``data`` (whole blocks of type ``kind``, uint8 [n]) into ``out`` (float32 [weights], contiguous).

    Raises UnsupportedTypeError if there is no decoder for the type.
    """
    block = BLOCK_TYPES[kind]
    if data.size // block.nbytes * block.weights != out.size:
        raise ValueError(f"{data.size} bytes of {kind} are not {out.size} weights")
    # Infinite or NaN scales are the file's business, not a reason to print a warning.
    with np.errstate(all="ignore"):
        if kind == "F32":
            out[...] = data.view("<f4")
        elif kind == "F16":
            out[...] = data.view("<f2")
        elif kind == "BF16":
            bits = out.view(np.uint32)
            bits[...] = data.view("<u2")
            np.left_shift(bits, np.uint32(16), out=bits)
        elif kind in ("Q4_0", "Q4_1"):
            _nibbles(data, out, has_minimum=kind == "Q4_1")
        elif kind == "Q8_0":
            _q8_0(data, out)
        else:
            _with_gguf(kind, data, out)


def _nibbles(data: NDArray[np.uint8], out: NDArray[np.float32], *, has_minimum: bool) -> None:
    """Q4_0: d * (q - 8). Q4_1: d * q + m. Byte j of a block holds weight j (low half) and j + 16 (high half)."""
    fields: list[tuple[str, str]] = [("d", "<f2"), ("m", "<f2"), ("q", "V16")]
    if not has_minimum:
        del fields[1]
    blocks = data.view(np.dtype(fields))
    rows = out.reshape(-1, 32)
    size = min(_BLOCKS, len(blocks))
    packed = np.empty((size, 2), np.uint64)
    # A block's 16 bytes as one item: copying items is several times faster than copying rows of 16.
    items = packed.view("V16")[:, 0]
    halves = np.empty((size, 4), np.uint64)
    for first in range(0, len(blocks), _BLOCKS):
        part = blocks[first : first + _BLOCKS]
        weights = rows[first : first + _BLOCKS]
        n = len(part)
        items[:n] = part["q"]
        np.bitwise_and(packed[:n], _LOW, out=halves[:n, :2])
        np.right_shift(packed[:n], _FOUR, out=packed[:n])
        np.bitwise_and(packed[:n], _LOW, out=halves[:n, 2:])
        weights[...] = halves[:n].view(np.uint8)
        if not has_minimum:
            np.subtract(weights, np.float32(8), out=weights)
        np.multiply(weights, _column(part["d"]), out=weights)
        if has_minimum:
            np.add(weights, _column(part["m"]), out=weights)


def _q8_0(data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Q8_0: d * q, 32 signed bytes to a scale."""
    blocks = data.view(np.dtype([("d", "<f2"), ("q", "i1", (32,))]))
    rows = out.reshape(-1, 32)
    for first in range(0, len(blocks), _BLOCKS):
        part = blocks[first : first + _BLOCKS]
        weights = rows[first : first + _BLOCKS]
        weights[...] = part["q"]
        np.multiply(weights, _column(part["d"]), out=weights)


def _column(scales: NDArray[Any]) -> NDArray[np.float32]:
    return scales.astype(np.float32)[:, None]


def _with_gguf(kind: str, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    # Imported only when needed: it takes longer than opening a file.
    from gguf import GGMLQuantizationType, quants

    number = GGMLQuantizationType.__members__.get(kind)
    block = BLOCK_TYPES[kind]
    row = _ROW // block.weights * block.nbytes
    first = 0
    try:
        if number is None:
            raise NotImplementedError
        for start in range(0, out.size, _PIECE):
            stop = min(start + _PIECE, out.size)
            last = stop // block.weights * block.nbytes
            piece = data[first:last]
            # The package works row by row of the last axis; blocks do not care where rows end.
            shaped = piece.reshape(-1, row) if piece.size % row == 0 else piece.reshape(1, -1)
            out[start:stop] = quants.dequantize(shaped, number).reshape(-1)
            first = last
    except NotImplementedError:
        raise UnsupportedTypeError(
            f"The installed gguf package is too old to decode tensors of type {kind}; upgrade it with "
            "`pip install -U gguf`."
        ) from None
