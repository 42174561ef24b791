// out = x W^T for quantised tiles and 1 to 32 tokens, in columns of 8. A block owns 16 rows; its warps share the units of K
// out among themselves, each holding one unit in registers while the next is under way; scales are applied group by
// group; sums meet in shared memory in the order of the warps. PH_TOKEN_TILES columns of 8 tokens.

#include "formats.cuh"
#include "linear.cuh"

namespace {

// Units that a warp holds or waits for. From 12.0 on the compiler needs more registers for the same.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int STAGES = 1;
#else
constexpr int STAGES = PH_STAGES;
#endif

// b of both steps of a group from one token's activations: zero where the group is outside.
__device__ __forceinline__ void load_b(u32 (&b)[2][2], const act_t* group, int t, bool inside) {
#if PH_GROUP == 16
  uint2 low = make_uint2(0, 0), high = low;
  if (inside) low = ph_load64(group + 4 * t), high = ph_load64(group + 16 + 4 * t);
  b[0][0] = low.x, b[0][1] = low.y, b[1][0] = high.x, b[1][1] = high.y;
#else
  uint4 both = make_uint4(0, 0, 0, 0);
  if (inside) both = ph_load128(group + 8 * t);
  b[0][0] = both.x, b[0][1] = both.y, b[1][0] = both.z, b[1][1] = both.w;
#endif
}

}  // namespace

constexpr int TILES = PH_TOKEN_TILES;

extern "C" __global__ void __launch_bounds__(256, PH_CTAS)
    ph_linear_few(const u8* weights, const act_t* x, out_t* out, const float* bias, int tokens, int rows, int cols,
               i64 tile_bytes, i64 ld, float scale, int accumulate) {
  __shared__ float part[8][16][8 * TILES + 1];
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, units = ph_div_up(cols, 256);
  const u8* tile = weights + blockIdx.x * tile_bytes;
  const act_t* token[TILES];  // columns beyond the tokens repeat the last one and are not stored
#pragma unroll
  for (int n = 0; n < TILES; ++n) token[n] = x + (i64)min(8 * n + g, tokens - 1) * cols;

  float acc[TILES][4] = {};
  Unit q[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; ++s)
    if (warp + s * warps < units)
      load_unit(q[s], tile + (i64)(warp + s * warps) * PH_UNIT_BYTES, lane, vectors_in(warp + s * warps, cols));
  ph_wait_for_inputs();
  ph_let_next_begin();
  for (int first = warp; first < units; first += STAGES * warps)
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      const int u = first + s * warps, next = u + STAGES * warps;
      if (u >= units) break;
      Scales scales;
      read_scales(q[s], scales);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        u32 b[TILES][2][2], a[2][4];
#pragma unroll
        for (int n = 0; n < TILES; ++n)
          load_b(b[n], token[n] + 256 * u + 32 * j, t, PH_BLOCK == 256 || 256 * u + 32 * j < cols);
        fragment(q[s], 2 * j, a[0]);
        fragment(q[s], 2 * j + 1, a[1]);
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
          float factor[2], minimum[2];
          group_scales(scales, j, p, factor, minimum);
#pragma unroll
          for (int n = 0; n < TILES; ++n) {
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}, d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            ph_mma(d, a[p], b[n][p]);
            if (PARTS == 1) ph_mma(d, a[1], b[n][1]);
            if (NEEDS_SUMS) {
              const u32 ones[4] = {ONES, ONES, ONES, ONES};
              ph_mma(sum, ones, b[n][p]);
              if (PARTS == 1) ph_mma(sum, ones, b[n][1]);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int h = e >> 1;
              if (BIAS[h] != 0.0f) d[e] = fmaf(-BIAS[h], sum[e & 1], d[e]);
              acc[n][e] = fmaf(factor[h], d[e], acc[n][e]);
              if (PH_HAS_MIN) acc[n][e] = fmaf(-minimum[h], sum[e & 1], acc[n][e]);
            }
          }
        }
      }
      if (next < units) load_unit(q[s], tile + (i64)next * PH_UNIT_BYTES, lane, vectors_in(next, cols));
    }
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) part[warp][g + 8 * (e >> 1)][8 * n + 2 * t + (e & 1)] = acc[n][e];
  sum_and_store<8 * TILES>(part, 16 * blockIdx.x, rows, tokens, ld, Store{out, bias, rows, scale, accumulate});
}
