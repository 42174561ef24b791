"""ModuleKind: how a plugin's own layer (level 2 of the contract) is computed on each runtime.

Knows nothing of CUDA: what a GPU implementation is given is described here as protocols, and may still change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..arch import Module, TensorSpec

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


class DeviceArray(Protocol):
    """A contiguous, row-major array in a GPU's memory: an address with a shape. Passed to a kernel it is a pointer."""

    @property
    def ptr(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """f32, f16, bf16, i32, u32, i64, u64, u8 or i8."""
        ...

    def slice_rows(self, start: int, stop: int) -> DeviceArray:
        """Rows ``start:stop`` of the first dimension."""
        ...

    def view(self, dtype: str, *shape: int) -> DeviceArray:
        """The leading bytes as another type and shape: integers in scratch, for example."""
        ...


class DeviceMatrix(Protocol):
    """A module's matrix [rows, cols], or ``count`` of them one after the other, as core keeps matrices on a GPU.

    ``kind`` is a GGML type for a quantised matrix, which lies in tiles of 16 rows of ``tile_bytes`` each
    (formats.cuh reads them); its ``macros`` are what formats.cuh is compiled with. It is f16 or bf16, the
    activations' dtype, for a dense one, which lies row by row and has no macros. ``item_bytes`` lead from one matrix
    of a stack to the next.
    """

    @property
    def kind(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def cols(self) -> int: ...

    @property
    def data(self) -> DeviceArray: ...

    @property
    def item_bytes(self) -> int: ...

    @property
    def tile_bytes(self) -> int: ...

    @property
    def macros(self) -> Mapping[str, object]: ...


class CudaSetup(Protocol):
    """What a module is given when a model is loaded onto a GPU. Weights are there already; nothing can be allocated."""

    @property
    def hidden(self) -> int: ...

    @property
    def act(self) -> str:
        """The dtype of activations: f16 or bf16."""
        ...

    @property
    def sms(self) -> int:
        """Multiprocessors of the GPU."""
        ...

    @property
    def cc(self) -> tuple[int, int]:
        """Compute capability, such as (9, 0)."""
        ...

    def source(self, name: str, text: str) -> str:
        """Makes CUDA source known and returns the name that ``launch`` and ``#include`` know it by.

        ``name`` ends in .cu or .cuh; the plugin's name is put in front. The source may include prelude.cuh,
        formats.cuh and linear.cuh. The same text again is harmless, another is a DeviceError.
        """
        ...

    def compile(self, file: str, kernel: str, macros: Mapping[str, object] = ...) -> None:
        """Compiles a kernel now, so that an error shows at load and the first token does not wait."""
        ...

    def matrix(self, tensor: str) -> DeviceMatrix:
        """A tensor of two dimensions, or of three: a stack of matrices."""
        ...

    def vector(self, tensor: str) -> DeviceArray:
        """Any other tensor, float32 in its own shape."""
        ...


class Gpu(Protocol):
    """How a module works on a GPU's stream. What it starts runs in order; nothing waits for it."""

    def launch(
        self,
        file: str,
        kernel: str,
        grid: tuple[int, int, int] | int,
        block: int,
        *args: Any,
        shared: int = 0,
        macros: Mapping[str, object] = ...,
    ) -> None:
        """Launches an ``extern "C"`` kernel of ``file``, compiled with ``macros`` (PH_ and capitals).

        ``block`` is threads in x, ``shared`` bytes of dynamic shared memory. Arguments: DeviceArray -> pointer, int and
        bool -> int32, float -> float32, a NumPy scalar -> as it is; ``np.uint64(0)`` is a null pointer. PH_ACT_BF16 is
        defined where activations are bfloat16. Raises DeviceError naming file, line, kernel, grid and macros.
        """
        ...

    def linear(
        self,
        x: DeviceArray,
        matrix: DeviceMatrix,
        out: DeviceArray,
        column: int = 0,
        *,
        bias: DeviceArray | None = None,
        accumulate: bool = False,
        scale: float = 1.0,
    ) -> None:
        """out[:, column:column + rows] = scale · (x Wᵀ + bias), added to what is there if ``accumulate``.

        ``x`` [rows, cols of W] in the activations' dtype; ``out`` in that or float32. W is one matrix, not a stack.
        """
        ...


class CudaModule(Protocol):
    """A module with its weights on a GPU."""

    def __call__(self, x: DeviceArray, out: DeviceArray, scratch: Mapping[str, DeviceArray], gpu: Gpu) -> None:
        """Starts what writes ``out``, float32 [rows, hidden], from ``x`` [rows, hidden] in the activations' dtype.

        ``scratch`` is as for a CpuModule, on the device. The call may be recorded in a CUDA graph and replayed on other
        values: launches may depend on the number of rows, never on what is in an array; nothing may be allocated, and
        nothing may wait. A row of ``out`` may depend only on the same row of ``x``.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModuleKind:
    """Ties a Module subclass to its implementations.

    ``cpu`` is called once at load with the spec and its weights, float32 arrays by tensor name, and returns the
    callable that runs it. ``cuda`` (provisional) is called once at load with the spec and a CudaSetup; without it a
    model with such a module runs on ``device: cpu`` only.
    """

    spec: type[Module]
    cpu: Callable[[Any, Mapping[str, NDArray[np.float32]]], CpuModule]
    cuda: Callable[[Any, CudaSetup], CudaModule] | None = None


def is_matrix(spec: TensorSpec) -> bool:
    """Whether a module's tensor is a matrix on a GPU, or a stack: it has two or three dimensions."""
    return len(spec.shape) in (2, 3)


def matrix_specs(module: Module, hidden: int) -> Iterator[TensorSpec]:
    """The matrices of a module, in its order."""
    return (spec for spec in module.tensors(hidden) if is_matrix(spec))
