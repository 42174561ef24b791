// out = x W^T for row-major weights of the activation type and 1 to 32 tokens: PH_TOKEN_TILES columns of 8 tokens, 16 rows
// to a block, through the tensor core. As in formats.cuh a lane's columns of a group of 32 are 8*t..8*t+7, so that 16
// bytes of a row are the fragments of two steps.
//
// PH_SCALAR: the number of columns is not a multiple of 8, and nothing is aligned.

#include "linear.cuh"

namespace {

// Elements k..k+7 of a row, zeros beyond its end.
__device__ __forceinline__ uint4 load8(const act_t* row, int k, int cols) {
#ifdef PH_SCALAR
  act_t e[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) e[i] = k + i < cols ? row[k + i] : ph_to_act(0.0f);
  act2_t p[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) p[i].x = e[2 * i], p[i].y = e[2 * i + 1];
  return make_uint4(ph_act2_bits(p[0]), ph_act2_bits(p[1]), ph_act2_bits(p[2]), ph_act2_bits(p[3]));
#else
  return k < cols ? ph_load128(row + k) : make_uint4(0, 0, 0, 0);
#endif
}

// The same for weights, which are read once.
__device__ __forceinline__ uint4 load8_once(const act_t* row, int k, int cols) {
#ifdef PH_SCALAR
  return load8(row, k, cols);
#else
  uint4 w = make_uint4(0, 0, 0, 0);
  if (k < cols) w = ph_ldg128_once(row + k);
  return w;
#endif
}

}  // namespace

constexpr int TILES = PH_TOKEN_TILES, AHEAD = 4;  // groups of 32 columns under way

extern "C" __global__ void __launch_bounds__(256, 2)
    ph_dense_few(const act_t* weights, const act_t* x, out_t* out, const float* bias, int tokens, int rows, int cols,
              i64 ld, float scale, int accumulate) {
  __shared__ float part[8][16][8 * TILES + 1];
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int first = 16 * blockIdx.x;
  const act_t* row[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) row[h] = weights + (i64)min(first + g + 8 * h, rows - 1) * cols;

  const act_t* token[TILES];  // columns beyond the tokens repeat the last one and are not stored
#pragma unroll
  for (int n = 0; n < TILES; ++n) token[n] = x + (i64)min(8 * n + g, tokens - 1) * cols;

  ph_wait_for_inputs();
  ph_let_next_begin();
  float acc[TILES][4] = {};
  for (int k = 32 * AHEAD * warp; k < cols; k += 32 * AHEAD * warps) {
    uint4 w[AHEAD][2];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) w[i][h] = load8_once(row[h], k + 32 * i + 8 * t, cols);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const u32 a[2][4] = {{w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y}, {w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w}};
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const uint4 v = load8(token[n], k + 32 * i + 8 * t, cols);
        const u32 b[2][2] = {{v.x, v.y}, {v.z, v.w}};
        ph_mma(acc[n], a[0], b[0]);
        ph_mma(acc[n], a[1], b[1]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) part[warp][g + 8 * (e >> 1)][8 * n + 2 * t + (e & 1)] = acc[n][e];
  sum_and_store<8 * TILES>(part, first, rows, tokens, ld, Store{out, bias, rows, scale, accumulate});
}
