"""The parts of the CUDA runtime that need neither a GPU nor NVIDIA's packages."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.compiler import Compiler, define_macros
from polyhead.runtime.cuda.device import bf16_to_float, float_to_bf16, sm_name
from polyhead.runtime.cuda.driver import load
from polyhead.runtime.cuda.memory import DTYPES, Array
from polyhead.runtime.cuda.probe import device_count, probe, require_device


def test_importing_the_runtime_imports_none_of_nvidias_packages() -> None:
    script = """
import sys
import polyhead.runtime.cuda.blas, polyhead.runtime.cuda.context, polyhead.runtime.cuda.graph
import polyhead.runtime.cuda.compile_all
print([name for name in sys.modules if name.split(".")[0] in ("cuda", "nvmath", "cupy", "torch")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_is_an_error_with_the_line_to_install_it() -> None:
    with pytest.raises(
        DeviceError, match=r"cuda_missing\.part, which is not installed.*pip install 'polyhead\[cu13\]'"
    ):
        load("cuda_missing.part")


def test_the_bindings_of_cublaslt_are_loaded_alone_and_do_no_harm_to_nvmath() -> None:
    if importlib.util.find_spec("nvmath") is None:
        pytest.skip("nvmath-python is not installed")
    script = """
import sys
from polyhead.runtime.cuda.cublaslt import cublaslt
lt = cublaslt()
assert callable(lt.matmul) and cublaslt() is lt
assert "nvmath" not in sys.modules and "nvmath.bindings" not in sys.modules
assert not [name for name in sys.modules if name.startswith(("nvmath.fft", "nvmath.linalg", "cuda.core"))]
import nvmath
from nvmath.bindings import cublasLt
assert cublasLt is lt and cublaslt() is lt and nvmath.linalg
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "fine", done.stderr


def test_probing_without_a_driver_is_quick_and_says_so() -> None:
    began = time.perf_counter()
    found = probe()
    if found.driver is not None:
        pytest.skip("there is a driver here")
    assert time.perf_counter() - began < 0.1
    assert found.devices == ()
    assert device_count() == 0
    assert found.problem is not None
    assert "no NVIDIA driver" in found.problem
    with pytest.raises(DeviceError, match=r"cuda:3 cannot be used: no NVIDIA driver.*device: cpu"):
        require_device(3)


@pytest.mark.parametrize(
    ("cc", "name"), [((7, 5), "sm_75"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_120")]
)
def test_architecture_names(cc: tuple[int, int], name: str) -> None:
    assert sm_name(cc) == name


def test_macros_are_sorted_and_false_ones_are_not_defined() -> None:
    macros = {"PH_B": 128, "PH_A": True, "PH_C": False, "PH_D": None, "PH_E": 0, "PH_F": "__half"}
    assert define_macros(macros) == (("PH_A", "1"), ("PH_B", "128"), ("PH_E", "0"), ("PH_F", "__half"))


@pytest.mark.parametrize("macros", [{"T": "float"}, {"PH_x": 1}, {"PH_A": "a b"}, {"PH_A": "1 -DX"}, {"PH_A": ""}])
def test_macros_that_could_collide_or_break_out_are_refused(macros: dict[str, object]) -> None:
    with pytest.raises(DeviceError, match="not a kernel's macro"):
        define_macros(macros)


def test_headers_are_pasted_once_and_lines_keep_their_numbers() -> None:
    compiler = Compiler("sm_90a")
    compiler.add_source("a.cu", '#include "b.cuh"\n#include <cuda_fp16.h>\n  #  include "c.cuh"  // why\nlast\n')
    compiler.add_source("b.cuh", '#pragma once\n#include "c.cuh"\nb\n')
    compiler.add_source("c.cuh", "c\n")
    lines = compiler.source("a.cu").splitlines()
    assert [lines.count(name) for name in ("b", "c", "last", "#include <cuda_fp16.h>")] == [1, 1, 1, 1]
    file, number, seen = "", 0, {}
    for line in lines:
        if line.startswith("#line"):
            _, text, file = line.split()
            number = int(text)
        else:
            seen[line] = (file.strip('"'), number)
            number += 1
    assert seen["b"] == ("b.cuh", 3)
    assert seen["c"] == ("c.cuh", 1)
    assert seen["last"] == ("a.cu", 4)
    assert seen["#include <cuda_fp16.h>"] == ("a.cu", 2)


def test_headers_that_include_each_other_end() -> None:
    compiler = Compiler("sm_90a")
    compiler.add_source("a.cuh", '#include "b.cuh"\n')
    compiler.add_source("b.cuh", '#include "a.cuh"\n')
    assert "b.cuh" in compiler.source("a.cuh")


@pytest.mark.parametrize("name", ["missing.cu", "../compiler.py", "/etc/passwd", "sub/x.cu"])
def test_a_missing_source_names_itself_and_who_wants_it(name: str) -> None:
    compiler = Compiler("sm_90a")
    compiler.add_source("a.cu", f'#include "{name}"\n')
    with pytest.raises(DeviceError, match=f"a.cu wants the kernel source {name}, which does not exist"):
        compiler.source("a.cu")


def test_a_plugin_cannot_take_the_name_of_another_source() -> None:
    compiler = Compiler("sm_90a")
    compiler.add_source("mine.cu", "1")
    compiler.add_source("mine.cu", "1")
    with pytest.raises(DeviceError, match=r"another kernel source called mine\.cu"):
        compiler.add_source("mine.cu", "2")
    with pytest.raises(DeviceError, match=r"prelude\.cuh"):
        compiler.add_source("prelude.cuh", "")


@given(st.lists(st.floats(width=32), min_size=1))
def test_bfloat16_is_the_nearest_with_ties_to_even(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    got = float_to_bf16(values)
    for value, bits in zip(values, got, strict=True):
        back = bf16_to_float(np.array([bits]))[0]
        if np.isnan(value):
            assert np.isnan(back)
        elif np.isinf(value):
            assert back == value
        else:
            low = value.view(np.uint32) & np.uint32(0xFFFF0000)
            below, above = (np.array([low, low + np.uint32(0x10000)], np.uint32).view(np.float32)).astype(np.float64)
            above = above if np.isfinite(above) else np.copysign(2.0**128, float(value))
            near, far = abs(value - below), abs(value - above)
            chosen = below if near < far or (near == far and not (low >> 16) & 1) else above
            assert back == np.float32(chosen) if abs(chosen) < 2.0**128 else np.isinf(back)


def test_every_bfloat16_survives_the_way_there_and_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bf16_to_float(bits)
    numbers = ~np.isnan(values)
    assert np.array_equal(float_to_bf16(values)[numbers], bits[numbers])
    assert np.isnan(bf16_to_float(float_to_bf16(values[~numbers]))).all()


def test_ties_go_to_the_even_bfloat16() -> None:
    upper = np.arange(0x7F7F, dtype=np.uint32)  # All positive numbers but the greatest.
    for low, up in ((0x7FFF, 0), (0x8000, upper & 1), (0x8001, 1)):
        values = (upper << 16 | np.uint32(low)).view(np.float32)
        assert np.array_equal(float_to_bf16(values), upper + up)
        assert np.array_equal(float_to_bf16(-values), upper + up + 0x8000)


SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.sampled_from(sorted(DTYPES)), st.data())
def test_slices_are_where_numpy_says_they_are(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    array = Array(4096, shape, dtype)
    host = np.zeros(shape, f"V{DTYPES[dtype]}")
    assert array.nbytes == host.nbytes
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    part = array.slice_rows(start, stop)
    assert part.shape == host[start:stop].shape
    assert part.ptr - array.ptr == start * (host.strides[0] if host.size else part.size * array.itemsize)
    assert part.ptr + part.nbytes <= array.ptr + array.nbytes


def test_views_outside_an_array_are_refused() -> None:
    array = Array(4096, (4, 6), "f16")
    assert array.view("f32", 12) == Array(4096, (12,), "f32")
    assert array.at(8, "f16", 5) == Array(4104, (5,), "f16")
    assert array.reshape(2, 12).shape == (2, 12)
    for wrong in (
        lambda: array.view("f32", 13),
        lambda: array.at(46, "f16", 2),
        lambda: array.at(2, "f32", 1),
        lambda: array.at(49, "u8", 0),
        lambda: array.at(-1, "u8", 1),
        lambda: array.slice_rows(3, 5),
        lambda: array.slice_rows(-1, 2),
        lambda: array.reshape(5, 5),
        lambda: Array(4096, (2,), "f64"),
        lambda: Array(4096, (-1,), "f32"),
    ):
        with pytest.raises(DeviceError):
            wrong()
