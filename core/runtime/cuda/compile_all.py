"""Compiling every kernel that the ops list, and what each needs of registers, shared memory and stack.

``python -m polyhead.runtime.cuda.compile_all [sm_90a ...]`` prints the table. Needs NVRTC but no GPU.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ...errors import DeviceError
from .compiler import Compiler
from .variants import Variant, variants

#: Ampere, Hopper, consumer Blackwell: one of each generation whose machine code differs in kind.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_120")

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, slots=True)
class Usage:
    """What ptxas says of one kernel: registers per thread; static shared memory, stack and spilled bytes."""

    kernel: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One variant compiled for one architecture. ``problem`` is empty where all is well."""

    sm: str
    variant: Variant
    usage: tuple[Usage, ...] = ()
    problem: str = ""


def read_usage(log: str) -> tuple[Usage, ...]:
    """The kernels in ptxas's verbose output. Functions that were not inlined count for the kernel above them."""
    found: list[Usage] = []
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            found.append(Usage(match[1]))
        elif found and (match := _STACK.search(line)):
            last = found[-1]
            stack, stores, loads = (int(text) for text in match.groups())
            spilled = last.spilled + max(stores, loads)
            found[-1] = Usage(last.kernel, last.registers, last.shared, max(last.stack, stack), spilled)
        elif found and (match := _REGISTERS.search(line)):
            shared = _SHARED.search(line)
            last = found[-1]
            found[-1] = Usage(last.kernel, int(match[1]), int(shared[1]) if shared else 0, last.stack, last.spilled)
    return tuple(found)


def compile_variant(compiler: Compiler, variant: Variant) -> Report:
    """Compiles one variant. A problem is: an error or warning, a kernel that is missing, a hot one that spills."""
    try:
        cubin = compiler.compile(variant.file, variant.macros, report=True)
    except DeviceError as error:
        return Report(compiler.sm, variant, problem=str(error))
    usage = read_usage(cubin.log)
    problems = [line.strip() for line in cubin.log.splitlines() if "warning" in line.lower()]
    missing = [name for name in variant.kernels if f".text.{name}\0".encode() not in cubin.code]
    if missing:
        problems.append(f"there is no kernel {', '.join(missing)}")
    if variant.hot:
        problems += [f"{item.kernel} spills {item.spilled} bytes" for item in usage if item.spilled]
    return Report(compiler.sm, variant, usage, "; ".join(problems))


def compile_all(
    architectures: Sequence[str] = ARCHITECTURES, wanted: Sequence[Variant] | None = None, workers: int | None = None
) -> list[Report]:
    """Compiles all variants (or those ``wanted``) for the architectures, side by side.

    Raises DeviceError where NVRTC or CUDA's headers are missing; everything else is in the reports.
    """
    wanted = variants() if wanted is None else wanted
    compilers = [Compiler(sm, use_cache=False) for sm in architectures]
    for compiler in compilers:
        compiler.start()
    jobs = [(compiler, variant) for compiler in compilers for variant in wanted]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda job: compile_variant(*job), jobs))


def table(reports: Sequence[Report]) -> str:
    """The reports as aligned text: a line per kernel, problems below."""
    rows = [("arch", "kernel", "registers", "shared", "stack", "spilled", "of")]
    for report in reports:
        for item in report.usage:
            numbers = (str(item.registers), str(item.shared), str(item.stack), str(item.spilled))
            rows.append((report.sm, item.kernel, *numbers, str(report.variant)))
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join(
            [row[0].ljust(wide[0]), row[1].ljust(wide[1]), *(row[i].rjust(wide[i]) for i in range(2, 6)), row[6]]
        ).rstrip()
        for row in rows
    ]
    lines += [f"PROBLEM {report.sm} {report.variant}: {report.problem}" for report in reports if report.problem]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Prints the table; 1 where a kernel has a problem, 2 where nothing can be compiled here."""
    try:
        reports = compile_all(tuple(arguments) or ARCHITECTURES)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(reports))
    return 1 if any(report.problem for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
