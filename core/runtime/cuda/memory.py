"""Device memory: pools with a purpose, typed views into them, and page-locked host buffers.

Knows nothing of what is stored. Ownership is simple: a Pool owns device memory, a HostBuffer owns host memory, an Array
owns nothing and is valid until its pool is closed.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CapacityError, DeviceError
from ..memory import size_text
from .driver import api, check, describe

if TYPE_CHECKING:
    from .device import CudaDevice

#: Element sizes in bytes. bf16 has no NumPy type: on the host it is float32 (rounded on the way) or raw uint16.
DTYPES = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "u8": 1, "i8": 1}

#: What every array of a pool is aligned to, in bytes; kernels may load 16 bytes at once and TMA wants 128.
ALIGNMENT = 256

_SLAB = 2 << 20  # What the driver allocates at least; smaller arrays share slabs of this size.


@dataclass(frozen=True, slots=True)
class Array:
    """A contiguous, row-major view of device memory. Owns nothing."""

    ptr: int
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DeviceError(f"unknown device dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if any(size < 0 for size in self.shape):
            raise DeviceError(f"an array cannot have the shape {self.shape}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.itemsize

    def slice_rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of the first dimension. Raises DeviceError where they are not all there."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise DeviceError(f"rows {start}:{stop} are not in {self}")
        row = math.prod(self.shape[1:]) * self.itemsize
        return Array(self.ptr + start * row, (stop - start, *self.shape[1:]), self.dtype)

    def reshape(self, *shape: int) -> Array:
        """The same elements in another shape. Raises DeviceError where the number of elements differs."""
        if math.prod(shape) != self.size:
            raise DeviceError(f"{self} cannot have the shape {shape}")
        return Array(self.ptr, shape, self.dtype)

    def view(self, dtype: str, *shape: int) -> Array:
        """The leading bytes as another type and shape; scratch memory is divided this way.

        Raises DeviceError where the view would be longer than the array or misaligned.
        """
        other = Array(self.ptr, shape, dtype)
        if other.nbytes > self.nbytes or self.ptr % other.itemsize:
            raise DeviceError(f"{other} does not fit into {self}")
        return other

    def at(self, offset: int, dtype: str, *shape: int) -> Array:
        """A view that begins ``offset`` bytes in. Raises DeviceError as ``view`` does."""
        if not 0 <= offset <= self.nbytes:
            raise DeviceError(f"byte {offset} is not in {self}")
        return Array(self.ptr + offset, (self.nbytes - offset,), "u8").view(dtype, *shape)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Pool:
    """Device memory for one purpose, returned as a whole by ``close``. Small arrays share slabs."""

    def __init__(self, device: CudaDevice, name: str) -> None:
        self.device = device
        self.name = name
        self.nbytes = 0  # Taken from the device, padding and the unused ends of slabs included.
        self.arrays = 0
        self.closed = False
        self._blocks: list[int] = []
        self._next = 0
        self._left = 0
        device.adopt(self)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def array(self, shape: tuple[int, ...] | int, dtype: str, *, zero: bool = False) -> Array:
        """A new array, aligned to 256 bytes; its content is undefined unless ``zero``.

        Raises CapacityError naming the pool, the bytes asked for and those free.
        """
        self._check_open()
        array = Array(0, (shape,) if isinstance(shape, int) else tuple(shape), dtype)
        size = -(-max(array.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        if size > self._left and size <= _SLAB // 4:
            self._begin_slab(_SLAB)
        if size <= self._left:
            ptr = self._next
            self._next += size
            self._left -= size
        else:
            ptr = self._allocate(size)
        self.arrays += 1
        array = Array(ptr, array.shape, dtype)
        if zero and array.nbytes:
            self.device.fill(array, 0)
        return array

    def reserve(self, nbytes: int) -> None:
        """Takes ``nbytes`` from the device at once: following arrays come from there while they fit.

        An array of n bytes needs n rounded up to 256. Raises CapacityError.
        """
        self._check_open()
        self._begin_slab(-(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT)

    def close(self) -> None:
        """Returns all memory, after the work that may use it has finished. Closing twice is harmless."""
        if self.closed:
            return
        self.closed = True
        blocks, self._blocks, self._left, self.nbytes = self._blocks, [], 0, 0
        self.device.release(self)
        if blocks:
            self.device.activate()
            driver = api()
            try:
                self.device.synchronize()
            finally:
                for block in blocks:
                    driver.cuMemFree(block)  # Fails only if the context is lost, and the memory with it.

    def _begin_slab(self, size: int) -> None:
        self._next = self._allocate(size)
        self._left = size

    def _allocate(self, size: int) -> int:
        self.device.activate()
        status, ptr = api().cuMemAlloc(size)
        if int(status) == 0:
            self._blocks.append(int(ptr))
            self.nbytes += size
            return int(ptr)
        if getattr(status, "name", "") != "CUDA_ERROR_OUT_OF_MEMORY":
            raise DeviceError(f"cuMemAlloc failed (pool {self.name}, {size:,} bytes): {describe(status)}")
        free = self.device.free()
        raise CapacityError(
            f"{self.device} has no room for {size_text(size)} more in the pool '{self.name}', which holds "
            f"{size_text(self.nbytes)}: {size_text(free)} of {size_text(self.device.total)} are free, perhaps in "
            "pieces. Lower runtime.context, runtime.max_batch or runtime.memory_fraction, or close what else uses it"
        )

    def _check_open(self) -> None:
        if self.closed:
            raise DeviceError(f"the pool '{self.name}' of {self.device} is closed")


class HostBuffer:
    """Page-locked host memory: copies to and from it run at full speed, asynchronously and inside graphs."""

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self.device = device
        self.nbytes = max(nbytes, 1)
        device.activate()
        self._ptr = 0
        context = f"{self.nbytes:,} bytes of page-locked host memory"
        self._ptr = int(check(api().cuMemHostAlloc(self.nbytes, 0), "cuMemHostAlloc", context))
        self.closed = False
        device.adopt(self)

    def array(self, dtype: Any, *shape: int, offset: int = 0) -> NDArray[Any]:
        """A NumPy array over the bytes from ``offset`` on. It must not be used after ``close``.

        Raises DeviceError where it would end outside the buffer.
        """
        if self.closed:
            raise DeviceError("the page-locked buffer is closed")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if offset < 0 or offset + size > self.nbytes:
            raise DeviceError(f"bytes {offset}:{offset + size} are not in a page-locked buffer of {self.nbytes:,}")
        memory = memoryview((ctypes.c_uint8 * self.nbytes).from_address(self._ptr))
        return np.ndarray(shape, dtype, memory, offset)

    def __enter__(self) -> HostBuffer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Returns the memory, after copies in flight have finished. Closing twice is harmless."""
        if self.closed:
            return
        self.closed = True
        self.device.release(self)
        self.device.activate()
        try:
            self.device.synchronize()
        finally:
            api().cuMemFreeHost(self._ptr)
