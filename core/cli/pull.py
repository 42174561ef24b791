"""``polyhead pull``: a model's file on this machine."""

from __future__ import annotations

import click

from .console import Console, pass_console, verbosity
from .loading import load_settings
from .options import source_argument


@click.command("pull")
@source_argument
@click.option("--sha256", metavar="HEX", help="The SHA-256 that the file must have. Short for --set model.sha256=…")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
@verbosity
@pass_console
def command(console: Console, source: str, sha256: str | None, assignments: tuple[str, ...]) -> None:
    """Fetch a model unless it is here already, check it, and print its path."""
    from ..sources import resolve_model

    overrides = [*assignments, *([] if sha256 is None else [f"model.sha256={sha256}"])]
    model = load_settings(console, source, overrides).config.model
    path = resolve_model(model.path, sha256=model.sha256, progress=False if console.quiet else None)
    console.result(str(path))
