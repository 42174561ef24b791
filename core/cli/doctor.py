"""``polyhead doctor``: what is installed, what is missing, and the command that would help; whether kernels compile."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .checks import Check, all_checks, gpu_architectures
from .console import Console, pass_console, table, verbosity
from .options import json_option

if TYPE_CHECKING:
    from ..runtime.cuda.compile_all import Report
    from ..runtime.cuda.variants import Variant


@click.command("doctor")
@click.option(
    "--kernels",
    is_flag=True,
    help="Compile every CUDA kernel instead, and list its registers, shared memory and spills. Needs no GPU.",
)
@click.option(
    "--arch",
    "architectures",
    multiple=True,
    metavar="SM",
    help="With --kernels: what to compile for, such as sm_90a; repeat it for several. By default the GPUs of this "
    "machine, or without any sm_80, sm_90a and sm_120.",
)
@json_option
@verbosity
@pass_console
def command(console: Console, kernels: bool, architectures: tuple[str, ...], as_json: bool) -> None:
    """Check this installation: each line is ok, warn, missing (needed only for what it says) or broken.

    The exit code is 1 if something is broken: polyhead cannot work as it is, or a kernel has a problem.
    """
    if architectures and not kernels:
        raise click.UsageError("--arch goes with --kernels")
    if kernels:
        compile_kernels(console, architectures, as_json)
        return
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


def compile_kernels(
    console: Console, architectures: Sequence[str], as_json: bool, wanted: Sequence[Variant] | None = None
) -> None:
    """Compiles all kernels, or those ``wanted``, and prints what each needs. Ends with exit code 1 for a problem.

    Raises DeviceError where NVRTC is missing, BadParameter for an architecture that it does not know.
    """
    from ..runtime.cuda import compile_all

    toolkit = compile_all.find_toolkit()
    version = "NVRTC {}.{}".format(*toolkit.version)
    architectures = list(dict.fromkeys(architectures or gpu_architectures() or compile_all.ARCHITECTURES))
    if unknown := [name for name in architectures if not toolkit.knows(name)]:
        known = ", ".join(f"sm_{number}" for number in toolkit.generations)
        raise click.BadParameter(
            f"{version} does not compile for {', '.join(unknown)}; it does for {known}", param_hint="--arch"
        )
    began = time.perf_counter()
    with console.counting("polyhead: compiling kernels") as tick:
        reports = compile_all.compile_all(architectures, wanted, tick=tick)
    seconds = time.perf_counter() - began
    if as_json:
        console.json([_record(report) for report in reports])
    else:
        console.result(compile_all.table(reports))
    problems = sum(bool(report.problem) for report in reports)
    console.note(
        f"polyhead: {len(reports)} specialisations of kernels compiled for {', '.join(architectures)} with {version} "
        f"in {seconds:.1f} s; {problems or 'none'} with a problem"
    )
    if problems:
        raise click.exceptions.Exit(1)


def _record(report: Report) -> dict[str, Any]:
    variant = report.variant
    return {
        "arch": report.sm,
        "file": variant.file,
        "macros": dict(variant.macros),
        "hot": variant.hot,
        "kernels": [dataclasses.asdict(usage) for usage in report.usage],
        "problem": report.problem or None,
    }


def _row(check: Check) -> tuple[str, str, str]:
    return check.state, check.name, check.detail + (f". To fix: {check.help}" if check.help else "")
