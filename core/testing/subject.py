"""Subject: a plugin and a case, made into Decoders, weights, files and loaded models. Knows nothing of pytest."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import devices
from ..arch import Decoder, LearnedPositions, Module, TensorSpec
from ..architecture import Architecture
from ..errors import ConfigError, PluginError, PolyheadError, UnknownMetadataError, summary
from ..plugin_checks import check_modules
from ..plugins import GROUP, Plugin, Registry, discover
from ..runtime.contract import LoadedModel, RuntimeOptions, WeightSource
from ..runtime.memory import AUTO_CONTEXT
from ..weights import claim
from .case import Case
from .files import types_for, write_model
from .memory import Info, MemorySource, weights_for
from .questions import Answers, NeedsShape, Recorder
from .steps import logits_of

F32 = NDArray[np.float32]
CONTEXT = 64
_MOST_ROUNDS = 8
_MOST_WEIGHTS = 20_000_000


@dataclass(frozen=True)
class Variant:
    """One file of the case: which of the tensors that a plugin asks for are there."""

    label: str
    decoder: Decoder
    shapes: Mapping[str, tuple[int, ...]]
    asked: frozenset[str]
    needed: frozenset[str]
    defaulted: frozenset[str]
    ignored: frozenset[str]
    weights: Mapping[str, F32]

    @property
    def plain(self) -> frozenset[str]:
        """Tensors that files never quantise."""
        positions = self.decoder.positions
        return frozenset({positions.weight} if isinstance(positions, LearnedPositions) else ())


class Subject:
    """Raises PluginError for a plugin that does not load or does not know the case's architecture."""

    def __init__(self, plugin: ModuleType | str | Registry, case: Case) -> None:
        self.case = case
        self.registry = registry_of(plugin)
        if not isinstance(plugin, Registry):
            for failed in self.registry.failures:
                raise PluginError(f"plugin {failed.name} does not load: {failed.reason}")
        self.plugin: Plugin
        self.architecture: Architecture
        self.plugin, self.architecture = self.registry.find(case.architecture)
        self.values: Mapping[str, Any] = MappingProxyType(case.values())

    def ask(
        self, values: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], architecture: Architecture | None = None
    ) -> tuple[Decoder, Recorder]:
        """What decoder() returns for this metadata and these tensors, and what it read. Raises whatever it raises."""
        meta = Recorder(values, tensors, self.case.architecture, self.architecture.name)
        decoder = (architecture or self.architecture).decoder(meta)
        if not isinstance(decoder, Decoder):
            raise PluginError(f"decoder() returned {type(decoder).__name__}, expected Decoder")
        check_modules(decoder)
        tuple(decoder.tensors())
        return decoder, meta

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The case with every tensor that the plugin asks for, and where that is another model, with none of them."""
        try:
            without: Variant | PolyheadError = self._variant(_only(()), "without optional tensors")
        except (NeedsShape, PluginError):  # no refusal of a file, but the author's to mend
            raise
        except PolyheadError as error:
            without = error
        full = self._fullest(without.asked if isinstance(without, Variant) else frozenset())
        if isinstance(full, PolyheadError):
            if isinstance(without, PolyheadError):
                if str(without) == str(full):
                    raise full
                raise ConfigError(f"without optional tensors: {without}\nwith all of them: {full}") from without
            return (without,)
        if isinstance(without, PolyheadError) or full.decoder == without.decoder:
            return (full,)
        return (full, without)

    def _fullest(self, asked: frozenset[str]) -> Variant | PolyheadError:
        """All tensors that the plugin asks for and then reads; if it refuses that, as many as it takes one by one."""
        refused: set[str] = set()
        try:
            for _ in range(_MOST_ROUNDS):
                found = self._variant(_all_but(refused), "with all optional tensors")
                ignored = found.asked - found.shapes.keys() - refused
                if not ignored:
                    return found
                refused |= ignored
        except (NeedsShape, PluginError):
            raise
        except PolyheadError as error:
            best: Variant | PolyheadError = error
        else:
            return PluginError("decoder() asks for other tensors each time it is called")
        present: set[str] = set()
        for name in sorted(asked):
            try:
                found = self._variant(_only((*present, name)), "with optional tensors")
            except PluginError:
                raise
            except PolyheadError:
                continue
            if name in found.shapes:
                present.add(name)
                best = found
        return best

    def _variant(self, present: Callable[[str], bool], label: str) -> Variant:
        answers = Answers(self.case, present)
        try:
            decoder, meta = self.ask(self.values, answers)
        except PolyheadError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"decoder() failed on the case's metadata, {label}: {summary(error)}") from error
        specs = {spec.name: spec for spec in decoder.tensors()}
        rows = {decoder.tokens.weight: self.case.vocab}
        hinted = {name: shape for name, shape in self.case.tensors.items() if shape is not None}
        own = {name: (rows.get(name, spec.shape[0]), *spec.shape[1:]) for name, spec in specs.items()}
        shapes = {name: hinted.get(name, shape) for name, shape in (own | hinted).items()}
        count = sum(math.prod(shape) for shape in shapes.values())
        if count > _MOST_WEIGHTS:
            raise ConfigError(f"the case's model has {count:,} weights; take tiny sizes, {_MOST_WEIGHTS:,} at most")
        made = [TensorSpec(name, shape, specs[name].owner if name in specs else "") for name, shape in shapes.items()]
        weights = weights_for(made, self.case.seed)
        ignored = frozenset(filter(meta.ignores, self.values))
        sets = (frozenset(answers.asked), frozenset(meta.needed), frozenset(meta.defaulted), ignored)
        return Variant(label, decoder, MappingProxyType(shapes), *sets, MappingProxyType(weights))

    def check(self, variant: Variant) -> None:
        """What opening a file checks: all metadata known, every tensor claimed once. Raises what that raises."""
        try:
            decoder, _, _ = self.registry.decoder(self.values, variant.shapes)
        except UnknownMetadataError as error:  # whose advice is for someone who only has the file
            raise ConfigError(
                f"{error.problem}. Read it with meta.get, name it with meta.ignore if it changes nothing, or drop it "
                "from the case if no file has it"
            ) from error
        claim(decoder, {name: Info(shape) for name, shape in variant.shapes.items()})

    def claim(self, variant: Variant) -> None:
        """That the variant's Decoder claims every tensor once. Raises TensorError."""
        claim(variant.decoder, {name: Info(shape) for name, shape in variant.shapes.items()})

    def kinds(self) -> list[type[Module]]:
        """The layers of plugins' own in the case's Decoders."""
        blocks = [block for variant in self.variants for block in variant.decoder.blocks]
        return list(dict.fromkeys(type(block.mlp) for block in blocks if isinstance(block.mlp, Module)))

    @contextmanager
    def file(self, variant: Variant, kind: str = "F32") -> Iterator[tuple[Path, dict[str, F32]]]:
        """A GGUF file of the variant with matrices of this type, and the weights as it holds them.

        Gone when left: a run that is killed, as by a time limit, should leave nothing behind.
        """
        with tempfile.TemporaryDirectory(prefix="polyhead-testing-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / f"{kind}.gguf"
            yield path, write_model(path, self.case, variant.weights, types_for(variant.weights, variant.plain, kind))

    @contextmanager
    def loaded(
        self, decoder: Decoder, source: WeightSource, device: str = "cpu", **options: Any
    ) -> Iterator[LoadedModel]:
        """A model on a device, closed again."""
        settings = {"max_tokens": 64, "max_batch": 64, "block_size": 8, "context": min(decoder.context, CONTEXT)}
        given = RuntimeOptions(**{**settings, **options})
        model = devices.load(device, decoder, source, given, self.registry.module_kinds())
        try:
            yield model
        finally:
            model.close()

    def logits(
        self, decoder: Decoder, weights: Mapping[str, F32], ids: Sequence[int], device: str = "cpu", **options: Any
    ) -> F32:
        """float32 [n, vocab] of a model with these weights."""
        with self.loaded(decoder, MemorySource(weights), device, **options) as model:
            return logits_of(model, ids)

    def prompt(self, decoder: Decoder) -> list[int]:
        """The case's tokens, as many as leave room in the context."""
        return self.case.prompt[: max(2, min(decoder.context, AUTO_CONTEXT) - 2)]


def _only(names: Collection[str]) -> Callable[[str], bool]:
    return lambda name: name in names


def _all_but(names: Collection[str]) -> Callable[[str], bool]:
    return lambda name: name not in names


def registry_of(plugin: ModuleType | str | Registry) -> Registry:
    """The plugin alone, loaded as discovery loads one: by its entry point where it is installed."""
    if isinstance(plugin, Registry):
        return plugin
    name = plugin if isinstance(plugin, str) else plugin.__name__
    return discover(entry_points=[installed(name) or EntryPoint(name.rpartition(".")[2], name, GROUP)])


def installed(module: str) -> EntryPoint | None:
    """The entry point of the group ``polyhead`` that names this module, if a package that has one is installed."""
    return next((entry for entry in entry_points(group=GROUP) if module in (entry.value, entry.module)), None)
