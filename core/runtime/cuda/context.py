"""What every op is given: a device, a compiler, and the one way to launch a kernel.

Knows nothing of what the kernels compute. The modules of ``ops`` list what they launch as VARIANTS; see variants.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import DeviceError
from .compiler import Compiler
from .device import CudaDevice
from .driver import api, check, load
from .memory import Array

#: What a kernel may use of dynamic shared memory without being told so first.
_SHARED_DEFAULT = 48 << 10

_MAX_GRID = (2**31 - 1, 65535, 65535)
_NO_MACROS: Mapping[str, object] = {}


class _Function:
    """A loaded kernel, the sizes of its parameters, and how much dynamic shared memory it was allowed so far."""

    __slots__ = ("kernel", "limit", "shared", "sizes")

    def __init__(self, kernel: Any, shared_limit: int) -> None:
        self.kernel = kernel
        attributes = kernel.attributes
        static = int(attributes.shared_size_bytes)
        self.limit = max(0, shared_limit - static)
        self.shared = max(0, min(_SHARED_DEFAULT - static, self.limit))
        try:
            self.sizes: tuple[int, ...] | None = tuple(int(info.size) for info in kernel.arguments_info)
        except Exception:  # Drivers before 12.4 cannot tell; the launch then goes unchecked.
            self.sizes = None


class Context:
    """A device and its compiled kernels. Owns both; not thread-safe."""

    def __init__(self, device: CudaDevice, compiler: Compiler | None = None) -> None:
        self.device = device
        self.compiler = Compiler(device.sm) if compiler is None else compiler
        core = load("cuda.core")
        self._launch: Any = core.launch
        self._config: Any = core.LaunchConfig
        self._functions: dict[tuple[object, ...], _Function] = {}

    @classmethod
    def open(cls, index: int = 0) -> Context:
        """Opens GPU ``index``. Raises DeviceError as CudaDevice does."""
        return cls(CudaDevice(index))

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def launch(
        self,
        file: str,
        kernel: str,
        grid: tuple[int, int, int] | int,
        block: int,
        *args: Any,
        shared: int = 0,
        macros: Mapping[str, object] = _NO_MACROS,
        early: bool = False,
    ) -> None:
        """Launches ``kernel`` of ``kernels/<file>`` on the device's stream, compiled with ``macros``.

        ``block`` is threads in x, ``shared`` bytes of dynamic shared memory. Arguments: Array -> pointer, int and bool
        -> int32, float -> float32, a NumPy scalar -> as it is. Raises DeviceError naming all of this where the grid,
        the block, the shared memory or the arguments cannot be, where the kernel does not compile, or the driver says
        no; what goes wrong while the kernel runs is raised by the next ``synchronize``.

        ``early`` lets the kernel begin while the one launched before it ends (programmatic dependent launch, from 9.0
        on): it must then call ``ph_wait_for_inputs`` in every block, as prelude.cuh says.
        """
        where = grid if isinstance(grid, tuple) else (grid, 1, 1)
        key = (file, kernel, *macros.items(), *map(type, macros.values()))  # True and 1 differ, and so do False and 0.
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._load(file, kernel, macros)
        try:
            values = [_argument(value) for value in args]
            if function.sizes is not None and function.sizes != tuple([size for _, size in values]):
                raise DeviceError(
                    f"the arguments have {[size for _, size in values]} bytes, the kernel wants {list(function.sizes)}"
                )
            if not 1 <= block <= 1024 or not all(1 <= n <= most for n, most in zip(where, _MAX_GRID, strict=True)):
                raise DeviceError("a grid is at least 1 and at most 2^31-1 x 65535 x 65535, a block 1 to 1024 threads")
            if shared > function.shared:
                self._allow_shared(function, shared)
            config = self._config(
                grid=where,
                block=(block, 1, 1),
                shmem_size=shared,
                programmatic_stream_serialization=early and self.device.cc >= (9, 0),
            )
            self._launch(self.device.stream, config, function.kernel, *[value for value, _ in values])
        except Exception as error:
            doing = f"launching {describe_launch(file, kernel, where, block, shared, macros)}"
            raise DeviceError(f"{doing}: {' '.join(str(error).split()) or type(error).__name__}") from error
        self.device.last_launch = f"{file}:{kernel}"

    def prepare(self, file: str, kernel: str, macros: Mapping[str, object] = _NO_MACROS) -> None:
        """Compiles and loads a kernel ahead of its first launch, as capturing wants it. Errors as ``launch``."""
        key = (file, kernel, *macros.items(), *map(type, macros.values()))  # True and 1 differ, and so do False and 0.
        if key not in self._functions:
            self._functions[key] = self._load(file, kernel, macros)

    def close(self) -> None:
        """Closes the device, with the graphs that use the kernels, then unloads these. Closing twice is harmless."""
        try:
            self.device.close()
        finally:
            self._functions.clear()
            self.compiler.close()

    def _load(self, file: str, kernel: str, macros: Mapping[str, object]) -> _Function:
        if self.device.closed:
            raise DeviceError(f"{self.device} is closed")
        function = _Function(self.compiler.get(file, kernel, **macros), self.device.shared_limit)
        # All kernels split a multiprocessor's memory into L1 and shared alike: where two do not, the second waits until
        # the first has left the multiprocessor, whatever ``early`` says. It is a hint: a driver may not know it.
        driver = api()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        driver.cuKernelSetAttribute(attribute, 100, function.kernel.handle, self.device.index)
        return function

    def _allow_shared(self, function: _Function, shared: int) -> None:
        if shared > function.limit:
            raise DeviceError(
                f"{shared:,} bytes of shared memory per block, but {self.device} has {function.limit:,} for this kernel"
            )
        driver = api()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        # The most at once: the limit is no reservation, and setting it per launch would cost a call each.
        done = driver.cuKernelSetAttribute(attribute, function.limit, function.kernel.handle, self.device.index)
        check(done, "cuKernelSetAttribute", f"{function.limit:,} bytes of shared memory")
        function.shared = function.limit


def describe_launch(
    file: str, kernel: str, grid: tuple[int, ...], block: int, shared: int, macros: Mapping[str, object]
) -> str:
    """A launch for a reader: file, kernel, grid, block, shared memory, macros."""
    defines = " ".join(f"{name}={value}" for name, value in sorted(macros.items())) or "none"
    size = "x".join(str(n) for n in grid)
    return f"{file}:{kernel} (grid {size}, block {block}, shared {shared:,} B, macros: {defines})"


def _argument(value: Any) -> tuple[Any, int]:
    """What cuda.core is given for an argument, and its size in bytes. A Python int means a 64-bit pointer to it."""
    if isinstance(value, Array):
        return value.ptr, 8
    if isinstance(value, bool | int) and not isinstance(value, np.generic):
        if not -(2**31) <= value < 2**31:
            raise DeviceError(f"the argument {value} does not fit int32; pass np.int64 to a kernel that takes one")
        return np.int32(value), 4
    if isinstance(value, np.generic):
        return value, int(value.itemsize)
    if isinstance(value, float):
        return np.float32(value), 4
    raise DeviceError(f"a {type(value).__name__} cannot be a kernel's argument")
