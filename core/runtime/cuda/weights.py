"""Weights on the GPU: read from the file into page-locked staging, copied while the next part is read, repacked there.

Quantised matrices stay quantised (formats.py); dense ones take the activations' type; norms, biases and other vectors
are float32. Values do not change, but for F32 and BF16 matrices that are rounded to float16 activations.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arch import Embedding
from ..contract import WeightInfo, WeightSource
from ..program import Embed, Program, Project, Step
from .context import Context
from .device import float_to_bf16
from .formats import DENSE_TYPES, TILE_ROWS, DenseMatrix, Matrix, QuantMatrix, matrix_bytes, raw_bytes
from .memory import ALIGNMENT, Array, HostBuffer, Pool
from .ops.repack import repack

STAGE = 32 << 20
_STAGES = 3
_READERS = 6
Progress = Callable[[int, int], None]


def matrix_names(program: Program) -> set[str]:
    """Tensors that are used as matrices: by a projection, or as the embedding."""
    names = {step.table.weight for step in program.steps if isinstance(step, Embed)}
    for step in program.steps:
        if isinstance(step, Project):
            names |= {weight.weight for weight in step.weights}
    return names


def resident_bytes(program: Program, types: Callable[[str], str]) -> int:
    """Bytes the weights take on the device. ``types`` tells a tensor's stored type."""
    matrices = matrix_names(program)
    shapes = {spec.name: spec.shape for spec in program.decoder.tensors()}
    total = 0
    for name, shape in shapes.items():
        size = matrix_bytes(types(name), *shape) if name in matrices else 4 * math.prod(shape)
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
        stacks = [run for step in program.steps for run in _stacks(step, source)]
        for run in stacks:
            self._reserve(pool, run, source)
        specs = {spec.name: spec for spec in program.decoder.tensors()}
        total = sum(source.tensors[name].nbytes for name in specs)
        done = 0
        with _Stages(ctx) as stages:
            for spec in specs.values():
                info = source.tensors[spec.name]
                if spec.name in self._matrices:
                    self._fill(self._matrices[spec.name], stages, source, spec.name, info)
                else:
                    array = pool.array(spec.shape, "f32")
                    ctx.device.upload(array, source.dequantise(spec.name))
                    self._vectors[spec.name] = array
                done += info.nbytes
                if progress is not None:
                    progress(done, total)

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

    def _reserve(self, pool: Pool, names: Sequence[str], source: WeightSource) -> None:
        """Makes room for matrices that lie one after the other, unless they have it already (a tied head)."""
        if names[0] in self._matrices:
            return
        infos = [source.tensors[name] for name in names]
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

    def _fill(self, matrix: Matrix, stages: _Stages, source: WeightSource, name: str, info: WeightInfo) -> None:
        rows, cols = info.shape
        if isinstance(matrix, DenseMatrix):
            read = self._dense_reader(source, name, info)
            for start, stop in _row_chunks(rows, 2 * cols, 1):
                goal = matrix.data.slice_rows(start, stop).view("u8", (stop - start) * cols * 2)
                stages.send(read, start, stop, goal)
            return
        row_bytes = raw_bytes(info.type, 1, cols)
        raw = source.data(name).reshape(rows, row_bytes)
        for start, stop in _row_chunks(rows, row_bytes, TILE_ROWS):
            block = stages.send(lambda a, b, out: np.copyto(out, raw[a:b].reshape(-1)), start, stop, None, row_bytes)
            repack(self._ctx, info.type, block, matrix.slice_rows(start, stop))
            stages.used(block)

    def _dense_reader(
        self, source: WeightSource, name: str, info: WeightInfo
    ) -> Callable[[int, int, NDArray[np.uint8]], None]:
        rows, cols = info.shape
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info.type]
        stored = source.data(name).view(kind).reshape(rows, cols)
        same = (info.type, self._act) in (("F16", "f16"), ("BF16", "bf16"))

        def read(start: int, stop: int, out: NDArray[np.uint8]) -> None:
            part: NDArray[Any] = stored[start:stop]
            if same:
                np.copyto(out.view(kind).reshape(part.shape), part)
                return
            values = (part.astype(np.uint32) << 16).view(np.float32) if info.type == "BF16" else part
            if self._act == "bf16":
                np.copyto(out.view("u2").reshape(part.shape), float_to_bf16(values.astype(np.float32)))
            else:
                np.copyto(out.view("f2").reshape(part.shape), values, casting="same_kind")

        return read


def _stacks(step: Step, source: WeightSource) -> list[tuple[str, ...]]:
    """The matrices of a step in runs that can lie one after the other: alike in type and ending at a tile's end."""
    if isinstance(step, Embed):
        return [(step.table.weight,)]
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


def _make(pool: Pool, kind: str, rows: int, cols: int, act: str) -> Matrix:
    if kind in DENSE_TYPES:
        return DenseMatrix(pool.array((rows, cols), act))
    return QuantMatrix(kind, rows, cols, pool.array(QuantMatrix.shape_of(kind, rows, cols), "u8"))


class _Stages:
    """Rings of page-locked and of device memory that parts of a file pass through."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._host = [HostBuffer(ctx.device, STAGE) for _ in range(_STAGES)]
        self._pool = Pool(ctx.device, "staging")
        self._device = [self._pool.array(STAGE, "u8") for _ in range(_STAGES)]
        self._busy: list[Any] = [None] * _STAGES
        self._next = 0
        self._readers = ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1))

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *error: object) -> None:
        self._readers.shutdown()
        self._ctx.device.synchronize()
        for buffer in self._host:
            buffer.close()
        self._pool.close()

    def send(
        self,
        read: Callable[[int, int, NDArray[np.uint8]], None],
        start: int,
        stop: int,
        target: Array | None,
        row_bytes: int = 0,
    ) -> Array:
        """Reads rows start:stop with several threads and copies them to ``target``, or to a part of the ring."""
        slot, self._next = self._next, (self._next + 1) % _STAGES
        if self._busy[slot] is not None:
            self._busy[slot].sync()  # what was sent from here last may still be under way
        row_bytes = row_bytes or (target.nbytes // (stop - start) if target is not None else 0)
        host = self._host[slot].array(np.uint8, (stop - start) * row_bytes)
        step = -(-(stop - start) // _READERS)
        jobs = [
            self._readers.submit(
                read,
                at,
                min(at + step, stop),
                host[(at - start) * row_bytes : (min(at + step, stop) - start) * row_bytes],
            )
            for at in range(start, stop, step)
        ]
        for job in jobs:
            job.result()
        goal = target if target is not None else self._device[slot].view("u8", host.size)
        self._ctx.device.copy_in(goal, host)
        self._busy[slot] = self._ctx.device.stream.record()
        self._slot = slot
        return goal

    def used(self, block: Array) -> None:
        """Says that the work on what was sent last is on the stream: its place is free after that."""
        self._busy[self._slot] = self._ctx.device.stream.record()


def _row_chunks(rows: int, row_bytes: int, multiple: int) -> Iterator[tuple[int, int]]:
    size = max(multiple, STAGE // row_bytes // multiple * multiple)
    for start in range(0, rows, size):
        yield start, min(start + size, rows)
