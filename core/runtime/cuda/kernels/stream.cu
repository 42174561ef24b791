// The ceiling that decode is measured against: reading memory once, with nothing else to do. 16-byte loads, 8 of them
// under way in each thread; the sum is kept only so that no load can be left out.

#include "prelude.cuh"

constexpr int AHEAD = 8;

extern "C" __global__ void __launch_bounds__(512) ph_read(const uint4* data, u32* out, i64 vectors) {
  const i64 stride = (i64)gridDim.x * blockDim.x;
  u32 sum = 0;
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += AHEAD * stride) {
    uint4 v[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      v[a] = make_uint4(0, 0, 0, 0);
      if (i + a * stride < vectors) v[a] = ph_ldg128_once(data + i + a * stride);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) sum ^= v[a].x ^ v[a].y ^ v[a].z ^ v[a].w;
  }
  if (sum == 0x9e3779b9u) *out = sum;
}
