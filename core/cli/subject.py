"""What ``polyhead bench`` measures: a model file, or random weights of a known shape, loaded on a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from .. import devices
from ..bench.shapes import SHAPES, metadata, tensors, types
from ..errors import ConfigError, RequestError
from ..model import Model
from ..plugins import discover
from . import facts

if TYPE_CHECKING:
    from ..arch import Decoder
    from ..bench import Case
    from ..config import RunConfig
    from ..runtime.contract import LoadedModel, RuntimeOptions, WeightInfo
    from ..tokenizer import Tokenizer
    from .console import Console

Progress = Callable[[int, int], None] | None
DEFAULT_QUANT = "Q4_K_M"


@dataclass(frozen=True)
class Subject:
    """A loaded model and what there is to say of it. ``load_seconds`` begins with opening the file.

    A shape has no ``model``.
    """

    name: str
    architecture: str
    tensors: Sequence[WeightInfo]
    runtime: LoadedModel
    device: str
    note: str
    load_seconds: float
    model: Model | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None for a shape."""
        return None if self.model is None else self.model.tokenizer


def shape_names(source: str | None, shape: str | None, quant: str | None) -> list[str | None]:
    """What --shape and --quant ask for, each as NAME:QUANT; [None] where a source is measured instead.

    Raises UsageError where the three do not go together, ConfigError for a shape or quantisation that is not known.
    """
    if (source is None) == (shape is None):
        raise click.UsageError("give a CONFIG or MODEL, or --shape NAME[:QUANT], not both")
    if quant is not None and (shape is None or ":" in shape):
        raise click.UsageError("--quant goes with --shape NAME, where NAME does not name one itself")
    if shape is None:
        return [None]
    name, colon, own = shape.partition(":")
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name!r}; known:\n{shape_list()}")
    quants = [part.strip() for part in quant.split(",")] if quant is not None else [own if colon else DEFAULT_QUANT]
    for each in quants:
        types(each, {}, 0)
    return [f"{name}:{each}" for each in quants]


def say_batch(console: Console, tests: Sequence[Case], config: RunConfig) -> None:
    """Says so where tests need more sequences at once than the configuration allows: the model is loaded for them."""
    asked = max(test.batch for test in tests)
    if asked > config.runtime.max_batch:
        console.note(
            f"polyhead: loaded for {asked:,} sequences at once, as -b asks; "
            f"runtime.max_batch is {config.runtime.max_batch:,}"
        )


def open_model(stack: ExitStack, config: RunConfig, tests: Sequence[Case], progress: Progress, lower: str) -> Subject:
    """The configured model, with as much context and batch as the tests need unless the config asks for more context.

    It is closed with ``stack``. ``lower``: the options that lengths come from. Raises RequestError for a test beyond
    the model's context, else as LLM does.
    """
    from ..sources import resolve_model

    device, note = devices.resolve_device(config.device)
    registry = discover(config.plugins.disable)
    path = resolve_model(config.model.path, sha256=config.model.sha256)
    options = _options(config, tests)
    start = time.perf_counter()
    ignored = config.model.ignore_metadata
    model = stack.enter_context(Model(path, registry, architecture=config.architecture, ignore_metadata=ignored))
    _check(model.name, model.decoder, tests, lower)
    runtime = devices.load(device, model.decoder, model.file, options, registry.module_kinds(), progress)
    stack.callback(runtime.close)
    seconds = time.perf_counter() - start
    said = model.name, facts.architecture_text(model), facts.claimed(model)
    return Subject(*said, runtime, device, note, seconds, model)


def open_shape(
    stack: ExitStack,
    config: RunConfig,
    text: str,
    tests: Sequence[Case],
    progress: Progress,
    lower: str,
) -> Subject:
    """Random weights of the shape ``NAME:QUANT``, as :func:`shape_names` gives it; otherwise as :func:`open_model`."""
    from ..bench.random_weights import RandomWeights

    name, _, quant = text.partition(":")
    shape = SHAPES[name]
    sizes = tensors(shape)
    device, note = devices.resolve_device(config.device)
    registry = discover(config.plugins.disable)
    decoder, plugin, _ = registry.decoder(metadata(shape), sizes, architecture=config.architecture)
    _check(name, decoder, tests, lower)
    source = RandomWeights(sizes, types(quant, sizes, shape.layers))
    start = time.perf_counter()
    runtime = devices.load(device, decoder, source, _options(config, tests), registry.module_kinds(), progress)
    stack.callback(runtime.close)
    seconds = time.perf_counter() - start
    label = f"{name} with random {quant.upper()} weights"
    return Subject(label, plugin.origin, list(source.tensors.values()), runtime, device, note, seconds)


def shape_list() -> str:
    """The known shapes, a line each."""
    return "\n".join(
        f"  {shape.name}: {shape.architecture}, {shape.layers} layers of {shape.hidden}, "
        f"{shape.heads}/{shape.kv_heads} heads, context {shape.context:,}"
        for shape in SHAPES.values()
    )


def _options(config: RunConfig, tests: Sequence[Case]) -> RuntimeOptions:
    options = devices.runtime_options(config)
    context = options.context or max(test.context for test in tests)
    return replace(options, context=context, max_batch=max(test.batch for test in tests))


def _check(name: str, decoder: Decoder, tests: Sequence[Case], lower: str) -> None:
    longest = max(tests, key=lambda test: test.context)
    if longest.context > decoder.context:
        raise RequestError(
            f"a sequence of {longest.depth:,} + {longest.tokens:,} tokens needs a context of {longest.context:,}; "
            f"{name} was made for {decoder.context:,}. Lower {lower}"
        )
