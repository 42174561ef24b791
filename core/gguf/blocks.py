"""How GGUF tensor types pack weights into blocks: sizes and numbers, so that opening a file needs no other package.

Knows nothing of files or of how a block is decoded. The numbers are those of the GGUF format (ggml's type
table); a test compares them with the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class BlockType(NamedTuple):
    """A block format: how many weights a block holds and how many bytes it takes."""

    weights: int
    nbytes: int


_TABLE: tuple[tuple[int, str, int, int], ...] = (
    # id in the file, name, weights per block, bytes per block
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 40),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
)

BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType({name: BlockType(w, b) for _, name, w, b in _TABLE})
"""Every type whose size is known, by name."""

TYPE_NAMES: Mapping[int, str] = MappingProxyType({number: name for number, name, _, _ in _TABLE})
"""The type's number in a file -> its name."""

REMOVED_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
"""Numbers that old files use for formats the GGUF format has dropped since; only good for an error message."""

_UNDECODED = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "NVFP4", "Q1_0"})
# Q8_1 and Q8_K are ggml's types for activations. NVFP4 is left out on purpose: its weights are right only when
# multiplied with scales that the file keeps in tensors of their own.

SUPPORTED_TYPES: frozenset[str] = frozenset(BLOCK_TYPES) - _UNDECODED
"""Types that can be turned into float32."""


def supported_list() -> str:
    """The supported type names in the order of the format's numbers, for messages."""
    return ", ".join(name for name in BLOCK_TYPES if name in SUPPORTED_TYPES)
