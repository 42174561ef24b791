"""Reaching NVIDIA's Python packages lazily, and turning the status codes of their calls into DeviceErrors.

Knows nothing of devices, memory or kernels.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import DeviceError

INSTALL = "pip install 'polyhead[cu13]' (or 'polyhead[cu12]' for drivers older than 580)"

_loading = threading.RLock()


def load(module: str) -> Any:
    """Imports a module of NVIDIA's packages, such as ``cuda.bindings.driver``.

    Raises DeviceError with the ``pip install`` line where it is missing or cannot be loaded.
    """
    try:
        # cuda.core replaces its own import state while it loads, which defeats Python's lock: a second thread would get
        # it half loaded.
        with _loading:
            return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        why = "is not installed" if missing else f"cannot be loaded: {error}"
        raise DeviceError(f"the CUDA runtime needs the Python module {module}, which {why}. Run: {INSTALL}") from error


def api() -> Any:
    """``cuda.bindings.driver``, the CUDA driver's functions."""
    return load("cuda.bindings.driver")


def check(result: tuple[Any, ...], call: str, context: str = "") -> Any:
    """The values of a call of cuda.bindings: ``result`` is its status followed by what it returns.

    One value comes back bare, several as a tuple, none as None. Raises DeviceError naming the call, the error, what it
    means and ``context`` (the kernel, the sizes).
    """
    status, *values = result
    if int(status) == 0:
        return tuple(values) if len(values) > 1 else (values[0] if values else None)
    where = f" ({context})" if context else ""
    raise DeviceError(f"{call} failed{where}: {describe(status)}")


def describe(status: Any) -> str:
    """A status code for a reader: its name and, for the driver's, what it means."""
    name = str(getattr(status, "name", status))
    if type(status).__name__ == "CUresult":
        error, text = api().cuGetErrorString(status)
        if int(error) == 0 and text:
            return f"{name}, {text.decode(errors='replace')}"
    return name


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turns the exceptions of NVIDIA's packages into a DeviceError that begins with ``doing``."""
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        theirs = type(error).__module__.startswith(("cuda.", "nvmath."))
        if not theirs and not isinstance(error, RuntimeError | OSError):
            raise
        raise DeviceError(f"{doing}: {' '.join(str(error).split()) or type(error).__name__}") from error
