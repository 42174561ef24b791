"""``polyhead plugins``: what is installed, what it provides, why something failed; and a package to begin with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from .console import Console, pass_console, table, verbosity
from .group import CommandGroup
from .options import json_option

if TYPE_CHECKING:
    from ..plugins import Plugin
    from .plugins_new import Names


@click.group("plugins", invoke_without_command=True)
@click.option("--disable", multiple=True, metavar="NAME", help="Leave a plugin out, as plugins.disable does.")
@json_option
@verbosity
@pass_console
@click.pass_context
def command(ctx: click.Context, console: Console, disable: tuple[str, ...], as_json: bool) -> None:
    """List plugins, the architectures and layers they provide, and why one failed.

    A broken plugin harms no other and is no error here; it is one when a model needs it.
    """
    if ctx.invoked_subcommand is not None:
        if disable or as_json:
            raise click.UsageError("--disable and --json are for the list of plugins")
        return
    from ..plugins import GROUP, discover

    registry = discover(disable, warn=False)
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


@command.command("new")
@click.argument("name")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=".",
    metavar="DIR",
    help="Where to put the package's folder; here if not given.",
)
@verbosity
@pass_console
def new(console: Console, name: str, directory: Path) -> None:
    """Write a plugin package to begin with, and print its folder.

    NAME is what general.architecture says in the model files. The package is a plain decoder (RMSNorm, RoPE, grouped
    K/V heads, gated SiLU) with tests that pass, to be changed into what the model is.
    """
    from ..plugins import GUIDE
    from .plugins_new import Names, write

    names = Names.of(name)
    _refuse_taken(names)
    folder = write(names, directory)
    console.result(str(folder))
    console.note(
        f"polyhead: wrote {names.distribution}. Next, in an environment that has polyhead, as this one has:\n"
        f"  cd {shlex.quote(str(folder))}\n"
        "  python -m pip install -e '.[test]'\n"
        "  python -m pytest\n"
        f"then change {names.module}.py and the reference in tests/test_{names.name}.py. Guide: {GUIDE}"
    )


def _refuse_taken(names: Names) -> None:
    """Raises ConfigError where an installed plugin has one of the names already."""
    from ..plugins import canonical, discover

    mine = {canonical(names.name), canonical(names.distribution)}
    for plugin in discover().plugins:
        if mine & {canonical(plugin.name), canonical(plugin.distribution)}:
            raise ConfigError(f"plugin {plugin.origin} is installed and has that name; choose another or uninstall it")
        for item in plugin.architectures:
            if names.gguf_name in item.gguf_names or canonical(item.name) in mine:
                raise ConfigError(
                    f"plugin {plugin.origin} provides architecture {item.name} for "
                    f"{', '.join(item.gguf_names)} already; choose another name or uninstall it"
                )


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
