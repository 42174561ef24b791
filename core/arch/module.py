"""Module: the base of a layer that a plugin adds and the vocabulary lacks (level 2 of the plugin contract)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .tensors import TensorSpec


@dataclass(frozen=True)
class Module:
    """A position-wise layer of a plugin's own: rows of [hidden] in, rows of [hidden] out, no mixing between rows.

    Subclass it as a frozen dataclass whose fields say all there is to know, and register an implementation for the
    subclass with the hook ``polyhead_register_modules``. It stands where a block's MLP stands and nowhere else:
    attention is what the fields of Attention say.
    """

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        """The tensors this module reads, with shapes in NumPy order."""
        raise NotImplementedError(f"{type(self).__name__} does not say which tensors it reads")

    def scratch(self, hidden: int) -> Mapping[str, int]:
        """Named scratch buffers in float32 values per row; they are planned into the workspace."""
        return {}
