// out = x W^T for quantised tiles and some tokens, 2 to 64 to a block, through the tensor core, in float16: weights become
// float16 numbers of their own (scaled.cuh).
//
// A block owns a run of whole tiles of 16 rows and PH_TOKEN_TILES columns of 8 tokens (the grid's y chooses which). Its
// warps stand in a grid of their own: PH_ROW_WARPS side by side, each with PH_TILES tiles, and K_WARPS of those behind one
// another, which share out the units of 256 columns. A pass takes all of them through K once; a block with more tiles
// makes several passes, and its loads run ahead across their borders. With PH_GATED a warp's second tile is the one of
// W's second half that its first one's result is multiplied with.
//
// Weights go from memory to registers, each vector as soon as the one before it in its place is used up, so that a whole
// unit is always under way. Activations come through a ring in shared memory, PH_STAGE_GROUPS groups of 32 columns at a
// time, which the row warps of one K warp fill and read together. Sums of the K warps meet in their order.

#include "linear.cuh"
#include "scaled.cuh"

constexpr int WARPS = 8, TILES = PH_TOKEN_TILES, R = PH_TILES, ROW_WARPS = PH_ROW_WARPS, K_WARPS = WARPS / ROW_WARPS;
constexpr int TOKENS = 8 * TILES, GROUPS = PH_STAGE_GROUPS, GROUP_BYTES = 64 * TOKENS;
constexpr int STAGE = GROUPS * GROUP_BYTES, RING = PH_RING;  // bytes and number of the ring's stages
constexpr int PART_TILES = TILES < 4 ? TILES : 4;            // columns of tokens that are summed at a time
constexpr int EACH = ph_div_up(16 * ROW_WARPS * 8 * PART_TILES, 32 * WARPS);  // sums of a thread
constexpr int SLOTS = R / PARTNERS;                          // tiles of a warp, or pairs of them
static_assert(R % PARTNERS == 0);

namespace {

// A lane's share of a unit of a tile, and where in memory the next one is. Its columns of a group of 32 are 8*t..8*t+7 or,
// where 16 weights share a scale, 4*t..4*t+3 and 16 more: the same of weights and activations, so sums do not change.
constexpr bool SPLIT = PH_GROUP == 16, EVEN = PH_BLOCK == 256;

struct Tile {
  Unit now;
  Packed scales;
  u32 factor[2], minus[2];  // of the step under way
  const u8* next;           // null: there is none

  __device__ __forceinline__ void find(const u8* weights, int tile, int unit, i64 tile_bytes) {
    next = weights + tile * tile_bytes + (i64)unit * PH_UNIT_BYTES;
  }
  __device__ __forceinline__ void load_all(int unit, int cols, int lane) {
    if (next != nullptr) load_unit(now, next, lane, vectors_in(unit, cols));
  }
  __device__ __forceinline__ void begin(int lane) {
    pack(now, scales);
    if (next != nullptr) load_scales(now, next, lane);
  }
  __device__ __forceinline__ void prepare(int j, int s, int lane) {
    if (s < PARTS) scales_of(scales, j, s, lane, factor, minus);
  }
  __device__ __forceinline__ void step(int j, int s, u32 (&a)[4]) const {
    weights_of_step(now, 2 * j + s, factor, minus, a);
  }
  __device__ __forceinline__ void refill(int j, int unit, int cols, int lane) {
    if (next == nullptr) return;
    if ((j + 1) % LOW_GROUPS == 0) load_low(now, next, lane, j / LOW_GROUPS, vectors_in(unit, cols));
    if (PH_HIGH_BITS && (j + 1) % HIGH_GROUPS == 0) load_high(now, next, lane, j / HIGH_GROUPS);
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS, PH_CTAS)
    ph_linear_some(const u8* weights, const act_t* x, out_t* out, const float* bias, int tokens, int rows, int cols,
                   i64 tile_bytes, i64 ld, float scale, int accumulate) {
  extern __shared__ uint4 dynamic[];
  __shared__ float part[WARPS][16][8 * PART_TILES + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int k_warp = warp / ROW_WARPS, row_warp = warp % ROW_WARPS;
  u8* const ring = reinterpret_cast<u8*>(dynamic) + k_warp * RING * STAGE;

  const int own_rows = rows / PARTNERS, all = ph_div_up(own_rows, 16), units = ph_div_up(cols, 256);
  const int first = (int)((i64)blockIdx.x * all / gridDim.x);
  const int count = (int)((i64)(blockIdx.x + 1) * all / gridDim.x) - first;
  const int passes = ph_div_up(count, SLOTS * ROW_WARPS);
  const int own = k_warp < units ? ph_div_up(units - k_warp, K_WARPS) : 0;  // units of a pass
  const int token0 = TOKENS * blockIdx.y;
  x += (i64)token0 * cols;
  tokens = min(tokens - token0, TOKENS);

  // ---- weights: the tiles of a pass, and where the loads go on
  auto begin_of = [&](int pass) { return first + pass * count / passes; };
  Tile tile[R] = {};
  int next_pass = 0, next_n = 0, next_unit = 0;
  auto to_next = [&] {
#pragma unroll
    for (int r = 0; r < R; ++r) tile[r].next = nullptr;
    if (next_pass >= passes || own == 0) return;
    next_unit = k_warp + K_WARPS * next_n;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int index = begin_of(next_pass) + row_warp * SLOTS + r / PARTNERS;
      if (index < begin_of(next_pass + 1)) tile[r].find(weights, index + r % PARTNERS * all, next_unit, tile_bytes);
    }
    if (++next_n == own) next_n = 0, ++next_pass;
  };
  to_next();
#pragma unroll
  for (int r = 0; r < R; ++r) tile[r].load_all(next_unit, cols, lane);
  to_next();

  // ---- activations: a lane's share of a group is a piece of 16 bytes of every 8th token (with more row warps, fewer)
  const int steps = passes * own * (8 / GROUPS);
  int filled = 0, fill_unit = k_warp, fill_group = 0, fill_slot = 0;
  auto fill = [&] {
    if (filled < steps) {
      const int column = 256 * fill_unit + 32 * fill_group + 8 * t;
#pragma unroll
      for (int i = 0; i < ph_div_up(TILES, ROW_WARPS); ++i) {
        const int token = 8 * (i * ROW_WARPS + row_warp) + g;
        if (TILES % ROW_WARPS == 0 || token < TOKENS) {
          const bool there = token < tokens;
          const act_t* from = x + (there ? (i64)token * cols + column : 0);
          u8* to = ring + fill_slot * STAGE + 64 * token + ((16 * t) ^ ((token & 2) << 4));
#pragma unroll
          for (int j = 0; j < GROUPS; ++j) {
            const bool inside = there && (EVEN || column + 32 * j < cols);
            ph_cp_async16(to + j * GROUP_BYTES, inside ? from + 32 * j : x, inside);
          }
        }
      }
      fill_group += GROUPS;
      if (fill_group == 8) {
        fill_group = 0, fill_unit += K_WARPS;
        if (fill_unit >= units) fill_unit = k_warp;
      }
      fill_slot = fill_slot + 1 == RING ? 0 : fill_slot + 1;
      ++filled;
    }
    ph_cp_async_commit();
  };
  ph_wait_for_inputs();
  ph_let_next_begin();
#pragma unroll
  for (int s = 0; s < RING - 1; ++s) fill();

#ifdef PH_ACTIVATED
  const StoreActivated store{out, bias, own_rows};
#else
  const Store store{out, bias, scale, accumulate};
#endif
  const u8* stage = ring;
  for (int pass = 0; pass < passes; ++pass) {
    float acc[R][TILES][4] = {};
    for (int n = 0; n < own; ++n) {
#pragma unroll
      for (int r = 0; r < R; ++r) tile[r].begin(lane);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j % GROUPS == 0) {
          ph_cp_async_wait<RING - 2>();
          if (ROW_WARPS == 1)
            __syncwarp();
          else if (ROW_WARPS == WARPS)
            __syncthreads();
          else
            ph_sync_some(1 + k_warp, 32 * ROW_WARPS);
        }
        u32 b[TILES][4];
#pragma unroll
        for (int n8 = 0; n8 < TILES; ++n8) {
          const u8* row = stage + j % GROUPS * GROUP_BYTES + 64 * (8 * n8 + g);
          const int swap = (g & 2) << 4;
          if (SPLIT) {
            const uint2 low = *reinterpret_cast<const uint2*>(row + ((8 * t) ^ swap));
            const uint2 high = *reinterpret_cast<const uint2*>(row + ((32 + 8 * t) ^ swap));
            b[n8][0] = low.x, b[n8][1] = low.y, b[n8][2] = high.x, b[n8][3] = high.y;
          } else {
            const uint4 both = *reinterpret_cast<const uint4*>(row + ((16 * t) ^ swap));
            b[n8][0] = both.x, b[n8][1] = both.y, b[n8][2] = both.z, b[n8][3] = both.w;
          }
        }
        if (j % GROUPS == 0) fill();
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            tile[r].prepare(j, s, lane);
            u32 a[4];
            tile[r].step(j, s, a);
#pragma unroll
            for (int n8 = 0; n8 < TILES; ++n8) {
              const u32 pair[2] = {b[n8][2 * s], b[n8][2 * s + 1]};
              ph_mma(acc[r][n8], a, pair);
            }
          }
          tile[r].refill(j, next_unit, cols, lane);
        }
        if ((j + 1) % GROUPS == 0) stage = stage == ring + (RING - 1) * STAGE ? ring : stage + STAGE;
      }
      to_next();
    }

    const int from = begin_of(pass), mine = begin_of(pass + 1) - from;
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll
      for (int n0 = 0; n0 < TILES; n0 += PART_TILES) {
        const int columns = min(tokens - 8 * n0, 8 * PART_TILES);
        float sum[PARTNERS][EACH];  // of a thread's places
#pragma unroll
        for (int p = 0; p < PARTNERS; ++p) {
          __syncthreads();
#pragma unroll
          for (int n8 = 0; n8 < PART_TILES; ++n8)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (n0 + n8 < TILES)
                part[warp][g + 8 * (e >> 1)][8 * n8 + 2 * t + (e & 1)] = acc[slot * PARTNERS + p][n0 + n8][e];
          __syncthreads();
#pragma unroll
          for (int i = 0; i < EACH; ++i) {
            const int at = threadIdx.x + 32 * WARPS * i, w = (at >> 4) % ROW_WARPS, column = (at >> 4) / ROW_WARPS;
            if (column >= columns) continue;
            sum[p][i] = part[w][at & 15][column];
#pragma unroll
            for (int k = 1; k < K_WARPS; ++k) sum[p][i] += part[k * ROW_WARPS + w][at & 15][column];
          }
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          const int at = threadIdx.x + 32 * WARPS * i, w = (at >> 4) % ROW_WARPS, column = (at >> 4) / ROW_WARPS;
          const int tile_index = w * SLOTS + slot, row = 16 * (from + tile_index) + (at & 15);
          if (column >= columns || tile_index >= mine || row >= own_rows) continue;
          const i64 index = (i64)(token0 + 8 * n0 + column) * ld + row;
#ifdef PH_ACTIVATED
          store(index, row, sum[0][i], sum[PARTNERS - 1][i]);
#else
          store(index, row, sum[0][i]);
#endif
        }
      }
  }
}
