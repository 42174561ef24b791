"""Reading GGUF model files: metadata with types, the index of tensors, and their blocks as bytes or as float32.

`open_gguf` maps a file (or a split model's files) and checks everything its header claims before it is used. Knows
nothing of architectures, tokenizers or devices.
"""

from __future__ import annotations

from .arrays import GGUFArray
from .blocks import BLOCK_TYPES, SUPPORTED_TYPES, BlockType
from .file import GGUFFile, open_gguf
from .header import TensorInfo, Value

__all__ = [
    "BLOCK_TYPES",
    "SUPPORTED_TYPES",
    "BlockType",
    "GGUFArray",
    "GGUFFile",
    "TensorInfo",
    "Value",
    "open_gguf",
]
