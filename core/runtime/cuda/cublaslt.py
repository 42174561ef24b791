"""Loading ``nvmath.bindings.cublasLt`` alone.

``import nvmath`` runs its ``__init__``, which imports FFT, solvers, device functions and more: about a second. The
bindings of cublasLt need none of it: a compiled module with two helpers, 0.1 s. So the two packages above it are stood
in for by empty ones with the right search path while it is imported, and taken away again: a later ``import nvmath`` by
anybody works as usual and finds this very module.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import types
from typing import Any

from ...errors import DeviceError
from .driver import INSTALL, load

_NAME = "nvmath.bindings.cublasLt"
_lock = threading.Lock()


def cublaslt() -> Any:
    """The bindings of cublasLt. Raises DeviceError with the ``pip install`` line where nvmath-python is missing."""
    with _lock:
        module = sys.modules.get(_NAME)
        if module is not None:
            return module
        if "nvmath" in sys.modules:
            return load(_NAME)
        spec = importlib.util.find_spec("nvmath")
        if spec is None or not spec.submodule_search_locations:
            raise DeviceError(f"the CUDA runtime needs nvmath-python, which is not installed. Run: {INSTALL}")
        folder = next(iter(spec.submodule_search_locations))
        stood_in = {"nvmath": folder, "nvmath.bindings": os.path.join(folder, "bindings")}
        for name, path in stood_in.items():
            package = types.ModuleType(name)
            package.__path__ = [path]
            sys.modules[name] = package
        try:
            return importlib.import_module(_NAME)
        except ImportError:
            pass  # An nvmath whose bindings need more; the slow way below says so or works.
        finally:
            for name in stood_in:
                del sys.modules[name]
        for name in [name for name in sys.modules if name.startswith("nvmath.")]:
            del sys.modules[name]
        return load(_NAME)
