"""What every op is given: a device, a compiler, and the one way to launch a kernel.

Knows nothing of what the kernels compute. The modules of ``ops`` list what they launch as VARIANTS; see variants.py.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import DeviceError
from .compiler import Compiler
from .device import CudaDevice
from .driver import api, check
from .memory import Array

#: What a kernel may use of dynamic shared memory without being told so first.
_SHARED_DEFAULT = 48 << 10

#: Grids and sizes of a kernel that are kept; prompts of ever new lengths would collect without end.
_MOST_CONFIGS = 1024
_MAX_GRID = (2**31 - 1, 65535, 65535)
_NO_MACROS: Mapping[str, object] = {}


#: What Python's struct calls an argument of a type, by which the kernel's parameter is filled.
_CODES = {bool: "i", int: "i", float: "f", Array: "Q"}
_NUMPY_CODES = {"bool": "?", "longlong": "q", "ulonglong": "Q", "float16": "e", "float32": "f", "float64": "d"} | {
    f"{sign}int{8 * 2**n}": code for sign, codes in (("", "bhiq"), ("u", "BHIQ")) for n, code in enumerate(codes)
}


class _Layout:
    """Where a kernel's parameters lie in host memory, for arguments of certain types."""

    __slots__ = ("_buffer", "_pointers", "address", "pack_into", "sizes")

    def __init__(self, kinds: tuple[type, ...]) -> None:
        codes = [_code(kind) for kind in kinds]
        layout = struct.Struct("@" + "".join(codes))
        self.sizes = tuple(struct.calcsize(code) for code in codes)
        self._buffer = ctypes.create_string_buffer(max(1, layout.size))
        # What begins where the fields before it end, aligned to its size.
        ends = [struct.calcsize("@" + "".join(codes[: n + 1])) for n in range(len(codes))]
        start = ctypes.addressof(self._buffer)
        pointers = [start + end - size for end, size in zip(ends, self.sizes, strict=True)]
        self._pointers = (ctypes.c_void_p * max(1, len(codes)))(*pointers)
        self.address = ctypes.addressof(self._pointers)
        self.pack_into = functools.partial(layout.pack_into, self._buffer, 0)


class _Function:
    """A loaded kernel, the sizes of its parameters, and how much dynamic shared memory it was allowed so far.

    Launching is the host's work of every step, so what repeats is made once: layouts of arguments and configurations.
    """

    __slots__ = ("configs", "handle", "kernel", "layouts", "limit", "macros", "shared", "sizes", "title")

    def __init__(self, title: str, kernel: Any, macros: Mapping[str, object], shared_limit: int) -> None:
        self.title, self.kernel, self.macros = title, kernel, macros
        self.handle = api().CUfunction(int(kernel.handle))
        attributes = kernel.attributes
        static = int(attributes.shared_size_bytes)
        self.limit = max(0, shared_limit - static)
        self.shared = max(0, min(_SHARED_DEFAULT - static, self.limit))
        self.layouts: dict[tuple[type, ...], _Layout] = {}
        self.configs: dict[tuple[object, ...], Any] = {}
        try:
            self.sizes: tuple[int, ...] | None = tuple(int(info.size) for info in kernel.arguments_info)
        except Exception:  # Drivers before 12.4 cannot tell; the launch then goes unchecked.
            self.sizes = None

    def layout(self, kinds: tuple[type, ...]) -> _Layout:
        """The layout of arguments of these types. Raises DeviceError where the kernel takes others."""
        found = _Layout(kinds)
        if self.sizes is not None and self.sizes != found.sizes:
            raise DeviceError(f"the arguments have {list(found.sizes)} bytes, the kernel wants {list(self.sizes)}")
        self.layouts[kinds] = found
        return found


class Context:
    """A device and its compiled kernels. Owns both; not thread-safe."""

    def __init__(self, device: CudaDevice, compiler: Compiler | None = None) -> None:
        self.device = device
        self.compiler = Compiler(device.sm) if compiler is None else compiler
        self._driver: Any = api()
        self._functions: dict[tuple[object, ...], _Function] = {}
        # The same by the identity of the macros, which most ops keep: that is found faster than by what is in them.
        self._known: dict[tuple[str, str, int], _Function] = {}

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
        no; what goes wrong while the kernel runs is raised by the next ``synchronize``. ``macros`` that are the same
        object as before are taken to hold the same.

        ``early`` lets the kernel begin while the one launched before it ends (programmatic dependent launch, from 9.0
        on): it must then call ``ph_wait_for_inputs`` in every block, as prelude.cuh says.
        """
        where = grid if isinstance(grid, tuple) else (grid, 1, 1)
        function = self._known.get((file, kernel, id(macros)))
        if function is None or function.macros is not macros:
            function = self.prepare(file, kernel, macros)
        try:
            kinds = tuple(map(type, args))
            layout = function.layouts.get(kinds) or function.layout(kinds)
            try:
                layout.pack_into(*[value.ptr if type(value) is Array else value for value in args])
            except struct.error:
                _explain(args)
                raise
            config = function.configs.get((where, block, shared, early))
            if config is None:
                config = self._configure(function, where, block, shared, early)
            check(self._driver.cuLaunchKernelEx(config, function.handle, layout.address, 0), "cuLaunchKernelEx")
        except Exception as error:
            doing = f"launching {describe_launch(file, kernel, where, block, shared, macros)}"
            raise DeviceError(f"{doing}: {' '.join(str(error).split()) or type(error).__name__}") from error
        self.device.last_launch = function.title

    def prepare(self, file: str, kernel: str, macros: Mapping[str, object] = _NO_MACROS) -> _Function:
        """Compiles and loads a kernel ahead of its first launch, as capturing wants it. Errors as ``launch``."""
        if self.device.closed:
            raise DeviceError(f"{self.device} is closed")
        key = (file, kernel, *macros.items(), *map(type, macros.values()))  # True and 1 differ, and so do False and 0.
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._load(file, kernel, macros)
        if function.macros is macros:
            self._known[file, kernel, id(macros)] = function
        return function

    def close(self) -> None:
        """Closes the device, with the graphs that use the kernels, then unloads these. Closing twice is harmless."""
        try:
            self.device.close()
        finally:
            self._known.clear()
            self._functions.clear()
            self.compiler.close()

    def _load(self, file: str, kernel: str, macros: Mapping[str, object]) -> _Function:
        found = self.compiler.get(file, kernel, **macros)
        function = _Function(f"{file}:{kernel}", found, macros, self.device.shared_limit)
        # All kernels split a multiprocessor's memory into L1 and shared alike: where two do not, the second waits until
        # the first has left the multiprocessor, whatever ``early`` says. It is a hint: a driver may not know it.
        driver = api()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        driver.cuKernelSetAttribute(attribute, 100, function.kernel.handle, self.device.index)
        return function

    def _configure(self, function: _Function, grid: tuple[int, ...], block: int, shared: int, early: bool) -> Any:
        if not 1 <= block <= 1024 or not all(1 <= n <= most for n, most in zip(grid, _MAX_GRID, strict=True)):
            raise DeviceError("a grid is at least 1 and at most 2^31-1 x 65535 x 65535, a block 1 to 1024 threads")
        if shared > function.shared:
            self._allow_shared(function, shared)
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared
        config.hStream = driver.CUstream(int(self.device.stream.handle))
        if early and self.device.cc >= (9, 0):
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        if len(function.configs) >= _MOST_CONFIGS:
            function.configs.clear()
        function.configs[grid, block, shared, early] = config
        return config

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


def _code(kind: type) -> str:
    if issubclass(kind, np.generic):
        code = _NUMPY_CODES.get(kind.__name__.removesuffix("_"))
    else:
        code = next((code for base, code in _CODES.items() if issubclass(kind, base)), None)
    if code is None:
        raise DeviceError(f"a {kind.__name__} cannot be a kernel's argument")
    return code


def _explain(args: tuple[Any, ...]) -> None:
    """Raises DeviceError for the argument that does not fit its type."""
    for value in args:
        if type(value) is int and not -(2**31) <= value < 2**31:
            raise DeviceError(f"the argument {value} does not fit int32; pass np.int64 to a kernel that takes one")
