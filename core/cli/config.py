"""``polyhead config``: is it right, what does it say and why, what may it say."""

from __future__ import annotations

import json
from typing import Any

import click

from .console import Console, pass_console, table, verbosity
from .loading import load_settings
from .options import json_option, settings, source_argument


@click.group("config")
def command() -> None:
    """Check, show and describe configurations."""


@command.command("check")
@source_argument
@settings(sampling=True)
@verbosity
@pass_console
def check(console: Console, source: str, overrides: list[str]) -> None:
    """Check a configuration without loading its model; every mistake is named with its place."""
    from ..engine import SamplingParams

    config = load_settings(console, source, overrides).config
    SamplingParams(**config.sampling.model_dump(exclude_unset=True))
    console.result(f"{source}: ok")


@command.command("show")
@source_argument
@json_option
@settings(sampling=True)
@verbosity
@pass_console
def show(console: Console, source: str, as_json: bool, overrides: list[str]) -> None:
    """Print every setting with its value and where the value is from."""
    from ..config import show as rows_of

    rows = rows_of(load_settings(console, source, overrides))
    if as_json:
        console.json([{"key": key, "value": value, "origin": origin} for key, value, origin in rows])
    else:
        console.result(table([(key, _text(value), origin) for key, value, origin in rows], ("key", "value", "origin")))


@command.command("schema")
@pass_console
def schema(console: Console) -> None:
    """Print the JSON schema of a configuration, for editors and checkers."""
    from ..config import RunConfig

    console.json({"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()})


def _text(value: Any) -> str:
    line = json.dumps(value, ensure_ascii=False, default=str)
    return line if len(line) <= 80 else f"{line[:79]}…"
