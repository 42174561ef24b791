"""The hooks a plugin may implement: `from polyhead import hookimpl`, then decorate a function of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

from .architecture import Architecture
from .runtime.modules import ModuleKind

if TYPE_CHECKING:
    import click

hookspec = pluggy.HookspecMarker("polyhead")
hookimpl = pluggy.HookimplMarker("polyhead")


@hookspec
def polyhead_register_architectures() -> Sequence[Architecture]:  # type: ignore[empty-body]
    """The architectures this plugin provides."""


@hookspec
def polyhead_register_modules() -> Sequence[ModuleKind]:  # type: ignore[empty-body]
    """Implementations of the plugin's own layers: one ModuleKind for each subclass of polyhead.arch.Module."""


@hookspec
def polyhead_register_commands(cli: click.Group) -> None:
    """Adds commands to the ``polyhead`` command line; a name that exists already is refused."""
