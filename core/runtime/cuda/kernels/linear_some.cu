// out = x W^T for quantised tiles and some tokens, 2 to 64 to a block, through the tensor core, in float16. Weights become
// float16 numbers of their own (scaled.cuh); or, with PH_SUMMED, they stay codes and sums are scaled (summed.cuh). The
// first costs two instructions for each pair of weights, the second four for each 32 columns of 16 rows and 8 tokens: with
// few tokens that is less, and instructions are what bounds the kernel.
//
// A block owns a run of whole tiles of 16 rows and PH_TOKEN_TILES columns of 8 tokens (the grid's y chooses which). Its
// warps stand in a grid of their own: PH_ROW_WARPS side by side, each with PH_TILES tiles, and K_WARPS of those behind one
// another, which share out the units of 256 columns. A pass takes all of them through K once; a block with more tiles
// makes several passes, and its loads run ahead across their borders. With PH_GATED a warp's second tile is the one of
// W's second half that its first one's result is multiplied with.
//
// Weights go from memory to registers, each vector as soon as the one before it in its place is used up, so that a whole
// unit is always under way. Activations come through a ring in shared memory, PH_STAGE_GROUPS groups of 32 columns at a
// time, which the row warps of one K warp fill and read together. Sums of the K warps meet in their order. With PH_SUMMED
// each warp has the scales of its tiles' unit in shared memory behind the rings, and sums the activations for itself, once
// for all of its tiles.

#include "linear.cuh"
#include "tile_stream.cuh"

constexpr int WARPS = 8, TILES = PH_TOKEN_TILES, R = PH_TILES, ROW_WARPS = PH_ROW_WARPS, K_WARPS = WARPS / ROW_WARPS;
constexpr int TOKENS = 8 * TILES, GROUPS = PH_STAGE_GROUPS, GROUP_BYTES = 64 * TOKENS;
constexpr int STAGE = GROUPS * GROUP_BYTES, RING = PH_RING;  // bytes and number of the ring's stages
constexpr int PART_TILES = TILES < 4 ? TILES : 4;            // columns of tokens that are summed at a time
constexpr int EACH = ph_div_up(16 * ROW_WARPS * 8 * PART_TILES, 32 * WARPS);  // sums of a thread
constexpr int SLOTS = R / PARTNERS;                          // tiles of a warp, or pairs of them
// What results are added to comes before they are there, if registers are left: two blocks hide each other's waits, and an
// activation has a bias at most.
#ifdef PH_ACTIVATED
constexpr bool EARLY = false;
#else
constexpr bool EARLY = PH_CTAS == 1;
#endif
static_assert(R % PARTNERS == 0);

extern "C" __global__ void __launch_bounds__(32 * WARPS, PH_CTAS)
    ph_linear_some(const u8* weights, const act_t* x, out_t* out, const float* bias, int tokens, int rows, int cols,
                   i64 tile_bytes, i64 ld, float scale, int accumulate) {
  extern __shared__ uint4 dynamic[];
  __shared__ float part[WARPS][16][8 * PART_TILES + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int k_warp = warp / ROW_WARPS, row_warp = warp % ROW_WARPS;
  u8* const ring = reinterpret_cast<u8*>(dynamic) + k_warp * RING * STAGE;
  u8* const own_shared = reinterpret_cast<u8*>(dynamic) + K_WARPS * RING * STAGE + warp * R * SCALE_ROOM;

  const int own_rows = rows / PARTNERS, all = ph_div_up(own_rows, 16), units = ph_div_up(cols, 256);
  // The block's tiles: wanted once a pass, so not kept in registers.
  __shared__ int run[WARPS][2];
  if (lane == 0) {
    const int first = (int)((i64)blockIdx.x * all / gridDim.x);
    run[warp][0] = first, run[warp][1] = (int)((i64)(blockIdx.x + 1) * all / gridDim.x) - first;
  }
  __syncwarp();
  auto passes = [&] { return ph_div_up((int)*(volatile int*)&run[warp][1], SLOTS * ROW_WARPS); };
  auto begin_of = [&](int pass) {
    const int count = *(volatile int*)&run[warp][1];
    return *(volatile int*)&run[warp][0] + pass * count / ph_div_up(count, SLOTS * ROW_WARPS);
  };
  const int own = k_warp < units ? ph_div_up(units - k_warp, K_WARPS) : 0;  // units of a pass
  const int token0 = TOKENS * blockIdx.y;
  x += (i64)token0 * cols;
  tokens = min(tokens - token0, TOKENS);

  // ---- weights: the tiles of a pass, and where the loads go on
  Tile<TILES> tile[R] = {};
  // From a tile's unit to the next one that the warp has, or to the first one of a pass.
  auto to_next = [&](bool begins, int pass) {
    if (!begins) {
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (tile[r].next != nullptr) tile[r].next += K_WARPS * PH_UNIT_BYTES;
    } else {
#pragma unroll
      for (int r = 0; r < R; ++r) tile[r].next = nullptr;
      if (pass >= passes() || own == 0) return;
      asm volatile("" : "+r"(pass));  // else what follows would be worked out before the loop, and keep registers
      const int from = begin_of(pass), to = begin_of(pass + 1);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int index = from + row_warp * SLOTS + r / PARTNERS;
        if (index < to) tile[r].find(weights, index + r % PARTNERS * all, k_warp, tile_bytes, lane);
      }
    }
  };
  to_next(true, 0);
#pragma unroll
  for (int r = 0; r < R; ++r) tile[r].load_all(k_warp, cols, lane);
  to_next(own == 1, 1);

  // ---- activations: a lane's share of a group is a piece of 16 bytes of every 8th token (with more row warps, fewer)
  int unfilled = passes() * own * (8 / GROUPS), fill_unit = k_warp, fill_group = 0;
  auto fill = [&](u8* slot) {
    if (unfilled > 0) {
      const int column = 256 * fill_unit + 32 * fill_group + 8 * t;
#pragma unroll
      for (int i = 0; i < ph_div_up(TILES, ROW_WARPS); ++i) {
        const int token = 8 * (i * ROW_WARPS + row_warp) + g;
        if (TILES % ROW_WARPS == 0 || token < TOKENS) {
          const bool there = token < tokens;
          const act_t* from = x + (i64)min(token, tokens - 1) * cols + column;
          u8* to = slot + 64 * token + ((16 * t) ^ ((token & 2) << 4));
#pragma unroll
          for (int j = 0; j < GROUPS; ++j) {
            const bool inside = there && (EVEN || column + 32 * j < cols);
            ph_cp_async16(to + j * GROUP_BYTES, from + 32 * j, inside);
          }
        }
      }
      fill_group += GROUPS;
      if (fill_group == 8) {
        fill_group = 0, fill_unit += K_WARPS;
        if (fill_unit >= units) fill_unit = k_warp;
      }
      --unfilled;
    }
    ph_cp_async_commit();
  };
  ph_wait_for_inputs();
  ph_let_next_begin();
#pragma unroll
  for (int s = 0; s < RING - 1; ++s) fill(ring + s * STAGE);

  const Store store{out, bias, own_rows, scale, accumulate};
#ifdef PH_SUMMED
  Sums<TILES> sums;
  sums.begin(g);
#endif
  u8* stage = ring;
  for (int pass = 0; pass < passes(); ++pass) {
    float acc[R][TILES][4] = {};
    for (int n = 0; n < own; ++n) {
      const int vectors = vectors_in(n + 1 == own ? k_warp : k_warp + K_WARPS * (n + 1), cols);  // of the unit to load
#ifdef PH_SUMMED
      sums.clear();
      __syncwarp();
#endif
#pragma unroll
      for (int r = 0; r < R; ++r) tile[r].begin(own_shared + r * SCALE_ROOM, lane);
#ifdef PH_SUMMED
      __syncwarp();
#endif
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
        if (j % GROUPS == 0) fill(stage == ring ? ring + (RING - 1) * STAGE : stage - STAGE);  // the one last read
#ifdef PH_SUMMED
        if (OFFSETS) sums.add(j, b);
#endif
#pragma unroll
        for (int r = 0; r < R; ++r) {
          tile[r].scaling.multiply(tile[r].now, own_shared + r * SCALE_ROOM, j, lane, b, acc[r]);
          tile[r].refill(j, vectors);
          if (j == 1) tile[r].refill_scales(lane);  // not earlier: registers are short
        }
        if ((j + 1) % GROUPS == 0) stage = stage == ring + (RING - 1) * STAGE ? ring : stage + STAGE;
      }
#ifdef PH_SUMMED
      if (OFFSETS) {
        u32 pairs[TILES][PARTS][2];
#pragma unroll
        for (int n8 = 0; n8 < TILES; ++n8)
#pragma unroll
          for (int p = 0; p < PARTS; ++p) sums.pair(n8, p, pairs[n8][p]);
#pragma unroll
        for (int r = 0; r < R; ++r) take_away(own_shared + r * SCALE_ROOM + SCALE_BYTES, lane, pairs, acc[r]);
      }
#endif
      to_next(own == 1 || n + 2 == own, own == 1 ? pass + 2 : pass + 1);
    }

    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // else what is made of it here would keep registers all along
    const int from = begin_of(pass), mine = begin_of(pass + 1) - from;
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll
      for (int n0 = 0; n0 < TILES; n0 += PART_TILES) {
        const int columns = min(tokens - 8 * n0, 8 * PART_TILES);
        // A thread's places, and what their sums are added to, asked for before the warps meet.
        auto place = [&](int i, i64& index, int& row) {
          const int at = thread + 32 * WARPS * i, w = (at >> 4) % ROW_WARPS, column = (at >> 4) / ROW_WARPS;
          const int tile_index = w * SLOTS + slot;
          row = 16 * (from + tile_index) + (at & 15);
          index = (i64)(token0 + 8 * n0 + column) * ld + row;
          return column < columns && tile_index < mine && row < own_rows;
        };
        Addends addends[EACH] = {};
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          i64 index;
          int row;
          if (EARLY && place(i, index, row)) addends[i] = store.fetch(index, row);
        }
        float sum[PARTNERS][EACH];  // of a thread's places, those without a token too: else sums would be kept all along
#pragma unroll
        for (int p = 0; p < PARTNERS; ++p) {
          __syncthreads();
#pragma unroll
          for (int n8 = 0; n8 < PART_TILES; ++n8)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (n0 + n8 < TILES)
                part[thread >> 5][(thread >> 2 & 7) + 8 * (e >> 1)][8 * n8 + 2 * (thread & 3) + (e & 1)] =
                    acc[slot * PARTNERS + p][n0 + n8][e];
          __syncthreads();
#pragma unroll
          for (int i = 0; i < EACH; ++i) {
            const int at = thread + 32 * WARPS * i, w = (at >> 4) % ROW_WARPS;
            const int column = min((at >> 4) / ROW_WARPS, 8 * PART_TILES);
            sum[p][i] = part[w][at & 15][column];
#pragma unroll
            for (int k = 1; k < K_WARPS; ++k) sum[p][i] += part[k * ROW_WARPS + w][at & 15][column];
          }
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          i64 index;
          int row;
          if (place(i, index, row))
            store(index, sum[0][i], sum[PARTNERS - 1][i], EARLY ? addends[i] : store.fetch(index, row));
        }
      }
  }
}
