// Products of rows with the matrices of the experts they were sent to, through the tensor core. A block does 16 rows of
// one expert's matrix for one tile of tokens (see route.cu), so an expert that nobody chose is never read.
//
// Weights are the tensor core's a, 8 * PH_TOKEN_TILES tokens its b. The warps of a block share the columns out among
// themselves; their sums meet in shared memory in the order of the warps. A token's column is computed in the same way
// whatever stands in the others, so a row's result does not depend on its neighbours.
//
// Macros: PH_TOKEN_TILES; PH_CTAS, see below. PH_PAIR: half of the warps do `weights`, half `second`, and the result is
// silu(first) * second. PH_TIMES: the result is silu(what is in `out`) * product. Either, or PH_GATHER alone: tokens are
// rows of x, results rows of `out` in the order of the tiles, in the activations' type. Else the other way round:
// tokens in the order of the tiles, results where the pairs belong, in float32. Quantised weights: what formats.cuh
// wants. PH_SCALAR: dense weights whose columns are no multiple of 8.

#include "prelude.cuh"

#ifdef PH_LOW_BITS
#include "formats.cuh"
#endif

constexpr int TILES = PH_TOKEN_TILES, COLUMNS = 8 * TILES;
#if defined(PH_PAIR) || defined(PH_TIMES) || defined(PH_GATHER)
#define INWARD
typedef act_t out_t;
#else
typedef float out_t;
#endif

// Blocks for which registers are left on a multiprocessor. From 12.0 on the compiler needs more for the same.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int BLOCKS = 1;
#else
constexpr int BLOCKS = PH_CTAS;
#endif

struct Tile {
  int expert, first, count;
};

namespace {

#ifdef PH_LOW_BITS

// acc += the products of 16 rows, units first, first + step, ... of their columns.
__device__ __forceinline__ void multiply(float (&acc)[TILES][4], const u8* tile, const act_t* const (&token)[TILES],
                                         int cols, int first, int step) {
  const int lane = threadIdx.x & 31, t = lane & 3, units = ph_div_up(cols, 256);
  Unit q;
  if (first < units)
    load_unit(q, tile + (i64)first * PH_UNIT_BYTES, lane, ph_div_up(min(256, cols - 256 * first) * PH_LOW_BITS, 256));
  for (int u = first; u < units; u += step) {
    Scales scales;
    read_scales(q, scales);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      u32 a[2][4], b[TILES][2][2];
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const act_t* x = token[n] + 256 * u + 32 * j;
        const bool inside = PH_BLOCK == 256 || 256 * u + 32 * j < cols;
#if PH_GROUP == 16
        uint2 low = make_uint2(0, 0), high = low;
        if (inside) low = ph_ldg64(x + 4 * t), high = ph_ldg64(x + 16 + 4 * t);
        b[n][0][0] = low.x, b[n][0][1] = low.y, b[n][1][0] = high.x, b[n][1][1] = high.y;
#else
        uint4 both = make_uint4(0, 0, 0, 0);
        if (inside) both = ph_ldg128(x + 8 * t);
        b[n][0][0] = both.x, b[n][0][1] = both.y, b[n][1][0] = both.z, b[n][1][1] = both.w;
#endif
      }
      fragment(q, 2 * j, a[0]);
      fragment(q, 2 * j + 1, a[1]);
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        float factor[2], minimum[2];
        group_scales(scales, j, p, factor, minimum);
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
          float d[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
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
    const int next = u + step;
    if (next < units)
      load_unit(q, tile + (i64)next * PH_UNIT_BYTES, lane, ph_div_up(min(256, cols - 256 * next) * PH_LOW_BITS, 256));
  }
}

#else

// Elements k..k+7 of a row, zeros beyond its end.
template <bool ONCE> __device__ __forceinline__ uint4 load8(const act_t* row, int k, int cols) {
#ifdef PH_SCALAR
  u32 r[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    act2_t pair;
    pair.x = k + 2 * i < cols ? row[k + 2 * i] : ph_to_act(0.0f);
    pair.y = k + 2 * i + 1 < cols ? row[k + 2 * i + 1] : ph_to_act(0.0f);
    r[i] = ph_act2_bits(pair);
  }
  return make_uint4(r[0], r[1], r[2], r[3]);
#else
  if (k >= cols) return make_uint4(0, 0, 0, 0);
  return ONCE ? ph_ldg128_once(row + k) : ph_ldg128(row + k);
#endif
}

constexpr int AHEAD = 4;  // groups of 32 columns under way

// acc += the products of rows g and g + 8, parts first, first + step, ... of 128 columns.
__device__ __forceinline__ void multiply(float (&acc)[TILES][4], const act_t* const (&row)[2],
                                         const act_t* const (&token)[TILES], int cols, int first, int step) {
  const int t = threadIdx.x & 3;
  for (int k = 32 * AHEAD * first; k < cols; k += 32 * AHEAD * step) {
    uint4 w[AHEAD][2];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) w[i][h] = load8<true>(row[h], k + 32 * i + 8 * t, cols);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const u32 a[2][4] = {{w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y}, {w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w}};
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const uint4 v = load8<false>(token[n], k + 32 * i + 8 * t, cols);
        const u32 b[2][2] = {{v.x, v.y}, {v.z, v.w}};
        ph_mma(acc[n], a[0], b[0]);
        ph_mma(acc[n], a[1], b[1]);
      }
    }
  }
}

#endif

[[maybe_unused]] __device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

}  // namespace

// Matrices [rows, cols]; `item_bytes` from one expert's to the next, `tile_bytes` from 16 rows to the next. `used` is the
// number of pairs of a row. Grid: (tiles, blocks of 16 rows): neighbours read the same weights for other tokens.
extern "C" __global__ void __launch_bounds__(256, BLOCKS)
    ph_moe_project(const u8* weights, const u8* second, const act_t* x, out_t* out, const int* order, const Tile* tiles,
                   int used, int rows, int cols, i64 item_bytes, i64 tile_bytes) {
  __shared__ float part[8][16][COLUMNS + 1];
  const Tile tile = tiles[blockIdx.x];
  if (tile.count == 0) return;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, warp = threadIdx.x >> 5;
  const int first_row = 16 * blockIdx.y;

  const act_t* token[TILES];  // columns beyond the tokens repeat the last one and are not stored
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const int at = tile.first + min(8 * n + g, tile.count - 1);
#ifdef INWARD
    token[n] = x + (i64)(order[at] / used) * cols;
#else
    token[n] = x + (i64)at * cols;
#endif
  }

#ifdef PH_PAIR
  const int warps = blockDim.x >> 6;
  const u8* base = (warp < warps ? weights : second) + tile.expert * item_bytes;
#else
  const int warps = blockDim.x >> 5;
  const u8* base = weights + tile.expert * item_bytes;
#endif
  float acc[TILES][4] = {};
#ifdef PH_LOW_BITS
  multiply(acc, base + blockIdx.y * tile_bytes, token, cols, warp % warps, warps);
#else
  const act_t* row[2];
#pragma unroll
  for (int h = 0; h < 2; ++h)
    row[h] = reinterpret_cast<const act_t*>(base) + (i64)min(first_row + g + 8 * h, rows - 1) * cols;
  multiply(acc, row, token, cols, warp % warps, warps);
#endif
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) part[warp][g + 8 * (e >> 1)][8 * n + 2 * t + (e & 1)] = acc[n][e];
  __syncthreads();

  for (int n = threadIdx.x; n < 16 * tile.count; n += blockDim.x) {
    const int r = n & 15, column = n >> 4;
    if (first_row + r >= rows) continue;
    float sum = part[0][r][column];
    for (int w = 1; w < warps; ++w) sum += part[w][r][column];
#ifdef INWARD
    out_t* to = out + (i64)(tile.first + column) * rows + first_row + r;
#if defined(PH_PAIR)
    float up = part[warps][r][column];
    for (int w = 1; w < warps; ++w) up += part[warps + w][r][column];
    *to = ph_to_act(silu(sum) * up);
#elif defined(PH_TIMES)
    *to = ph_to_act(silu(ph_to_float(*to)) * sum);
#else
    *to = ph_to_act(sum);
#endif
#else
    out[(i64)order[tile.first + column] * rows + first_row + r] = sum;
#endif
  }
}
