"""Every kernel compiles for every generation of GPU, and those of decoding do not spill. Needs NVRTC but no GPU."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources

import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.compile_all import ARCHITECTURES, compile_variant, table
from polyhead.runtime.cuda.compiler import Compiler
from polyhead.runtime.cuda.formats import FORMATS
from polyhead.runtime.cuda.variants import Variant
from polyhead_moe.cuda import kernel_macros

ROUTE = ("ph_moe_choose", "ph_moe_group", "ph_moe_sum", "ph_moe_gate")
COMMON = ("dense", "Q4_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Matrix:
    macros: dict[str, object]
    cols: int = 4096


def variants(every_kind: bool) -> list[Variant]:
    def project(kind: str, columns: int, mode: str = "", cols: int = 4096, bf16: bool = False) -> Variant:
        matrix = Matrix(FORMATS[kind].macros() if kind in FORMATS else {}, cols)
        macros = {**kernel_macros(matrix, columns, mode), "PH_ACT_BF16": bf16}
        return Variant("moe/experts.cu", ("ph_moe_project",), macros, hot=kind in COMMON)

    found = [Variant("moe/route.cu", ROUTE, {"PH_ACT_BF16": bf16}, hot=True) for bf16 in (False, True)]
    found += [project(kind, columns, "PH_PAIR") for kind in COMMON for columns in (1, 2)]
    found += [project("Q8_0", 1, mode, bf16=True) for mode in ("PH_GATHER", "PH_TIMES")]
    found.append(project("dense", 1, cols=36))
    if every_kind:
        found += [project(kind, columns) for kind in COMMON for columns in (1, 2)]
        found += [project(kind, 1, "PH_PAIR") for kind in FORMATS if kind not in COMMON]
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_warnings_and_hot_ones_do_not_spill(architecture):
    compiler = Compiler(architecture, use_cache=False)
    try:
        compiler.start()
    except DeviceError as error:
        pytest.skip(f"kernels cannot be compiled here: {error}")
    for name in ("route.cu", "experts.cu"):
        compiler.add_source(f"moe/{name}", (resources.files("polyhead_moe") / name).read_text(encoding="utf-8"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wanted = variants(every_kind=architecture == "sm_90a")
        reports = list(pool.map(lambda variant: compile_variant(compiler, variant), wanted))
    print(table(reports))
    problems = [f"{report.variant}: {report.problem}" for report in reports if report.problem]
    assert not problems, "\n".join(problems)
