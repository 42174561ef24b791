"""Every kernel compiles for every generation of GPU, and the compiler's errors and cache behave. Needs only NVRTC."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.compile_all import ARCHITECTURES, compile_all, compile_variant, read_usage, table
from polyhead.runtime.cuda.compiler import Compiler
from polyhead.runtime.cuda.variants import Variant, kernel_files, variants

ONE = '#include "prelude.cuh"\nextern "C" __global__ void one(act_t* p) { *p = ph_to_act(PH_VALUE); }\n'


@pytest.fixture(scope="module", autouse=True)
def _nvrtc() -> None:
    try:
        Compiler("sm_90a", use_cache=False).start()
    except DeviceError as error:
        pytest.skip(f"kernels cannot be compiled here: {error}")


def compiler(cache: Path | None = None, text: str = ONE) -> Compiler:
    made = Compiler("sm_90a", cache, use_cache=cache is not None)
    made.add_source("one.cu", text)
    return made


def test_no_kernel_file_is_left_out() -> None:
    left_out = set(kernel_files()) - {variant.file for variant in variants()}
    assert not left_out, f"no module of runtime/cuda/ops lists these in VARIANTS: {sorted(left_out)}"


def test_every_kernel_compiles_without_warnings_and_hot_ones_do_not_spill() -> None:
    # A few specialisations of each file. `polyhead doctor --kernels` compiles all of them, CI all for Hopper.
    of = {file: [variant for variant in variants() if variant.file == file] for file in kernel_files()}
    wanted = [variant for each in of.values() for variant in each[:: max(1, len(each) // 4)]]
    reports = compile_all(["sm_90a"], wanted)
    print(table(reports))
    assert len(reports) == len(wanted)
    problems = [f"{report.variant}: {report.problem}" for report in reports if report.problem]
    assert not problems, "\n".join(problems)


def test_compiling_all_tells_how_far_it_is_and_spares_old_gpus_bfloat16() -> None:
    wanted = [variant for variant in variants() if variant.file == "rows.cu"]
    told: list[tuple[int, int, str]] = []
    reports = compile_all(["sm_75"], wanted, tick=lambda *now: told.append(now))
    without = [variant for variant in wanted if not variant.macros["PH_ACT_BF16"]]
    assert 0 < len(without) < len(wanted)
    assert [report.variant for report in reports] == without
    assert told == [(number, len(without), "sm_75 rows.cu") for number in range(1, len(without) + 1)]


def test_an_error_shows_file_line_and_macros() -> None:
    text = '#include "prelude.cuh"\n\nextern "C" __global__ void one(act_t* p) {\n  *p = nothing;\n}\n'
    with pytest.raises(DeviceError) as caught:
        compiler(text=text).compile("one.cu", {"PH_VALUE": 3})
    message = str(caught.value)
    assert message.startswith("one.cu (PH_VALUE=3) does not compile for sm_90a:")
    assert 'one.cu(4): error: identifier "nothing" is undefined' in message


def test_an_error_in_a_header_shows_the_headers_line() -> None:
    made = compiler(text='#include "mine.cuh"\nextern "C" __global__ void one(int* p) { *p = 1; }\n')
    made.add_source("mine.cuh", "#pragma once\n\nint broken(\n;\n")
    with pytest.raises(DeviceError, match=r"mine\.cuh\(4\): error"):
        made.compile("one.cu", {})


def test_an_unknown_architecture_is_an_error_that_names_it() -> None:
    with pytest.raises(DeviceError, match="sm_999"):
        Compiler("sm_999", use_cache=False).compile("norm.cu", {})


def test_the_second_compilation_comes_from_the_disk(tmp_path: Path) -> None:
    first = compiler(tmp_path).compile("one.cu", {"PH_VALUE": 1})
    second = compiler(tmp_path).compile("one.cu", {"PH_VALUE": 1})
    assert (first.cached, second.cached) == (False, True)
    assert first.code == second.code


def test_a_change_of_source_header_macro_or_architecture_is_compiled_anew(tmp_path: Path) -> None:
    text = '#include "mine.cuh"\nextern "C" __global__ void one(int* p) { *p = PH_VALUE + MINE; }\n'

    def cached(text: str, header: str, value: int, sm: str = "sm_90a") -> bool:
        made = Compiler(sm, tmp_path)
        made.add_source("one.cu", text)
        made.add_source("mine.cuh", header)
        return made.compile("one.cu", {"PH_VALUE": value}).cached

    assert not cached(text, "#define MINE 1\n", 1)
    assert cached(text, "#define MINE 1\n", 1)
    assert not cached(text + "\n", "#define MINE 1\n", 1)
    assert not cached(text, "#define MINE 2\n", 1)
    assert not cached(text, "#define MINE 1\n", 2)
    assert not cached(text, "#define MINE 1\n", 1, "sm_80")


def test_a_cache_folder_that_cannot_be_made_or_written_is_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert compiler(tmp_path / "file" / "cache").compile("one.cu", {"PH_VALUE": 1}).code
    if os.geteuid() == 0:
        (tmp_path / "cache").mkdir()
        made = compiler(tmp_path / "cache")
        made.start()
        for folder in ("entries", "tmp"):
            (tmp_path / "cache" / folder).rmdir()
            (tmp_path / "cache" / folder).write_text("in the way")  # Modes do not stop root.
    else:
        made = compiler(tmp_path / "cache")
        made.start()
        (tmp_path / "cache" / "entries").chmod(0o500)
    assert made.compile("one.cu", {"PH_VALUE": 1}).code
    assert made.compile("one.cu", {"PH_VALUE": 1}).code


def test_a_damaged_entry_on_the_disk_is_compiled_again(tmp_path: Path) -> None:
    whole = compiler(tmp_path).compile("one.cu", {"PH_VALUE": 1})
    (entry,) = [path for path in (tmp_path / "entries").rglob("*") if path.is_file()]
    held = entry.read_bytes()
    for damaged in (b"", held[:100], held[:-1], held[:50] + b"x" + held[51:]):
        entry.write_bytes(damaged)
        again = compiler(tmp_path).compile("one.cu", {"PH_VALUE": 1})
        assert not again.cached
        assert again.code == whole.code
        assert entry.read_bytes() == held


def test_many_are_compiled_once_each(tmp_path: Path) -> None:
    made = compiler(tmp_path)
    wanted = [("one.cu", {"PH_VALUE": value % 3}) for value in range(9)]
    assert made.compile_many(wanted) == 3
    assert made.compile_many(wanted) == 0
    assert compiler(tmp_path).compile("one.cu", {"PH_VALUE": 2}).cached


def test_threads_may_be_the_first_to_load_nvidias_packages() -> None:
    script = """
from concurrent.futures import ThreadPoolExecutor
from polyhead.runtime.cuda.driver import load
with ThreadPoolExecutor(8) as pool:
    print({options is not None for options in pool.map(lambda _: load("cuda.core").ProgramOptions, range(8))})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "{True}", done.stderr


@pytest.mark.parametrize("architecture", ["sm_75", *ARCHITECTURES])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_prelude_compiles_and_old_gpus_refuse_bfloat16(architecture: str, bf16: bool) -> None:
    made = Compiler(architecture, use_cache=False)
    made.add_source(
        "all.cu",
        """
#include "prelude.cuh"
extern "C" __global__ void all(act_t* p, float* f) {
  __shared__ __align__(16) act_t s[256];
  __shared__ float scratch[32];
  ph_cp_async16(s + 8 * threadIdx.x, p + 8 * threadIdx.x);
  ph_cp_async_commit();
  ph_cp_async_wait<0>();
  __syncthreads();
  u32 a[4], b[4];
  ph_ldmatrix4(a, s);
  ph_ldmatrix4_transposed(b, s);
  const u32 half[2] = {b[0], b[1]};
  float c[4] = {};
  ph_mma(c, a, half);
  f[threadIdx.x] = ph_block_sum(c[0], scratch) + ph_block_max(c[1], scratch);
}
""",
    )
    if architecture == "sm_75" and bf16:
        with pytest.raises(DeviceError, match=r"need compute capability 8\.0"):
            made.compile("all.cu", {"PH_ACT_BF16": True})
        return
    report = compile_variant(made, Variant("all.cu", ("all",), {"PH_ACT_BF16": bf16}, hot=True))
    assert not report.problem
    assert [item.kernel for item in report.usage] == ["all"]
    assert report.usage[0].registers > 0
    assert report.usage[0].shared == 256 * 2 + 32 * 4


def test_a_spill_a_warning_and_a_missing_kernel_are_problems() -> None:
    spilling = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* p, int n) {
  float a[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) a[i] = p[i * n];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 48; ++i) p[i * n + 1] = a[i] * a[47 - i];
}
"""
    made = compiler(text=spilling)
    assert "spills spills" in compile_variant(made, Variant("one.cu", ("spills",), hot=True)).problem
    assert compile_variant(made, Variant("one.cu", ("spills",))).problem == ""
    (usage,) = compile_variant(made, Variant("one.cu", ("spills",))).usage
    for allowed, passes in ((usage.spilled, True), (usage.spilled - 1, False)):
        report = compile_variant(made, Variant("one.cu", ("spills",), hot=True, spills=allowed))
        assert (report.problem == "") == passes
    assert "no kernel other" in compile_variant(made, Variant("one.cu", ("other",))).problem
    careless = compiler(text='extern "C" __global__ void one(int* p) { int unused; *p = 1; }')
    assert "unused" in compile_variant(careless, Variant("one.cu", ("one",))).problem


def test_usage_is_read_from_what_ptxas_says() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    160 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 160 bytes cumulative stack size, 128 bytes smem
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""
    a, b = read_usage(log)
    assert (a.kernel, a.registers, a.shared, a.stack, a.spilled) == ("a", 64, 128, 160, 12)
    assert (b.kernel, b.registers, b.shared, b.stack, b.spilled) == ("b", 8, 0, 0, 0)
