"""Weights on the GPU: what arrives from the file through staging.py is repacked or converted into its place.

Quantised matrices stay quantised (formats.py); dense ones take the activations' type; norms, biases and other vectors
are float32. Values do not change, but for dense matrices that are rounded to the activations' type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ...arch import Embedding
from ..contract import WeightInfo, WeightSource
from ..modules import matrix_specs
from ..program import Apply, Embed, Program, Project, Step
from .context import Context
from .formats import DENSE_TYPES, TILE_ROWS, DenseMatrix, Matrix, QuantMatrix, flat_shape, matrix_bytes, raw_bytes
from .memory import ALIGNMENT, DTYPES, Array, Pool
from .ops import rows
from .ops.repack import repack
from .staging import STAGE, Cargo, Piece, Progress, Whole, stored, upload

STAGING_BYTES = 3 * STAGE
"""Device memory that loading takes beside the weights: what arrives, and float32 of as many 16-bit values."""

_DENSE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def matrix_names(program: Program) -> set[str]:
    """Tensors that are used as matrices: by a projection, as the embedding, or by a module."""
    names = {step.table.weight for step in program.steps if isinstance(step, Embed)}
    for step in program.steps:
        if isinstance(step, Project):
            names |= {weight.weight for weight in step.weights}
        elif isinstance(step, Apply):
            names |= {spec.name for spec in matrix_specs(step.module, step.src.columns)}
    return names


def resident_bytes(program: Program, types: Callable[[str], str]) -> int:
    """Bytes the weights take on the device. ``types`` tells a tensor's stored type."""
    matrices = matrix_names(program)
    shapes = {spec.name: spec.shape for spec in program.decoder.tensors()}
    total = 0
    for name, shape in shapes.items():
        size = matrix_bytes(types(name), *flat_shape(types(name), shape)) if name in matrices else 4 * math.prod(shape)
        total += -(-size // ALIGNMENT) * ALIGNMENT
    return total


@dataclass(frozen=True, slots=True)
class Part:
    """Columns of a projection's output that one launch computes, from ``column`` on, and their bias."""

    column: int
    matrix: Matrix
    bias: Array | None


class CudaWeights:
    """A program's weights: ``parts`` for projections, ``table`` for the embedding, ``vector`` for the rest.

    Matrices that are used together and stored alike lie one after the other, so that one launch serves them.
    """

    def __init__(
        self, ctx: Context, pool: Pool, program: Program, source: WeightSource, act: str, progress: Progress | None
    ) -> None:
        self._ctx, self._act = ctx, act
        self._matrices: dict[str, Matrix] = {}
        self._vectors: dict[str, Array] = {}
        self._parts: dict[str, tuple[Part, ...]] = {}
        self._stacked: dict[tuple[str, ...], Matrix] = {}
        pool.reserve(resident_bytes(program, lambda name: source.tensors[name].type))
        stacks = [run for step in program.steps for run in _stacks(step, source)]
        for run in stacks:
            self._reserve(pool, run, source)
        cargoes = []
        for name, shape in {spec.name: spec.shape for spec in program.decoder.tensors()}.items():
            if name not in self._matrices:
                self._vectors[name] = pool.array(shape, "f32")
            cargoes.append(self._cargo(source, name))
        with Pool(ctx.device, "conversion") as extra:
            wide = cache(lambda: extra.array(2 * STAGE, "u8"))
            upload(ctx.device, cargoes, lambda piece, block: self._place(piece, block, source, wide), progress)

        for step in program.steps:
            if isinstance(step, Project):
                self._parts[step.name] = tuple(self._join(pool, step, source))

    def table(self, embedding: Embedding) -> Matrix:
        """The token embedding."""
        return self._matrices[embedding.weight]

    def parts(self, step: Project) -> tuple[Part, ...]:
        """What to launch for a projection."""
        return self._parts[step.name]

    def vector(self, name: str | None) -> Array | None:
        """A vector, or a learned table of positions, by tensor name; None for None."""
        return None if name is None else self._vectors[name]

    def named(self, name: str) -> Array | Matrix:
        """A tensor by name, however it is kept; a stack of matrices as one."""
        return self._matrices[name] if name in self._matrices else self._vectors[name]

    def _reserve(self, pool: Pool, names: Sequence[str], source: WeightSource) -> None:
        """Makes room for matrices that lie one after the other, unless they have it already (a tied head)."""
        if names[0] in self._matrices:
            return
        infos = [_flat(source.tensors[name]) for name in names]
        whole: Matrix = _make(pool, infos[0].type, sum(info.shape[0] for info in infos), infos[0].shape[1], self._act)
        start = 0
        for name, info in zip(names, infos, strict=True):
            self._matrices[name] = whole.slice_rows(start, start + info.shape[0])
            start += info.shape[0]
        self._stacked[tuple(names)] = whole

    def _join(self, pool: Pool, step: Project, source: WeightSource) -> Iterator[Part]:
        """The launches of a projection, with the biases of stacked matrices stacked alike."""
        sizes = {weight.weight: rows for weight, rows in zip(step.weights, step.rows, strict=True)}
        biases = {weight.weight: getattr(weight, "bias", None) for weight in step.weights}
        column = 0
        for names in _stacks(step, source):
            found = [self._vectors[bias] if (bias := biases[name]) is not None else None for name in names]
            stack = found[0]
            if len(names) > 1 and any(part is not None for part in found):
                stack = pool.array(sum(sizes[name] for name in names), "f32", zero=True)
                at = 0
                for name, part in zip(names, found, strict=True):
                    if part is not None:
                        self._ctx.device.copy(part, stack.slice_rows(at, at + sizes[name]))
                    at += sizes[name]
            yield Part(column, self._stacked[tuple(names)], stack)
            column += sum(sizes[name] for name in names)

    def _cargo(self, source: WeightSource, name: str) -> Cargo:
        """How a tensor travels: quantised matrices in whole tiles, others number by number."""
        info, matrix = source.tensors[name], self._matrices.get(name)
        if isinstance(matrix, QuantMatrix):
            row = raw_bytes(info.type, 1, matrix.cols)
            return Cargo(name, matrix.rows, row, info.nbytes, stored(source, name), TILE_ROWS)
        numbers = math.prod(info.shape)
        if info.type in _DENSE:
            return Cargo(name, numbers, DTYPES[_DENSE[info.type]], info.nbytes, stored(source, name))
        values = Whole(lambda: source.dequantise(name).reshape(-1).view(np.uint8), 4 * numbers)
        return Cargo(name, numbers, 4, info.nbytes, values)

    def _place(self, piece: Piece, block: Array, source: WeightSource, wide: Callable[[], Array]) -> None:
        """Enqueues what brings a piece that has arrived into its place. ``wide`` is room for it as float32."""
        name, start, stop = piece.cargo.name, piece.start, piece.stop
        kind, matrix = source.tensors[name].type, self._matrices.get(name)
        if isinstance(matrix, QuantMatrix):
            repack(self._ctx, kind, block, matrix.slice_rows(start, stop))
            return
        whole = self._vectors[name] if matrix is None else matrix.data
        target = whole.reshape(whole.size).slice_rows(start, stop)
        values = block.view(_DENSE.get(kind, "f32"), stop - start)
        if values.dtype == target.dtype:
            self._ctx.device.copy(values, target)
            return
        if "f32" not in (values.dtype, target.dtype):  # float16 and bfloat16 meet in float32, which holds both
            between = wide().view("f32", stop - start)
            rows.convert(self._ctx, values, between)
            values = between
        rows.convert(self._ctx, values, target)


def _stacks(step: Step, source: WeightSource) -> list[tuple[str, ...]]:
    """The matrices of a step in runs that can lie one after the other: alike in type and ending at a tile's end."""
    if isinstance(step, Embed):
        return [(step.table.weight,)]
    if isinstance(step, Apply):
        return [(spec.name,) for spec in matrix_specs(step.module, step.src.columns)]
    if not isinstance(step, Project):
        return []
    runs: list[list[str]] = []
    for name in (weight.weight for weight in step.weights):
        kind = source.tensors[name].type
        last = source.tensors[runs[-1][-1]] if runs else None
        both_dense = last is not None and kind in DENSE_TYPES and last.type in DENSE_TYPES
        alike = last is not None and kind == last.type and last.shape[0] % TILE_ROWS == 0
        if both_dense or alike:
            runs[-1].append(name)
        else:
            runs.append([name])
    return [tuple(run) for run in runs]


@dataclass(frozen=True, slots=True)
class _Flat:
    """A stack of matrices as one: they lie one after the other in the file too."""

    shape: tuple[int, ...]
    type: str
    nbytes: int


def _flat(info: WeightInfo) -> WeightInfo:
    return info if len(info.shape) == 2 else _Flat(flat_shape(info.type, info.shape), info.type, info.nbytes)


def _make(pool: Pool, kind: str, rows: int, cols: int, act: str) -> Matrix:
    if kind in DENSE_TYPES:
        return DenseMatrix(pool.array((rows, cols), act))
    return QuantMatrix(kind, rows, cols, pool.array(QuantMatrix.shape_of(kind, rows, cols), "u8"))
