"""Which kernels there are, in which specialisations: what continuous integration compiles and ``doctor`` reports.

Every module of ``ops`` that launches kernels lists them as ``VARIANTS: tuple[Variant, ...]``, with the macro values
that matter: each branch of the source at least once, and the shapes of real models for those marked hot. A test holds
that no ``.cu`` file is left out. Knows nothing of compiling.
"""

from __future__ import annotations

import importlib
import importlib.resources
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of a source file: ``kernels`` are the ``extern "C"`` names that it must hold.

    A ``hot`` one runs for every token, so more than ``spills`` bytes of spilled registers in it are an error.
    """

    file: str
    kernels: tuple[str, ...]
    macros: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    hot: bool = False
    spills: int = 0

    def __str__(self) -> str:
        return " ".join([self.file, *(f"{name}={value}" for name, value in sorted(self.macros.items()))])


def variants() -> list[Variant]:
    """All that the modules of ``ops`` list, in the order of their names."""
    package = f"{__package__}.ops"
    try:
        folder = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return []
    found: list[Variant] = []
    for module in sorted(pkgutil.iter_modules(folder.__path__), key=lambda module: module.name):
        found.extend(getattr(importlib.import_module(f"{package}.{module.name}"), "VARIANTS", ()))
    return found


def kernel_files() -> list[str]:
    """The names of all ``.cu`` files."""
    folder = importlib.resources.files(__package__) / "kernels"
    return sorted(item.name for item in folder.iterdir() if item.name.endswith(".cu"))
