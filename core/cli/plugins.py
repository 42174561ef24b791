"""``polyhead plugins``: what is installed, what it provides, and why something failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .console import Console, pass_console, table, verbosity
from .group import CommandGroup
from .options import json_option

if TYPE_CHECKING:
    from ..plugins import Plugin


@click.command("plugins")
@click.option("--disable", multiple=True, metavar="NAME", help="Leave a plugin out, as plugins.disable does.")
@json_option
@verbosity
@pass_console
@click.pass_context
def command(ctx: click.Context, console: Console, disable: tuple[str, ...], as_json: bool) -> None:
    """List plugins, the architectures and layers they provide, and why one failed.

    A broken plugin harms no other and is no error here; it is one when a model needs it.
    """
    from ..plugins import GROUP, discover

    registry = discover(disable)
    plugins = registry.plugins
    root = ctx.find_root().command
    added = root.ask_plugins(console, registry) if isinstance(root, CommandGroup) else []
    if as_json:
        console.json({"plugins": [_record(plugin) for plugin in plugins], "commands": added})
        return
    rows = [
        (plugin.name, f"{plugin.distribution} {plugin.version}".strip(), _provides(plugin), _state(plugin))
        for plugin in plugins
    ]
    console.result(table(rows, ("plugin", "package", "provides", "state")))
    if not rows:
        console.note(f"polyhead: no plugin is installed: no package has an entry point of the group {GROUP!r}")
    if added:
        console.result(f"\ncommands of plugins: {', '.join(added)}")


def _provides(plugin: Plugin) -> str:
    parts = [f"{item.name} for {', '.join(item.gguf_names)}" for item in plugin.architectures]
    parts += [f"module {kind.spec.__name__}" for kind in plugin.modules]
    return "; ".join(parts) or "-"


def _state(plugin: Plugin) -> str:
    return f"{plugin.state}: {' '.join(plugin.reason.split())}" if plugin.reason else plugin.state


def _record(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "package": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
        "state": plugin.state,
        "reason": plugin.reason,
        "architectures": [{"name": item.name, "gguf_names": list(item.gguf_names)} for item in plugin.architectures],
        "modules": [kind.spec.__name__ for kind in plugin.modules],
    }
