"""The part of the suite about a plugin's own CUDA source, for machines without a GPU: a dry run that only compiles.

A module is loaded and called as on a GPU, with arrays that have shapes and no memory; what it launches is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from ..arch import Module, TensorSpec
from ..errors import DeviceError, PluginError, summary
from ..runtime.modules import ModuleKind, is_matrix
from .base import Base, fail

_SM = "sm_80"
_ROWS = (1, 5, 40)
_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "u8": 1, "i8": 1}
_TYPES = ("F16", "Q8_0")
_NO_MACROS: Mapping[str, object] = {}
Wanted = dict[tuple[str, str, tuple[tuple[str, object], ...]], None]


class KernelTests(Base):
    """What ``ModuleKind.cuda`` compiles and launches. It says nothing of results: the tests named cuda do."""

    def test_kernels_of_its_own_compile(self) -> None:
        """Loading and calling the layers on a GPU raises nothing, and what they launch compiles with NVRTC."""
        subject, variant = self.subject(), self.first()
        kinds, wanted = subject.registry.module_kinds(), Wanted()
        sources: dict[str, str] = {}
        for index, block in enumerate(variant.decoder.blocks):
            kind = kinds.get(type(block.mlp)) if isinstance(block.mlp, Module) else None
            if kind is None or kind.cuda is None or not isinstance(block.mlp, Module):
                continue
            for act, type_ in (("f16", _TYPES[0]), ("bf16", _TYPES[0]), ("f16", _TYPES[1])):
                setup = _Setup(block.mlp, kind, variant.decoder.hidden, act, type_, wanted, sources)
                where = (
                    f"blocks[{index}].mlp, a {type(block.mlp).__name__}, with matrices of {type_} and {act} activations"
                )
                try:
                    _dry_run(block.mlp, kind, setup)
                except Exception as error:
                    fail(f"{where}, does not run on a GPU: {summary(error)}")
        if wanted:
            _compile(wanted, sources)


def _dry_run(module: Module, kind: ModuleKind, setup: _Setup) -> None:
    assert kind.cuda is not None
    run: Callable[..., object] = kind.cuda(module, setup)
    for rows in _ROWS:
        scratch = {name: _Array((rows, size), "f32") for name, size in module.scratch(setup.hidden).items()}
        shape = (rows, setup.hidden)
        returned = run(_Array(shape, setup.act), _Array(shape, "f32"), scratch, _Gpu(setup))
        if returned is not None:
            raise PluginError(f"it returned {type(returned).__name__}; it must write its result to out")


def _compile(wanted: Wanted, sources: Mapping[str, str]) -> None:
    from ..runtime.cuda.compile_all import find_toolkit
    from ..runtime.cuda.compiler import Compiler

    compiler = Compiler(_SM)
    try:
        find_toolkit()
        compiler.start()
    except DeviceError as error:
        pytest.skip(f"kernels cannot be compiled here: {error}")
    for file, text in sources.items():
        compiler.add_source(file, text)
    for file, kernel, macros in wanted:
        try:
            code = compiler.compile(file, dict(macros)).code
        except DeviceError as error:
            fail(str(error))
        if f".text.{kernel}\0".encode() not in code:
            fail(f'{file} has no kernel {kernel}: is it extern "C" __global__, and of that name?')


@dataclass(frozen=True)
class _Array:
    """A DeviceArray without memory."""

    shape: tuple[int, ...]
    dtype: str
    ptr: int = 0

    def slice_rows(self, start: int, stop: int) -> _Array:
        if not 0 <= start <= stop <= self.shape[0]:
            raise DeviceError(f"rows {start} to {stop} of an array {list(self.shape)}")
        return replace(self, shape=(stop - start, *self.shape[1:]))

    def view(self, dtype: str, *shape: int) -> _Array:
        if math.prod(shape) * _BYTES[dtype] > math.prod(self.shape) * _BYTES[self.dtype]:
            raise DeviceError(f"{dtype} {list(shape)} is more than the array {self.dtype} {list(self.shape)} holds")
        return _Array(shape, dtype)


@dataclass(frozen=True)
class _Matrix:
    """A DeviceMatrix, dense or in tiles of a quantised type."""

    kind: str
    count: int
    rows: int
    cols: int
    tile_bytes: int
    macros: Mapping[str, object] = field(default_factory=dict)

    @property
    def item_bytes(self) -> int:
        return -(-self.rows // 16) * self.tile_bytes

    @property
    def data(self) -> _Array:
        return _Array((self.count, self.item_bytes), "u8")


class _Setup:
    """A CudaSetup that writes down what is to be compiled."""

    sms, cc = 108, (8, 0)

    def __init__(
        self,
        module: Module,
        kind: ModuleKind,
        hidden: int,
        act: str,
        type_: str,
        wanted: Wanted,
        sources: dict[str, str],
    ) -> None:
        self.hidden, self.act = hidden, act
        self._type, self._wanted, self._sources = type_, wanted, sources
        self._plugin = kind.spec.__module__.partition(".")[0]
        self._specs = {spec.name: spec for spec in module.tensors(hidden)}

    def source(self, name: str, text: str) -> str:
        file = f"{self._plugin}/{name}"
        if "/" in name or not name.endswith((".cu", ".cuh")) or self._sources.setdefault(file, text) != text:
            raise DeviceError(f"{name!r} is no name for CUDA source, or that of another text")
        return file

    def compile(self, file: str, kernel: str, macros: Mapping[str, object] = _NO_MACROS) -> None:
        own = {**macros, "PH_ACT_BF16": True} if self.act == "bf16" else macros
        self._wanted[file, kernel, tuple(own.items())] = None

    def matrix(self, tensor: str) -> _Matrix:
        from ..runtime.cuda.formats import FORMATS

        spec = self._find(tensor, True)
        count, (rows, cols) = (spec.shape[0] if len(spec.shape) == 3 else 1), spec.shape[-2:]
        format_ = FORMATS.get(self._type)
        if format_ is None or cols % format_.raw.weights:
            return _Matrix(self.act, count, rows, cols, 32 * cols)
        return _Matrix(self._type, count, rows, cols, format_.tile_bytes(cols), format_.macros())

    def vector(self, tensor: str) -> _Array:
        return _Array(self._find(tensor, False).shape, "f32")

    def _find(self, tensor: str, matrix: bool) -> TensorSpec:
        spec = self._specs.get(tensor)
        if spec is None or is_matrix(spec) != matrix:
            kind = "matrix" if matrix else "vector"
            raise DeviceError(f"the module's tensors() lists no {kind} {tensor}")
        return spec


class _Gpu:
    """A Gpu that launches nothing."""

    def __init__(self, setup: _Setup) -> None:
        self._setup = setup

    def launch(
        self,
        file: str,
        kernel: str,
        grid: tuple[int, int, int] | int,
        block: int,
        *args: Any,
        shared: int = 0,
        macros: Mapping[str, object] = _NO_MACROS,
    ) -> None:
        if min(grid if isinstance(grid, tuple) else (grid,)) < 1 or not 1 <= block <= 1024:
            raise DeviceError(f"{kernel} is launched with grid {grid} and {block} threads")
        self._setup.compile(file, kernel, macros)

    def linear(self, x: Any, matrix: Any, out: Any, column: int = 0, **options: Any) -> None:
        if matrix.count != 1 or x.shape[-1] != matrix.cols or column + matrix.rows > out.shape[-1]:
            raise DeviceError(f"linear of x {list(x.shape)}, {matrix} and out {list(out.shape)} from column {column}")
