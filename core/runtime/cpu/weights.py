"""Weights on the CPU: dequantised once at load, matrices that are used together stacked into one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ...arch import Embedding, LayerNorm, Linear, Norm
from ..contract import WeightSource
from ..program import Embed, Program, Project

F32 = NDArray[np.float32]
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def resident_bytes(program: Program) -> int:
    """Bytes that the weights of a program take here: four per weight, a tied head none."""
    shapes = {spec.name: spec.shape for spec in program.decoder.tensors()}
    return sum(4 * _aligned(int(np.prod(shape))) for shape in shapes.values())


def _aligned(values: int) -> int:
    """Rounded up to a cache line of float32 values."""
    return -(-values // 16) * 16


class Weights:
    """float32 arrays of a program: ``vector(name)`` for norms and biases, ``matrix(step)`` for projections."""

    def __init__(self, program: Program, source: WeightSource, progress: Progress | None = None) -> None:
        # One allocation: the system backs it with huge pages, which makes loading and every pass over it faster.
        self._arena = np.empty(resident_bytes(program) // 4, np.float32)
        self._taken = 0
        self._arrays: dict[str, F32] = {}
        self._matrices: dict[tuple[str, ...], F32] = {}
        self._biases: dict[tuple[str, ...], F32 | None] = {}
        jobs = list(self._allocate(program))
        total = sum(source.tensors[name].nbytes for name, _ in jobs)
        done = 0
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            # NumPy lets go of the interpreter lock inside its loops, so tensors dequantise side by side.
            for nbytes in pool.map(lambda job: _read(source, *job), jobs):
                done += nbytes
                if progress is not None:
                    progress(done, total)
        for key, names in self._bias_names.items():
            self._biases[key] = self._stack_bias(key, names)

    def table(self, embedding: Embedding) -> F32:
        """[rows, hidden]."""
        return self._matrices[(embedding.weight,)]

    def vector(self, name: str) -> F32:
        """A tensor by name, in its own shape."""
        return self._arrays[name]

    def matrix(self, step: Project) -> tuple[F32, F32 | None]:
        """The stacked matrix [out, in] of a projection and its bias [out]."""
        key = _key(step.weights)
        return self._matrices[key], self._biases.get(key)

    def release(self) -> None:
        """Lets go of every array."""
        for held in (self._arrays, self._matrices, self._biases):
            held.clear()
        self._arena = np.empty(0, np.float32)

    def _take(self, shape: tuple[int, ...]) -> F32:
        size = int(np.prod(shape))
        start, self._taken = self._taken, self._taken + _aligned(size)
        return self._arena[start : start + size].reshape(shape)

    def _allocate(self, program: Program) -> Iterable[tuple[str, F32]]:
        """Makes room for every tensor and yields (name, where its values go)."""
        shapes = {spec.name: spec.shape for spec in program.decoder.tensors()}
        self._bias_names: dict[tuple[str, ...], list[tuple[str | None, int]]] = {}
        for step in program.steps:
            if isinstance(step, Project):
                key = _key(step.weights)
                if key not in self._matrices:
                    yield from self._stack(key, [shapes[name] for name in key])
                    self._bias_names[key] = [
                        (getattr(weight, "bias", None), rows)
                        for weight, rows in zip(step.weights, step.rows, strict=True)
                    ]
            elif isinstance(step, Embed):
                yield from self._stack((step.table.weight,), [shapes[step.table.weight]])
        for spec in program.decoder.tensors():
            if any(spec.name in key for key in self._matrices) or spec.name in self._arrays:
                continue
            array = self._take(spec.shape)
            self._arrays[spec.name] = array
            yield spec.name, array

    def _stack(self, key: tuple[str, ...], shapes: list[tuple[int, ...]]) -> Iterable[tuple[str, F32]]:
        matrix = self._take((sum(shape[0] for shape in shapes), shapes[0][1]))
        self._matrices[key] = matrix
        row = 0
        for name, shape in zip(key, shapes, strict=True):
            yield name, matrix[row : row + shape[0]]
            row += shape[0]

    def _stack_bias(self, key: tuple[str, ...], names: list[tuple[str | None, int]]) -> F32 | None:
        if all(name is None for name, _ in names):
            return None
        return np.concatenate(
            [np.zeros(rows, np.float32) if name is None else self._arrays[name] for name, rows in names]
        )


def norm_names(norm: Norm) -> tuple[str, str | None]:
    """The tensors of a norm: weight and bias."""
    return norm.weight, norm.bias if isinstance(norm, LayerNorm) else None


def _key(weights: tuple[Linear | Embedding, ...]) -> tuple[str, ...]:
    return tuple(weight.weight for weight in weights)


def _read(source: WeightSource, name: str, out: F32) -> int:
    source.dequantise(name, out)
    return source.tensors[name].nbytes
