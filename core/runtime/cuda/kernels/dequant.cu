// Tiles back to a row-major matrix: float32 (exactly the values of the blocks) or rounded to the activation type, which
// is what a library product for many tokens reads. A warp writes one unit.

#include "formats.cuh"
#include "linear.cuh"

namespace {

template <int N> __device__ __forceinline__ void write(float* to, const float* w) {
#pragma unroll
  for (int n = 0; n < N; n += 4) *reinterpret_cast<float4*>(to + n) = make_float4(w[n], w[n + 1], w[n + 2], w[n + 3]);
}

template <int N> __device__ __forceinline__ void write(act_t* to, const float* w) {
  u32 r[N / 2];
#pragma unroll
  for (int n = 0; n < N / 2; ++n) r[n] = ph_act2_bits(ph_to_act2(w[2 * n], w[2 * n + 1]));
  if (N == 8)
    *reinterpret_cast<uint4*>(to) = make_uint4(r[0], r[1], r[N / 2 - 2], r[N / 2 - 1]);
  else
    *reinterpret_cast<uint2*>(to) = make_uint2(r[0], r[1]);
}

}  // namespace

// out [count, cols] = rows first..first + count. Grid: (tiles that hold them, units / 4), 128 threads.
extern "C" __global__ void __launch_bounds__(128)
    ph_dequantise(const u8* weights, out_t* out, int first, int count, int cols, i64 tile_bytes) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int index = blockIdx.y * (blockDim.x >> 5) + (threadIdx.x >> 5), units = ph_div_up(cols, 256);
  if (index >= units) return;
  const int tile = first / 16 + blockIdx.x, left = cols - 256 * index;
  Unit q;
  load_unit(q, weights + tile * tile_bytes + (i64)index * PH_UNIT_BYTES, lane,
            ph_div_up(min(256, left) * PH_LOW_BITS, 256));
  Scales scales;
  read_scales(q, scales);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float w[2][8];
    weights_of_group(q, scales, j, w);
    if (32 * j >= left) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * tile + g + 8 * h - first;
      if (row < 0 || row >= count) continue;
      out_t* to = out + (i64)row * cols + 256 * index + 32 * j;
#if PH_GROUP == 16
      write<4>(to + 4 * t, w[h]);
      write<4>(to + 16 + 4 * t, w[h] + 4);
#else
      write<8>(to + 8 * t, w[h]);
#endif
    }
  }
}
