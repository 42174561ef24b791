"""The helpers that all kernels share: each of prelude.cuh's functions does what its comment says."""

from __future__ import annotations

import numpy as np
import pytest
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.device import bf16_to_float, float_to_bf16

pytestmark = pytest.mark.gpu

SOURCE = """
#include "prelude.cuh"

extern "C" __global__ void reduce(const float* in, float* sum, float* most, int n) {
  __shared__ float scratch[32];
  float s = 0.0f, m = -PH_INFINITY;
  for (int i = threadIdx.x; i < n; i += blockDim.x) { s += in[i]; m = fmaxf(m, in[i]); }
  s = ph_block_sum(s, scratch);
  m = ph_block_max(m, scratch);
  s = s + ph_block_sum(0.0f, scratch);
  sum[threadIdx.x] = s;
  most[threadIdx.x] = m;
}

extern "C" __global__ void groups(const float* in, float* sum, float* most) {
  sum[threadIdx.x] = ph_warp_sum<4>(in[threadIdx.x]);
  most[threadIdx.x] = ph_warp_max<8>(in[threadIdx.x]);
}

// a [16, 16] and b [8, 16] row-major in, d [16, 8] out: through shared memory, ldmatrix and one tensor-core step.
extern "C" __global__ void product(const act_t* a, const act_t* b, float* d) {
  __shared__ __align__(16) act_t sa[16 * 16], sb[8 * 16];
  const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
  ph_cp_async16(sa + lane * 8, a + lane * 8);
  ph_cp_async16(sb + (lane & 15) * 8, b + (lane & 15) * 8, true);
  ph_cp_async_commit();
  ph_cp_async_wait<0>();
  __syncthreads();
  u32 fa[4], fb[2];
  ph_ldmatrix4(fa, sa + (lane & 15) * 16 + (lane >> 4) * 8);
  fb[0] = *reinterpret_cast<const u32*>(sb + g * 16 + 2 * t);
  fb[1] = *reinterpret_cast<const u32*>(sb + g * 16 + 2 * t + 8);
  float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  ph_mma(c, fa, fb);
  d[g * 8 + 2 * t] = c[0];
  d[g * 8 + 2 * t + 1] = c[1];
  d[(g + 8) * 8 + 2 * t] = c[2];
  d[(g + 8) * 8 + 2 * t + 1] = c[3];
}

// The same with b stored [16, 8], fetched transposed.
extern "C" __global__ void product_transposed(const act_t* a, const act_t* b, float* d) {
  __shared__ __align__(16) act_t sa[16 * 16], sb[2][16 * 8];
  const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
  reinterpret_cast<uint4*>(sa)[lane] = ph_ldg128(a + lane * 8);
  reinterpret_cast<uint4*>(sb)[lane] = ph_ldg128_once(b + (lane & 15) * 8);
  __syncthreads();
  u32 fa[4], both[4];
  ph_ldmatrix4(fa, sa + (lane & 15) * 16 + (lane >> 4) * 8);
  ph_ldmatrix4_transposed(both, &sb[lane >> 4][(lane & 15) * 8]);
  const u32 fb[2] = {both[2], both[3]};
  float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  ph_mma(c, fa, fb);
  d[g * 8 + 2 * t] = c[0];
  d[g * 8 + 2 * t + 1] = c[1];
  d[(g + 8) * 8 + 2 * t] = c[2];
  d[(g + 8) * 8 + 2 * t + 1] = c[3];
}

extern "C" __global__ void convert(const float* in, act_t* one, act_t* two, float* back, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) one[i] = ph_to_act(in[i]);
  if (2 * i + 1 < n) {
    const act2_t pair = ph_bits_act2(ph_act2_bits(ph_to_act2(in[2 * i], in[2 * i + 1])));
    reinterpret_cast<act2_t*>(two)[i] = pair;
    const float2 floats = ph_to_float2(pair);
    back[2 * i] = floats.x;
    back[2 * i + 1] = ph_to_float(ph_to_act(floats.y));
  }
}

// Zeros where not valid, and the three widths of loads.
extern "C" __global__ void loads(const u32* in, u32* out) {
  __shared__ __align__(16) u32 held[8];
  if (threadIdx.x < 2) ph_cp_async16(held + 4 * threadIdx.x, in, threadIdx.x == 0);
  ph_cp_async_commit();
  ph_cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 8; ++i) out[i] = held[i];
    const uint2 two = ph_ldg64(in), once = ph_ldg64_once(in + 2);
    out[8] = two.x; out[9] = two.y; out[10] = once.x; out[11] = once.y;
    out[12] = ph_ldg32(in + 1); out[13] = ph_ldg32_once(in + 3);
    out[14] = ph_div_up(7, 3); out[15] = ph_div_up(6, 3);
  }
}
"""


@pytest.fixture(scope="module", autouse=True)
def _source(ctx: Context) -> None:
    ctx.compiler.add_source("test_prelude.cu", SOURCE)


def _macros(dtype: str) -> dict[str, object]:
    return {"PH_ACT_BF16": dtype == "bf16"}


def _skip_old(ctx: Context, dtype: str) -> None:
    if dtype == "bf16" and ctx.device.cc < (8, 0):
        pytest.skip(f"{ctx.device} has no bfloat16")


@pytest.mark.parametrize("threads", [32, 96, 256, 1024])
@pytest.mark.parametrize("n", [1, 31, 1000, 5001])
def test_block_reductions(ctx, put, poisoned, get, threads, n) -> None:
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32) - 5
    total, most = poisoned(threads, "f32"), poisoned(threads, "f32")
    ctx.launch("test_prelude.cu", "reduce", 1, threads, put(values), total, most, n)
    sums = get(total)
    assert (sums == sums[0]).all(), "every thread has the same bits"
    assert sums[0] == pytest.approx(values.astype(np.float64).sum(), rel=1e-5)
    assert (get(most) == values.max()).all()


def test_groups_of_lanes(ctx, put, poisoned, get) -> None:
    values = np.random.default_rng(5).standard_normal(32).astype(np.float32)
    total, most = poisoned(32, "f32"), poisoned(32, "f32")
    ctx.launch("test_prelude.cu", "groups", 1, 32, put(values), total, most)
    assert get(total) == pytest.approx(np.repeat(values.reshape(8, 4).sum(1), 4), rel=1e-5, abs=1e-6)
    assert np.array_equal(get(most), np.repeat(values.reshape(4, 8).max(1), 8))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_tensor_core_step_and_shared_memory_fragments(ctx, put, poisoned, get, dtype) -> None:
    _skip_old(ctx, dtype)
    rng = np.random.default_rng(6)
    a, b = rng.integers(-8, 9, (16, 16)).astype(np.float32), rng.integers(-8, 9, (8, 16)).astype(np.float32)
    d = poisoned((16, 8), "f32")
    ctx.launch("test_prelude.cu", "product", 1, 32, put(a, dtype), put(b, dtype), d, macros=_macros(dtype))
    assert np.array_equal(get(d), a @ b.T + 1)
    d = poisoned((16, 8), "f32")
    stored = np.ascontiguousarray(b.T)
    ctx.launch(
        "test_prelude.cu", "product_transposed", 1, 32, put(a, dtype), put(stored, dtype), d, macros=_macros(dtype)
    )
    assert np.array_equal(get(d), a @ b.T)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_conversions_round_to_nearest_even(ctx, put, poisoned, get, dtype) -> None:
    _skip_old(ctx, dtype)
    n = 1 << 16
    bits = np.random.default_rng(7).integers(0, 1 << 32, n, np.uint32)
    values = np.where(np.abs(bits.view(np.float32)) < 6e4, bits.view(np.float32), np.float32(1.0))
    values[:4] = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8]  # Ties.
    one, two, back = poisoned(n, dtype), poisoned(n, dtype), poisoned(n, "f32")
    ctx.launch("test_prelude.cu", "convert", n // 256, 256, put(values), one, two, back, n, macros=_macros(dtype))
    expected = bf16_to_float(float_to_bf16(values)) if dtype == "bf16" else values.astype(np.float16).astype(np.float32)
    for got in (get(one), get(two), get(back)):
        assert np.array_equal(got.astype(np.float32), expected)


def test_loads(ctx, put, poisoned, get) -> None:
    out = poisoned(16, "u32")
    ctx.launch("test_prelude.cu", "loads", 1, 32, put(np.array([11, 22, 33, 44], np.uint32)), out)
    assert get(out).tolist() == [11, 22, 33, 44, 0, 0, 0, 0, 11, 22, 33, 44, 22, 44, 3, 2]
