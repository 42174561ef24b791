"""Loading and launching kernels on a GPU: arguments arrive as they should, and errors name the kernel."""

from __future__ import annotations

import numpy as np
import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.compiler import Compiler
from polyhead.runtime.cuda.context import Context

pytestmark = pytest.mark.gpu

SOURCE = """
#include "prelude.cuh"

extern "C" __global__ void arguments(int* out, int a, float b, long long c, int d, unsigned char e) {
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) {
    out[0] = a;
    out[1] = __float_as_int(b);
    out[2] = (int)(c >> 32);
    out[3] = d;
    out[4] = e;
    out[5] = blockDim.x;
    out[6] = gridDim.x * 10000 + gridDim.y * 100 + gridDim.z;
    out[7] = PH_NUMBER;
#ifdef PH_FLAG
    out[8] = 1;
#else
    out[8] = 0;
#endif
  }
}

extern "C" __global__ void reverse(const int* in, int* out, int n) {
  extern __shared__ int held[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) held[i] = in[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = held[n - 1 - i];
}
"""


@pytest.fixture(scope="module", autouse=True)
def _source(ctx: Context) -> None:
    ctx.compiler.add_source("test_compiler.cu", SOURCE)


def test_arguments_and_macros_arrive(ctx, poisoned, get) -> None:
    out = poisoned(9, "i32")
    args = (out, -7, 0.1, np.int64(5 << 32), True, np.uint8(200))
    ctx.launch("test_compiler.cu", "arguments", (4, 3, 2), 96, *args, macros={"PH_NUMBER": 42, "PH_FLAG": False})
    tenth = int(np.float32(0.1).view(np.int32))
    assert get(out).tolist() == [-7, tenth, 5, 1, 200, 96, 40302, 42, 0]
    ctx.launch("test_compiler.cu", "arguments", 1, 32, *args, macros={"PH_NUMBER": 43, "PH_FLAG": True})
    assert get(out).tolist()[5:] == [32, 10101, 43, 1]


@pytest.mark.parametrize("n", [1, 1000, 12 * 1024, 13 * 1024])
def test_shared_memory_beyond_48_kib_is_allowed(ctx, put, poisoned, get, n) -> None:
    values = np.arange(n, dtype=np.int32)
    out = poisoned(n, "i32")
    ctx.launch("test_compiler.cu", "reverse", 1, 256, put(values), out, n, shared=4 * n, macros={"PH_NUMBER": 0})
    assert np.array_equal(get(out), values[::-1])


def test_too_much_shared_memory_names_both_numbers(ctx, pool) -> None:
    limit = ctx.device.shared_limit
    a = pool.array(4, "i32")
    with pytest.raises(DeviceError, match=f"{limit + 4:,} bytes of shared memory per block.* has {limit:,}"):
        ctx.launch("test_compiler.cu", "reverse", 1, 32, a, a, 0, shared=limit + 4, macros={"PH_NUMBER": 0})


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        (1, 2000, r"test_compiler.cu:reverse \(grid 1x1x1, block 2000, shared 0 B, macros: PH_NUMBER=0\)"),
        (0, 32, "grid 0x1x1"),
        ((1, 70000, 1), 32, "grid 1x70000x1"),
    ],
)
def test_impossible_launches_name_the_kernel(ctx, pool, grid, block, message) -> None:
    a = pool.array(4, "i32")
    with pytest.raises(DeviceError, match=message):
        ctx.launch("test_compiler.cu", "reverse", grid, block, a, a, 0, macros={"PH_NUMBER": 0})


def test_wrong_arguments_are_refused_before_the_launch(ctx, pool) -> None:
    a = pool.array(4, "i32")
    macros = {"PH_NUMBER": 0}
    with pytest.raises(DeviceError, match=r"arguments have \[8, 8\] bytes, the kernel wants \[8, 8, 4\]"):
        ctx.launch("test_compiler.cu", "reverse", 1, 32, a, a, macros=macros)
    with pytest.raises(DeviceError, match=r"\[8, 8, 8\] bytes, the kernel wants \[8, 8, 4\]"):
        ctx.launch("test_compiler.cu", "reverse", 1, 32, a, a, a, macros=macros)
    with pytest.raises(DeviceError, match="4294967296 does not fit int32"):
        ctx.launch("test_compiler.cu", "reverse", 1, 32, a, a, 1 << 32, macros=macros)
    with pytest.raises(DeviceError, match="a str cannot be a kernel's argument"):
        ctx.launch("test_compiler.cu", "reverse", 1, 32, a, a, "4", macros=macros)


def test_a_missing_kernel_names_file_and_kernel(ctx) -> None:
    with pytest.raises(DeviceError, match=r"test_compiler.cu \(PH_NUMBER=0\) has no kernel nothing"):
        ctx.launch("test_compiler.cu", "nothing", 1, 32, macros={"PH_NUMBER": 0})


def test_a_kernel_from_the_disk_runs(ctx, poisoned, get, tmp_path) -> None:
    text = 'extern "C" __global__ void one(int* p) { *p = PH_VALUE; }'
    for cached in (False, True):
        compiler = Compiler(ctx.device.sm, tmp_path)
        compiler.add_source("one.cu", text)
        assert compiler.compile_many([("one.cu", {"PH_VALUE": 77})]) == (not cached)
        context = Context(ctx.device, compiler)
        out = poisoned(1, "i32")
        context.launch("one.cu", "one", 1, 1, out, macros={"PH_VALUE": 77})
        assert get(out).tolist() == [77]
