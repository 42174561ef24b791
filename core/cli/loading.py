"""Opening a model for a command, with a bar while weights load and one line that says what runs where."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from . import facts
from .console import Console

if TYPE_CHECKING:
    from ..config import LoadedConfig
    from ..llm import LLM


def open_llm(console: Console, loaded: LoadedConfig) -> LLM:
    """Loads the model and says so on stderr. Raises whatever LLM raises."""
    from ..llm import LLM

    start = time.perf_counter()
    with console.loading() as progress:
        llm = LLM(loaded, progress=progress)
    seconds = time.perf_counter() - start
    console.note(summary(llm, seconds))
    size = sum(info.nbytes for info in facts.claimed(llm.model))
    console.detail(f"polyhead: loaded {size / 1e9:.2f} GB in {seconds:.2f} s ({size / seconds / 1e9:.1f} GB/s)")
    console.detail(f"polyhead: {llm.model.path}, as {llm.plan.device} holds it:\n{llm.plan.table()}")
    return llm


def load_settings(console: Console, source: str, overrides: Sequence[str]) -> LoadedConfig:
    """The configuration that a CONFIG or MODEL argument and the command line's settings make."""
    from ..config import load_config, show

    if not source.strip():  # else it would be taken for the current folder
        raise ConfigError("CONFIG|MODEL is empty; give a YAML file, a .gguf file, hf://… or pypi://…")
    loaded = load_config(source, overrides=overrides)
    for key, value, origin in show(loaded) if console.verbose else ():
        if origin != "default":
            console.detail(f"polyhead: {key} = {value!r} ({origin})")
    return loaded


def look_for_model(loaded: LoadedConfig) -> None:
    """Raises SourceError where the model should be on this machine and is not: no prompt is worth reading then."""
    from ..sources import LocalModel, parse_reference, resolve_model

    path = loaded.config.model.path
    if isinstance(parse_reference(path), LocalModel):
        resolve_model(path)


def summary(llm: LLM, seconds: float) -> str:
    """Model, architecture and plugin, weights, device, context and load time in one line."""
    tensors = facts.claimed(llm.model)
    size = sum(info.nbytes for info in tensors)
    return (
        f"polyhead: {llm.model.name} · {facts.architecture_text(llm.model)} · "
        f"{facts.count_text(facts.parameters(tensors))} weights in {size / 1e6:,.1f} MB "
        f"({facts.mix_text(facts.type_mix(tensors))}) · {llm.device_note} · "
        f"context {llm.plan.context_text} · loaded in {seconds:.1f} s"
    )
