"""Which GPUs there are, asked of the driver alone: no NVIDIA package is needed, and without a driver it costs nothing.

Knows nothing of how a device is used. Calls ``cuInit``, which must not happen before a process forks.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from ...errors import DeviceError

#: The oldest compute capability that NVRTC 13 compiles for (Turing).
MINIMUM_CC = (7, 5)

_CC_MAJOR, _CC_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A GPU as the driver lists it. ``total`` is its memory in bytes."""

    index: int
    name: str
    cc: tuple[int, int]
    total: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What the driver says. ``driver`` is the newest CUDA it supports, such as (13, 0); ``problem`` why no GPU is."""

    devices: tuple[DeviceInfo, ...] = ()
    driver: tuple[int, int] | None = None
    problem: str | None = None


def probe() -> Probe:
    """Asks the driver. Never raises: without driver or GPU, ``problem`` says so in a sentence without a stop."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Probe(problem=f"no NVIDIA driver is installed ({library} was not found)")
    number = ctypes.c_int(0)
    driver = None
    if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
        driver = (number.value // 1000, number.value % 1000 // 10)
    status = cuda.cuInit(0)
    if status == 100:
        return Probe(driver=driver, problem="the NVIDIA driver finds no GPU (is CUDA_VISIBLE_DEVICES set?)")
    if status:
        return Probe(driver=driver, problem=f"the NVIDIA driver does not start: cuInit says {_error(cuda, status)}")
    if status := cuda.cuDeviceGetCount(ctypes.byref(number)):
        return Probe(driver=driver, problem=f"cuDeviceGetCount says {_error(cuda, status)}")
    devices = tuple(_device(cuda, index) for index in range(number.value))
    return Probe(devices, driver, None if devices else "the NVIDIA driver finds no GPU")


def device_count() -> int:
    """How many GPUs the driver lists; 0 without a driver."""
    return len(probe().devices)


def require_device(index: int) -> DeviceInfo:
    """GPU ``index``. Raises DeviceError: no driver, no GPU, no such index, or one that is too old."""
    found = probe()
    if found.problem:
        raise DeviceError(f"device cuda:{index} cannot be used: {found.problem}. device: cpu works everywhere")
    if not 0 <= index < len(found.devices):
        names = ", ".join(f"cuda:{info.index} ({info.name})" for info in found.devices)
        raise DeviceError(f"there is no device cuda:{index}; the driver lists {len(found.devices)}: {names}")
    info = found.devices[index]
    if info.cc < MINIMUM_CC:
        raise DeviceError(
            f"cuda:{index} ({info.name}) has compute capability {info.cc[0]}.{info.cc[1]}; "
            f"polyhead needs {MINIMUM_CC[0]}.{MINIMUM_CC[1]} (Turing) or newer. device: cpu works everywhere"
        )
    return info


def _device(cuda: ctypes.CDLL, index: int) -> DeviceInfo:
    handle, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name, total = ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), handle)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _CC_MAJOR, handle)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CC_MINOR, handle)
    return DeviceInfo(index, name.value.decode(errors="replace"), (major.value, minor.value), total.value)


def _error(cuda: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    if cuda.cuGetErrorString(status, ctypes.byref(text)) == 0 and text.value:
        return f"error {status}, {text.value.decode(errors='replace')}"
    return f"error {status}"
