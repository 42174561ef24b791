"""ModuleKind: how a plugin's own layer (level 2 of the contract) is computed on each runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..arch import Module

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class CpuModule(Protocol):
    """A module with its weights, ready to run in NumPy."""

    def __call__(
        self, x: NDArray[np.float32], out: NDArray[np.float32], scratch: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Reads ``x`` [rows, hidden], writes ``out`` [rows, hidden] (never the same memory).

        ``scratch`` holds, for each name of ``Module.scratch``, a float32 array [rows, values per row] with undefined
        content. A row of ``out`` may depend only on the same row of ``x``.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModuleKind:
    """Ties a Module subclass to its implementation.

    ``cpu`` is called once at load with the spec and its weights, float32 arrays by tensor name, and returns the
    callable that runs it.
    """

    spec: type[Module]
    cpu: Callable[[Any, Mapping[str, NDArray[np.float32]]], CpuModule]
