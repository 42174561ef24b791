"""Layers of plugins on a GPU: what a module is given when it is loaded and when it runs, and who answers for errors.

The protocols are those of ../modules.py. Knows nothing of what a module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ...arch import Module
from ...errors import DeviceError, PluginError, PolyheadError, summary
from ..modules import CudaModule, DeviceArray, DeviceMatrix, ModuleKind, is_matrix
from ..program import Apply, Program
from .blas import Blas
from .context import Context
from .formats import Matrix, QuantMatrix
from .memory import Array
from .ops import rows
from .ops.linear import linear
from .plan import narrow_bytes

Kinds = Mapping[type[Module], ModuleKind]
_NO_MACROS: Mapping[str, object] = MappingProxyType({})


def kinds_of(program: Program, kinds: Kinds) -> list[tuple[Apply, ModuleKind]]:
    """The implementation of each module, before anything is loaded. Raises PluginError for one without."""
    found = []
    for step in program.steps:
        if not isinstance(step, Apply):
            continue
        name, kind = type(step.module).__name__, kinds.get(type(step.module))
        if kind is None:
            raise PluginError(
                f"{step.name} is a {name}, for which no plugin registers a ModuleKind, so there is no CUDA code either"
            )
        if kind.cuda is None:
            raise PluginError(f"{step.name} is a {name}, which has no CUDA implementation; set device: cpu")
        found.append((step, kind))
    return found


@dataclass(frozen=True, slots=True)
class Stack:
    """A module's matrix, or ``count`` of them one after the other in ``whole``. Owns nothing."""

    whole: Matrix
    count: int

    @property
    def kind(self) -> str:
        """A GGML type, or f16 or bf16."""
        return self.whole.kind if isinstance(self.whole, QuantMatrix) else self.whole.data.dtype

    @property
    def rows(self) -> int:
        """Output features of one."""
        return self.whole.rows // self.count

    @property
    def cols(self) -> int:
        """Input features."""
        return self.whole.cols

    @property
    def data(self) -> Array:
        """Tiles, or rows."""
        return self.whole.data

    @property
    def item_bytes(self) -> int:
        """From one matrix to the next."""
        return self.whole.data.nbytes // self.count

    @property
    def tile_bytes(self) -> int:
        """From 16 rows to the next."""
        return self.whole.data.shape[1] if isinstance(self.whole, QuantMatrix) else 32 * self.cols

    @property
    def macros(self) -> Mapping[str, object]:
        """What formats.cuh is compiled with; nothing for a dense matrix."""
        return self.whole.format.macros() if isinstance(self.whole, QuantMatrix) else {}


class Setup:
    """What a module is given at load. Errors name what the plugin asked for."""

    def __init__(
        self, ctx: Context, step: Apply, plugin: str, named: Callable[[str], Array | Matrix], act: str
    ) -> None:
        self.hidden = step.src.columns
        self.act = act
        self.sms = ctx.device.sms
        self.cc: tuple[int, int] = ctx.device.cc
        self._ctx, self._plugin, self._named = ctx, plugin, named
        self._specs = {spec.name: spec for spec in step.module.tensors(self.hidden)}

    def source(self, name: str, text: str) -> str:
        if "/" in name or not name.endswith((".cu", ".cuh")):
            raise DeviceError(f"{name!r} is no name for CUDA source: it ends in .cu or .cuh and has no slash")
        file = f"{self._plugin}/{name}"
        self._ctx.compiler.add_source(file, text)
        return file

    def compile(self, file: str, kernel: str, macros: Mapping[str, object] = _NO_MACROS) -> None:
        self._ctx.prepare(file, kernel, with_act(macros, self.act))

    def matrix(self, tensor: str) -> Stack:
        self._expect(tensor, matrix=True)
        found = self._named(tensor)
        assert not isinstance(found, Array)
        shape = self._specs[tensor].shape
        return Stack(found, shape[0] if len(shape) == 3 else 1)

    def vector(self, tensor: str) -> Array:
        self._expect(tensor, matrix=False)
        found = self._named(tensor)
        assert isinstance(found, Array)
        return found

    def _expect(self, tensor: str, matrix: bool) -> None:
        spec = self._specs.get(tensor)
        if spec is None:
            raise DeviceError(f"the module does not list the tensor {tensor}; it lists {', '.join(self._specs)}")
        if is_matrix(spec) != matrix:
            right = "matrix" if is_matrix(spec) else "vector"
            raise DeviceError(f"{tensor} {list(spec.shape)} is to be had by setup.{right}")


class Worker:
    """Launches and products for modules, on the model's stream. ``scratch`` is for unpacked weights."""

    def __init__(self, ctx: Context, blas: Blas, scratch: Array, act: str, invariant: bool) -> None:
        self.scratch = scratch
        self._ctx, self._blas, self._act, self._invariant = ctx, blas, act, invariant

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
        self._ctx.launch(file, kernel, grid, block, *args, shared=shared, macros=with_act(macros, self._act))

    def linear(
        self,
        x: DeviceArray,
        matrix: DeviceMatrix,
        out: DeviceArray,
        column: int = 0,
        *,
        bias: DeviceArray | None = None,
        accumulate: bool = False,
        scale: float = 1.0,
    ) -> None:
        if not isinstance(matrix, Stack) or matrix.count != 1:
            raise DeviceError(f"linear takes one matrix of setup.matrix, not {_described(matrix)}")
        linear(
            self._ctx,
            self._blas,
            _own("x", x),
            matrix.whole,
            _own("out", out),
            column,
            self.scratch,
            bias=None if bias is None else _own("bias", bias),
            accumulate=accumulate,
            scale=float(scale),
            invariant=self._invariant,
        )


class Modules:
    """The modules of a program, loaded. ``apply`` carries out a step."""

    def __init__(
        self,
        ctx: Context,
        blas: Blas,
        scratch: Array,
        found: Sequence[tuple[Apply, ModuleKind]],
        named: Callable[[str], Array | Matrix],
        act: str,
        invariant: bool,
    ) -> None:
        self._ctx, self._act, self._scratch = ctx, act, scratch
        self._worker = Worker(ctx, blas, scratch, act, invariant)
        self._loaded: dict[str, CudaModule] = {}
        for step, kind in found:
            assert kind.cuda is not None
            setup = Setup(ctx, step, plugin_of(kind), named, act)
            with _blamed(step, "failed to load"):
                self._loaded[step.name] = kind.cuda(step.module, setup)

    def apply(self, step: Apply, x: Array, out: Array, scratch: Mapping[str, Array]) -> None:
        """out = module(x). Raises PluginError or DeviceError that names the step, its module and its plugin."""
        self._worker.scratch = self._scratch
        if x.dtype != self._act:  # a block without a norm before it
            narrow = self._scratch.view(self._act, *x.shape)
            rows.convert(self._ctx, x, narrow)
            taken = narrow_bytes(*x.shape)
            self._worker.scratch = self._scratch.at(taken, "u8", self._scratch.nbytes - taken)
            x = narrow
        with _blamed(step, "failed"):
            returned: object = self._loaded[step.name](x, out, scratch, self._worker)
            if returned is not None:
                raise PluginError(
                    f"it returned {type(returned).__name__}; it must write its result to out and return nothing"
                )


def plugin_of(kind: ModuleKind) -> str:
    """The import name of the package that a module comes from."""
    return kind.spec.__module__.partition(".")[0]


def with_act(macros: Mapping[str, object], act: str) -> Mapping[str, object]:
    """Macros that also say what activations are."""
    return {**macros, "PH_ACT_BF16": True} if act == "bf16" else dict(macros)  # theirs may change; see Context.launch


@contextmanager
def _blamed(step: Apply, what: str) -> Iterator[None]:
    module = type(step.module)
    who = f"{step.name}: module {module.__name__} of {module.__module__.partition('.')[0]} {what}"
    try:
        yield
    except PolyheadError as error:
        raise type(error)(f"{who}: {error}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{who}: {summary(error)}") from error


def _own(name: str, array: object) -> Array:
    if not isinstance(array, Array):
        raise DeviceError(f"linear: {name} is {type(array).__name__}, not an array of the GPU's")
    return array


def _described(matrix: object) -> str:
    return f"a stack of {matrix.count}" if isinstance(matrix, Stack) else type(matrix).__name__
