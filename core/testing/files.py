"""Tiny GGUF files: the model of a case with random weights, in any type that the gguf package can quantise to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .case import Case

if TYPE_CHECKING:
    from ..plugins import Registry

F32 = NDArray[np.float32]
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
"""What ``general.file_type`` says of a file whose matrices have this type."""


def make_model(
    path: str | os.PathLike[str], plugin: ModuleType | str | Registry, case: Case, quant: str | None = None
) -> None:
    """Writes the case's model with random weights to ``path``: a GGUF file that ``polyhead run`` takes.

    ``plugin`` is the module with the hookimpls, its import name, or a registry. ``quant`` (None: F32) is the type of
    every matrix whose rows it divides: F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0. Raises PluginError for a plugin that
    does not load, ConfigError or TensorError for a case it refuses.
    """
    from .subject import Subject

    subject = Subject(plugin, case)
    variant = subject.variants[0]
    subject.check(variant)
    write_model(path, case, variant.weights, types_for(variant.weights, variant.plain, quant or "F32"))


def types_for(weights: Mapping[str, F32], plain: frozenset[str], quant: str) -> dict[str, str]:
    """The type of each tensor: ``quant`` for matrices whose rows it divides, but for those named in ``plain``."""
    if quant not in FILE_TYPES:
        raise ConfigError(f"quant is {quant!r}, expected one of {', '.join(FILE_TYPES)}")
    block = 1 if quant in ("F32", "F16", "BF16") else 32
    fits = {name for name, array in weights.items() if array.ndim > 1 and array.shape[-1] % block == 0}
    return {name: quant if name in fits - plain else "F32" for name in weights}


def write_model(
    path: str | os.PathLike[str], case: Case, weights: Mapping[str, F32], types: Mapping[str, str]
) -> dict[str, F32]:
    """Writes the file and returns the weights as it holds them, dequantised by the gguf package."""
    import gguf  # slow to import

    writer = gguf.GGUFWriter(path, case.architecture)
    kinds = [FILE_TYPES[kind] for kind in types.values()]
    for key, value in {**case.values(), "general.file_type": max(kinds, key=bool)}.items():
        if key != "general.architecture":
            getattr(writer, _method(value))(key, value)
    held: dict[str, F32] = {}
    for name, array in weights.items():
        kind = gguf.GGMLQuantizationType[types[name]]
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        held[name] = np.asarray(gguf.quants.dequantize(data, kind), np.float32).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _method(value: Any) -> str:
    """The method of the writer that stores a value, in the types that converters use."""
    if isinstance(value, bool):
        return "add_bool"
    if isinstance(value, str):
        return "add_string"
    if isinstance(value, float):
        return "add_float32"
    if isinstance(value, list):
        return "add_array"
    if 0 <= value < 1 << 32:
        return "add_uint32"
    return "add_uint64" if value > 0 else "add_int64"
