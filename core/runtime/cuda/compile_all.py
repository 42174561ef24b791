"""Compiling every kernel that the ops list, and what each needs of registers, shared memory and stack.

``polyhead doctor --kernels`` shows it. Needs NVRTC but no GPU.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...errors import DeviceError, summary
from .compiler import Compiler, find_headers
from .driver import INSTALL, load
from .variants import Variant, variants

#: Ampere, Hopper, consumer Blackwell: one of each generation whose machine code differs in kind.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_120")

_NAME = re.compile(r"sm_(\d+)[af]?")
_BF16_SINCE = 80
_SMALL = '#include "prelude.cuh"\nextern "C" __global__ void small(act_t* p) { *p = ph_to_act(1.0f); }\n'

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


@dataclass(frozen=True, slots=True)
class Toolkit:
    """What kernels are compiled with: NVRTC's version, the GPU generations it knows (90 is sm_90), CUDA's headers."""

    version: tuple[int, int]
    generations: tuple[int, ...]
    headers: Path

    def knows(self, architecture: str) -> bool:
        """Whether it compiles for such as ``sm_90a``."""
        match = _NAME.fullmatch(architecture)
        return match is not None and int(match[1]) in self.generations


def find_toolkit() -> Toolkit:
    """Looks for NVRTC and CUDA's headers. Raises DeviceError that names what is missing and how to install it."""
    load("cuda.core")
    nvrtc = load("cuda.bindings.nvrtc")
    try:  # The library itself is looked for when it is first called.
        version = nvrtc.nvrtcVersion()[1:]
        generations = nvrtc.nvrtcGetSupportedArchs()[1]
    except Exception as error:
        why = " ".join(summary(error).split())
        raise DeviceError(
            "CUDA's compiler NVRTC (package nvidia-cuda-nvrtc, for CUDA 12 nvidia-cuda-nvrtc-cu12) cannot be loaded: "
            f"{why}. Run: {INSTALL}"
        ) from error
    return Toolkit((int(version[0]), int(version[1])), tuple(int(number) for number in generations), find_headers())


def compile_small(sm: str) -> float:
    """Seconds that a small kernel takes to compile, without the cache. Raises DeviceError where it does not."""
    compiler = Compiler(sm, use_cache=False)
    compiler.add_source("small.cu", _SMALL)
    compiler.start()
    began = time.perf_counter()
    compiler.compile("small.cu", {})
    return time.perf_counter() - began


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
    """Compiles one variant.

    A problem is: an error or warning, a kernel that is missing, a hot one that spills more than it may.
    """
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
        problems += [f"{item.kernel} spills {item.spilled} bytes" for item in usage if item.spilled > variant.spills]
    return Report(compiler.sm, variant, usage, "; ".join(problems))


def compile_all(
    architectures: Sequence[str] = ARCHITECTURES,
    wanted: Sequence[Variant] | None = None,
    workers: int | None = None,
    tick: Callable[[int, int, str], None] | None = None,
) -> list[Report]:
    """Compiles all variants (or those ``wanted``) for the architectures, side by side.

    GPUs before sm_80 have no bfloat16, so its variants are left out for them. ``tick(done, total, source file)`` tells
    how far it is. Raises DeviceError where NVRTC or CUDA's headers are missing; everything else is in the reports.
    """
    wanted = variants() if wanted is None else wanted
    compilers = [Compiler(sm, use_cache=False) for sm in architectures]
    for compiler in compilers:
        compiler.start()
    jobs = [(compiler, variant) for compiler in compilers for variant in wanted if _possible(compiler.sm, variant)]
    reports: list[Report] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            for report in pool.map(lambda job: compile_variant(*job), jobs):
                reports.append(report)
                if tick is not None:
                    tick(len(reports), len(jobs), f"{report.sm} {report.variant.file}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt need not wait for what was not begun
            raise
    return reports


def _possible(sm: str, variant: Variant) -> bool:
    match = _NAME.fullmatch(sm)
    old = match is not None and int(match[1]) < _BF16_SINCE
    return not (old and any(name.endswith("_BF16") and value for name, value in variant.macros.items()))


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
