"""One NVIDIA GPU: its primary context, one stream, what it can do, and copies between it and the host.

Knows nothing of kernels or models.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import DeviceError
from .driver import api, check, load, translated
from .memory import Array
from .probe import require_device

_NUMPY = {"f32": "f4", "f16": "f2", "i32": "i4", "u32": "u4", "i64": "i8", "u64": "u8", "u8": "u1", "i8": "i1"}


class Closable(Protocol):
    """What a device closes before itself: pools, host buffers, graphs."""

    def close(self) -> None: ...


def sm_name(cc: tuple[int, int]) -> str:
    """The architecture to compile for. 9.0 has instructions that only its own 'a' target offers."""
    return "sm_90a" if cc == (9, 0) else f"sm_{cc[0]}{cc[1]}"


class CudaDevice:
    """An open GPU. Closing it closes what it handed out. Not thread-safe; ``activate`` lends it to another thread."""

    def __init__(self, index: int = 0) -> None:
        """Raises DeviceError: no driver, no such device, too old a GPU, or a missing package, in this order."""
        info = require_device(index)
        self.index = index
        self.name = info.name
        self.cc = info.cc
        self.sm = sm_name(info.cc)
        self.closed = False
        #: What was launched last; errors of asynchronous work name it.
        self.last_launch = ""
        self._owned: list[Closable] = []
        self._driver = api()
        core = load("cuda.core")
        with translated(f"opening {self}"):
            self._device: Any = core.Device(index)
            self._device.set_current()
            self._context = check(self._driver.cuCtxGetCurrent(), "cuCtxGetCurrent")
            self.stream: Any = self._device.create_stream(options=core.StreamOptions(nonblocking=True))
            properties = self._device.properties
            self.sms = int(properties.multiprocessor_count)
            self.shared_limit = int(properties.max_shared_memory_per_block_optin)
            self.l2_bytes = int(properties.l2_cache_size)
        self._handle = self.stream.handle
        self.total = int(check(self._driver.cuMemGetInfo(), "cuMemGetInfo", str(self))[1])

    @classmethod
    def open(cls, index: int = 0) -> CudaDevice:
        """Opens GPU ``index``."""
        return cls(index)

    def __str__(self) -> str:
        return f"cuda:{self.index} ({self.name})"

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def activate(self) -> None:
        """Makes the device current in the calling thread; every driver call needs one."""
        check(self._driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent", str(self))

    def free(self) -> int:
        """Bytes that are free on the device now, whoever uses the rest."""
        self.activate()
        return int(check(self._driver.cuMemGetInfo(), "cuMemGetInfo", str(self))[0])

    def synchronize(self) -> None:
        """Waits for all work of the stream. Raises DeviceError for what failed meanwhile, naming the last launch."""
        after = f"{self}; launched last: {self.last_launch}" if self.last_launch else str(self)
        check(self._driver.cuStreamSynchronize(self._handle), "cuStreamSynchronize", after)

    def copy_in(self, array: Array, host: NDArray[Any]) -> None:
        """Copies the host array's bytes to the device in stream order, without waiting.

        ``host`` must be contiguous, of as many bytes, page-locked (a HostBuffer's), and unchanged until the copy ran.
        """
        self._check_bytes(array, host)
        if array.nbytes:
            done = self._driver.cuMemcpyHtoDAsync(array.ptr, host.ctypes.data, array.nbytes, self._handle)
            check(done, "cuMemcpyHtoDAsync", f"{array} from the host")

    def copy_out(self, array: Array, host: NDArray[Any]) -> None:
        """Copies the device array's bytes to the host in stream order, without waiting; ``host`` as for copy_in."""
        self._check_bytes(array, host)
        if not host.flags.writeable:
            raise DeviceError(f"{array} cannot be copied to a read-only host array")
        if array.nbytes:
            done = self._driver.cuMemcpyDtoHAsync(host.ctypes.data, array.ptr, array.nbytes, self._handle)
            check(done, "cuMemcpyDtoHAsync", f"{array} to the host")

    def copy(self, source: Array, target: Array) -> None:
        """Copies between arrays of the device in stream order, without waiting. Bytes must agree and not overlap."""
        if source.nbytes != target.nbytes:
            raise DeviceError(f"{source} ({source.nbytes:,} bytes) cannot be copied to {target} ({target.nbytes:,})")
        if source.nbytes:
            done = self._driver.cuMemcpyDtoDAsync(target.ptr, source.ptr, source.nbytes, self._handle)
            check(done, "cuMemcpyDtoDAsync", f"{source} to {target}")

    def fill(self, array: Array, byte: int) -> None:
        """Sets every byte of the array in stream order, without waiting."""
        if not 0 <= byte <= 255:
            raise DeviceError(f"{byte} is not a byte to fill {array} with")
        if array.nbytes:
            done = self._driver.cuMemsetD8Async(array.ptr, byte, array.nbytes, self._handle)
            check(done, "cuMemsetD8Async", f"{array}")

    def upload(self, array: Array, values: NDArray[Any]) -> None:
        """Writes host values to the device and waits. Floats are rounded to the array's type, integers must fit it.

        bf16 takes floats, or uint16 as raw bits. Raises DeviceError for another shape or kind.
        """
        if tuple(values.shape) != array.shape:
            raise DeviceError(f"values of shape {list(values.shape)} cannot be uploaded to {array}")
        self.copy_in(array, np.ascontiguousarray(_stored(array, values)).reshape(array.shape))
        self.synchronize()

    def download(self, array: Array) -> NDArray[Any]:
        """The array's values, after all work before has finished. bf16 becomes float32."""
        bf16 = array.dtype == "bf16"
        host: NDArray[Any] = np.empty(array.shape, "u2" if bf16 else _NUMPY[array.dtype])
        self.copy_out(array, host)
        self.synchronize()
        return bf16_to_float(host) if bf16 else host

    def adopt(self, item: Closable) -> None:
        """Has ``item`` closed when the device is."""
        if self.closed:
            raise DeviceError(f"{self} is closed")
        self._owned.append(item)

    def release(self, item: Closable) -> None:
        """Forgets an item that closed itself."""
        self._owned = [other for other in self._owned if other is not item]

    def close(self) -> None:
        """Closes what the device handed out, newest first, and its stream. Closing twice is harmless."""
        if self.closed:
            return
        failed: Exception | None = None
        for item in reversed(self._owned):
            try:
                item.close()
            except (
                Exception
            ) as error:  # After a fault of a kernel every call fails; the rest must be closed all the same.
                failed = failed or error
        self._owned = []
        self.closed = True
        self.stream.close()
        if failed is not None:
            raise failed

    def _check_bytes(self, array: Array, host: NDArray[Any]) -> None:
        if self.closed:
            raise DeviceError(f"{self} is closed")
        if host.nbytes != array.nbytes or not host.flags.c_contiguous:
            kind = "a contiguous" if host.flags.c_contiguous else "a non-contiguous"
            raise DeviceError(f"{array} ({array.nbytes:,} bytes) and {kind} host array of {host.nbytes:,} differ")


def float_to_bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def bf16_to_float(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values that uint16 bits stand for, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _stored(array: Array, values: NDArray[Any]) -> NDArray[Any]:
    kind = values.dtype.kind
    if array.dtype == "bf16":
        if values.dtype == np.uint16:
            return values
        if kind == "f":
            return float_to_bf16(values)
    elif array.dtype[0] in "fb":
        if kind == "f":
            return values.astype(_NUMPY[array.dtype], copy=False)
    elif kind in "iu":
        target = np.dtype(_NUMPY[array.dtype])
        limits = np.iinfo(target)
        if values.dtype == target:
            return values
        if not values.size or (int(values.min()) >= limits.min and int(values.max()) <= limits.max):
            return values.astype(target)
        raise DeviceError(f"values {values.min()}..{values.max()} do not fit {array}")
    raise DeviceError(f"{values.dtype} values cannot be uploaded to {array}")
