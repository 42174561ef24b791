"""The part of the suite about layers of the plugin's own: each called by itself, on more rows than the prompt has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ..arch import Module
from ..errors import summary
from ..runtime.modules import CpuModule
from .base import CPU_NOISE, Base, error_of, fail
from .subject import Subject, Variant

F32 = NDArray[np.float32]
_ROWS = 130
_PIECES = (slice(0, 1), slice(1, 34), slice(34, 98), slice(129, 130))


class LayerTests(Base):
    """What contract.md says of a Module and of what ``ModuleKind.cpu`` returns."""

    def test_a_layer_of_its_own_writes_each_row_from_that_row_alone(self) -> None:
        """All of ``out`` is written, ``x`` only read, and what out and scratch held before does not matter."""
        subject = self.subject()
        for variant in self.variants():
            for where, module in _modules(variant):
                if "__eq__" not in vars(type(module)):
                    fail(
                        f"{where} compares equal to any other of its kind: decorate {type(module).__name__} with "
                        "@dataclass(frozen=True), whose fields say all there is to know of it"
                    )
                _try(where, module, _loaded(subject, variant, where, module), variant.decoder.hidden)


def _modules(variant: Variant) -> Iterator[tuple[str, Module]]:
    for index, block in enumerate(variant.decoder.blocks):
        if isinstance(block.mlp, Module):
            yield f"blocks[{index}].mlp, a {type(block.mlp).__name__}, {variant.label},", block.mlp


def _loaded(subject: Subject, variant: Variant, where: str, module: Module) -> CpuModule:
    kind = subject.registry.module_kinds().get(type(module))
    if kind is None:
        fail(f"{where} has no ModuleKind: polyhead_register_modules must return one for it")
    weights = {spec.name: variant.weights[spec.name].copy() for spec in module.tensors(variant.decoder.hidden)}
    try:
        return kind.cpu(module, weights)
    except Exception as error:
        fail(f"{where} cannot be loaded: {summary(error)}")


def _try(where: str, module: Module, run: CpuModule, hidden: int) -> None:
    x = np.random.default_rng(0).normal(size=(_ROWS, hidden)).astype(np.float32)
    sizes = module.scratch(hidden)
    first = _call(where, run, x, sizes, np.nan)
    if not np.isfinite(first).all():
        fail(
            f"{where} leaves {int((~np.isfinite(first)).sum())} of {first.size} values of out unwritten, or adds to "
            "what was there, or reads scratch that it has not written: out and scratch hold anything when it is called"
        )
    if error_of(_call(where, run, x, sizes, 7.0), first) >= CPU_NOISE:
        fail(f"{where} gives something else when it is called again: is it random, does it keep or add something?")
    for rows in _PIECES:
        error = error_of(_call(where, run, x[rows], sizes, np.nan), first[rows])
        if error >= CPU_NOISE:
            count = rows.stop - rows.start
            fail(
                f"{where} gives {count} of {_ROWS} rows by themselves {error:.2g} otherwise than among the others, "
                f"expected less than {CPU_NOISE:g}: a row of out may depend on the same row of x alone"
            )


def _call(where: str, run: CpuModule, x: F32, sizes: Mapping[str, int], fill: float) -> F32:
    given, out = x.copy(), np.full_like(x, fill)
    scratch = {name: np.full((len(x), size), fill, np.float32) for name, size in sizes.items()}
    try:
        run(given, out, scratch)
    except Exception as error:
        fail(f"{where} fails for {len(x)} rows: {summary(error)}")
    if not np.array_equal(given, x):
        fail(f"{where} writes to x, which others may still read")
    return out
