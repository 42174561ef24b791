"""``polyhead inspect``: what a model file holds and what its plugin makes of it. Reads headers, never weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import PolyheadError
from .console import Console, pass_console, table, verbosity
from .loading import load_settings
from .options import json_option, settings, source_argument

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..gguf import GGUFFile
    from ..model import Model


@click.command("inspect")
@source_argument
@click.option("--memory", is_flag=True, help="What it would take on the device, and whether it fits.")
@click.option("--layers", is_flag=True, help="The tree of layers with their tensors; -v shows every block.")
@click.option("--metadata", is_flag=True, help="All metadata of the file.")
@click.option("--tensors", is_flag=True, help="All tensors of the file.")
@json_option
@settings(sampling=False)
@verbosity
@pass_console
def command(console: Console, /, source: str, as_json: bool, overrides: list[str], **sections: bool) -> None:
    """Show what a model file holds: an overview, or the sections asked for.

    A file that no plugin understands is shown as far as possible; the exit code is then 2.
    """
    from ..gguf import open_gguf
    from ..model import Model
    from ..plugins import discover
    from ..sources import resolve_model

    config = load_settings(console, source, overrides).config
    registry = discover(config.plugins.disable)
    path = resolve_model(config.model.path, sha256=config.model.sha256)
    try:
        model = Model(
            path,
            registry,
            architecture=config.architecture,
            ignore_metadata=config.model.ignore_metadata,
            chat_template=config.model.chat_template,
        )
    except PolyheadError:
        with open_gguf(path) as file:
            _show(console, file, None, config, sections, as_json)
        raise
    with model:
        _show(console, model.file, model, config, sections, as_json)


def _show(
    console: Console, file: GGUFFile, model: Model | None, config: RunConfig, sections: dict[str, bool], as_json: bool
) -> None:
    from . import overview
    from .layers import draw, tree

    wanted = [name for name, asked in sections.items() if asked]
    parts: dict[str, Any] = {}
    texts: list[str] = []
    if not wanted:
        facts = overview.of_file(file) | (overview.of_model(model, config) if model else {})
        parts["overview"] = facts
        texts.append(overview.text(facts))
    if "metadata" in wanted:
        parts["metadata"] = {key: overview.value(value) for key, value in file.metadata.items()}
        texts.append(table([(key, overview.short(value)) for key, value in file.metadata.items()]))
    if "tensors" in wanted:
        parts["tensors"] = overview.tensors(file, model)
        rows = [
            (item["name"], str(item["shape"]), item["type"], f"{item['bytes']:,}", "" if item["used"] else "unused")
            for item in parts["tensors"]
        ]
        texts.append(table(rows, ("tensor", "shape", "type", "bytes", ""), right={3}))
    if model is not None and "layers" in wanted:
        root = tree(model.decoder, model.file.tensors)
        parts["layers"] = root.as_dict()
        texts.append(draw(root, every=console.verbose))
    if model is not None and "memory" in wanted:
        parts["memory"], text = _memory(model, config)
        texts.append(text)
    if as_json:
        console.json(parts if wanted else parts["overview"])
    else:
        for number, text in enumerate(texts):
            console.result(f"\n{text}" if number else text)


def _memory(model: Model, config: RunConfig) -> tuple[dict[str, Any], str]:
    """The memory plan. Raises CapacityError, whose message holds the table, where it does not fit."""
    import dataclasses

    from .. import devices
    from ..runtime.memory import size_text
    from .facts import mha_kv_values

    device, note = devices.resolve_device(config.device)
    plan = devices.plan(device, model.decoder, model.file, devices.runtime_options(config))
    values = model.decoder.kv_values_per_token()
    mha = plan.kv_bytes_per_token * mha_kv_values(model.decoder) // values
    kv = f"KV cache per token: {size_text(plan.kv_bytes_per_token)} ({plan.kv_bytes_per_token:,} bytes)"
    if mha > plan.kv_bytes_per_token:
        kv += (
            f"; with a K/V head for every query head (MHA) it would be {size_text(mha)}, "
            f"{mha / plan.kv_bytes_per_token:.3g} times as much"
        )
    full = plan.num_blocks * plan.block_size // plan.context
    fits = f"It fits: context {plan.context_text}, {min(full, plan.max_batch):,} sequences at full context at once"
    rows = "\n".join((f"Memory on {note}", plan.table(), kv, fits))
    return {**dataclasses.asdict(plan), "kv": plan.kv, "used": plan.used, "mha_kv_bytes_per_token": mha}, rows
