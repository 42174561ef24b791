"""``polyhead doctor``: what is installed, what is missing, and the command that would help. Imports nothing of CUDA."""

from __future__ import annotations

import dataclasses

import click

from .checks import Check, all_checks
from .console import Console, pass_console, table, verbosity
from .options import json_option


@click.command("doctor")
@json_option
@verbosity
@pass_console
def command(console: Console, as_json: bool) -> None:
    """Check this installation: each line is ok, warn, missing (needed only for what it says) or broken.

    The exit code is 1 if something is broken: polyhead cannot work as it is.
    """
    checks = list(all_checks())
    if as_json:
        console.json([dataclasses.asdict(check) for check in checks])
    else:
        console.result(table([_row(check) for check in checks]))
        broken = sum(check.state == "broken" for check in checks)
        console.note(
            f"polyhead: {broken} of {len(checks)} checks are broken"
            if broken
            else "polyhead: everything that is needed is here; what is missing is needed only for what its line says"
        )
    if any(check.state == "broken" for check in checks):
        raise click.exceptions.Exit(1)


def _row(check: Check) -> tuple[str, str, str]:
    return check.state, check.name, check.detail + (f". To fix: {check.help}" if check.help else "")
