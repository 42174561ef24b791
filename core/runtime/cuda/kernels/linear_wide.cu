// out = x W^T for quantised tiles and many tokens, 33 to some hundred, in float16 through Hopper's wgmma (compute
// capability 9.0 only). Weights become float16 numbers in registers, as scaled.cuh has them, and are its A; the tokens' x
// is B and stays in shared memory, where the tensor core reads it once for 64 rows.
//
// A block has PH_GROUPS warpgroups of 128 threads, ROW_GROUPS side by side with 64 rows, four tiles, each, and K_GROUPS
// behind one another, which share the units of 256 columns out among themselves. A pass takes them through K once; a block
// with more tiles makes several, and its loads run ahead across their borders. The grid's y chooses PH_TOKENS tokens. With
// PH_GATED every second warp has the tile of W's second half that its neighbour's result is multiplied with.
//
// x comes in the order in which it is multiplied: gather_wide.cu has laid it out, for each PH_TOKENS tokens and each group
// of 32 columns, as four planes (step, half of a step) of [token][8]. So one bulk copy brings a stage in, PH_STAGE_GROUPS
// groups, and a plane is a column of core matrices. One more warpgroup does nothing but that: a thread for each K group
// keeps its ring of stages full, and gives its registers to those who compute.

#include "linear.cuh"
#include "scaled.cuh"
#include "wgmma.cuh"

#ifdef PH_WGMMA
constexpr int N = PH_TOKENS, TILES = N / 8, ROW_GROUPS = PH_ROW_GROUPS, K_GROUPS = PH_GROUPS / ROW_GROUPS;
constexpr int PLANE = 16 * N, GROUPS = PH_STAGE_GROUPS, STAGE = 4 * GROUPS * PLANE, RING = PH_RING;
constexpr int PART_TOKENS = 32;  // that are summed and stored at a time
// Registers of a thread that brings in and of one that computes: together no more than all begin with, or they would wait
// for ever for what nobody gives.
constexpr int GIVEN = PH_GROUPS == 2 ? 40 : 32, TAKEN = PH_GROUPS == 2 ? 232 : 160;
static_assert((PH_GROUPS == 2 || PH_GROUPS == 3) &&
              PH_GROUPS * TAKEN + GIVEN <= (PH_GROUPS + 1) * (65536 / (128 * (PH_GROUPS + 1)) / 8 * 8));
#endif
constexpr int THREADS = 128 * PH_GROUPS;  // that compute

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    ph_linear_wide(const u8* weights, const u8* x, out_t* out, const float* bias, int tokens, int rows, int cols,
                   i64 tile_bytes, i64 ld, float scale, int accumulate) {
#ifdef PH_WGMMA
  extern __shared__ __align__(128) uint4 dynamic[];
  __shared__ float part[4 * PH_GROUPS][16][PART_TOKENS + 1];
  __shared__ __align__(8) u64 full[K_GROUPS][RING], empty[K_GROUPS][RING];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int group = warp >> 2, k_group = group / ROW_GROUPS, row_warp = group % ROW_GROUPS * 4 + (warp & 3);
  const int own_rows = rows / PARTNERS, all = ph_div_up(own_rows, 16), units = ph_div_up(cols, 256);
  const int first = (int)((i64)blockIdx.x * all / gridDim.x);
  const int count = (int)((i64)(blockIdx.x + 1) * all / gridDim.x) - first;
  const int passes = ph_div_up(count, 4 * ROW_GROUPS / PARTNERS);
  auto units_of = [&](int k) { return k < units ? ph_div_up(units - k, K_GROUPS) : 0; };  // in a pass
  const int token0 = N * blockIdx.y;
  tokens = min(tokens - token0, N);

  if (threadIdx.x == 0) {
    for (int i = 0; i < K_GROUPS * RING; ++i) {
      ph_barrier_init(&full[0][0] + i, 1);
      ph_barrier_init(&empty[0][0] + i, 4 * ROW_GROUPS);
    }
    ph_barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x >= THREADS) {  // ---- activations: stages of the passes, one after the other
    ph_give_registers<GIVEN>();
    const int k = warp - 4 * PH_GROUPS;
    ph_wait_for_inputs();
    ph_let_next_begin();
    if (k >= K_GROUPS || lane != 0) return;
    const u8* const from = x + (i64)blockIdx.y * 8 * units * (STAGE / GROUPS);
    const int own = units_of(k);
    int slot = 0;
    u32 phase = 1;  // the ring is empty at first
    for (int pass = 0; pass < passes; ++pass)
      for (int n = 0; n < own; ++n)
        for (int j = 0; j < 8; j += GROUPS) {
          ph_barrier_wait(&empty[k][slot], phase);
          ph_expect_bytes(&full[k][slot], STAGE);
          ph_bulk_copy(reinterpret_cast<u8*>(dynamic) + (k * RING + slot) * STAGE,
                       from + (i64)(8 * (k + K_GROUPS * n) + j) * (STAGE / GROUPS), STAGE, &full[k][slot]);
          if (++slot == RING) slot = 0, phase ^= 1;
        }
    return;
  }
  ph_take_registers<TAKEN>();
  const int own = units_of(k_group);

  // ---- weights: where the loads go on
  auto begin_of = [&](int pass) { return first + pass * count / passes; };
  const u8* source = nullptr;  // of the unit whose loads come next; null where there is none
  int next_pass = 0, next_unit = 0, next_vectors = 0;
  auto to_next = [&] {
    source = nullptr;
    if (next_pass >= passes || own == 0) return;
    const int u = k_group + K_GROUPS * next_unit, tile = begin_of(next_pass) + row_warp / PARTNERS;
    next_vectors = vectors_in(u, cols);
    if (tile < begin_of(next_pass + 1))
      source = weights + (tile + row_warp % PARTNERS * all) * tile_bytes + (i64)u * PH_UNIT_BYTES;
    if (++next_unit == own) next_unit = 0, ++next_pass;
  };
  Unit q = {};
  to_next();
  if (source != nullptr) load_unit(q, source, lane, next_vectors);
  to_next();
  ph_wait_for_inputs();
  ph_let_next_begin();

  const u8* const ring = reinterpret_cast<const u8*>(dynamic) + k_group * RING * STAGE;
  const Store store{out, bias, own_rows, scale, accumulate};
  int slot = 0;
  u32 phase = 0;
  for (int pass = 0; pass < passes; ++pass) {
    float acc[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
    u32 a[2][2 * GROUPS][4];
    u64* used = nullptr;  // the barrier of the stage before
    for (int n = 0; n < own; ++n) {
      Packed packed;
      pack(q, packed);
      if (source != nullptr) load_scales(q, source, lane);
#pragma unroll
      for (int i = 0; i < 8 / GROUPS; ++i) {
        u32 (&now)[2 * GROUPS][4] = a[i & 1];
#pragma unroll
        for (int m = 0; m < GROUPS; ++m) {
          const int j = GROUPS * i + m;
          u32 factor[2], minus[2];
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            if (s < PARTS) scales_of(packed, j, s, lane, factor, minus);
            weights_of_step(q, 2 * j + s, factor, minus, now[2 * m + s]);
          }
          if (source != nullptr) {
            if ((j + 1) % LOW_GROUPS == 0) load_low(q, source, lane, j / LOW_GROUPS, next_vectors);
            if (PH_HIGH_BITS && (j + 1) % HIGH_GROUPS == 0) load_high(q, source, lane, j / HIGH_GROUPS);
          }
        }
        ph_barrier_wait(&full[k_group][slot], phase);
        const u64 b = ph_wgmma_descriptor(ring + slot * STAGE, PLANE, 128);
        ph_wgmma_fence();
#pragma unroll
        for (int s = 0; s < 2 * GROUPS; ++s) ph_wgmma<N>(acc, now[s], b + (2 * s * PLANE >> 4));
        ph_wgmma_commit();
        ph_wgmma_wait<1>();  // the products before these: their weights and their stage are free
        ph_keep(a[(i + 1) & 1]);
        if (used != nullptr && lane == 0) ph_arrive(used);
        used = &empty[k_group][slot];
        if (++slot == RING) slot = 0, phase ^= 1;
      }
      to_next();
    }
    ph_wgmma_wait<0>();
    ph_keep(a[0]);
    ph_keep(a[1]);
    if (used != nullptr && lane == 0) ph_arrive(used);

    const int from = begin_of(pass), mine = begin_of(pass + 1) - from;
#pragma unroll
    for (int n0 = 0; n0 < TILES; n0 += PART_TOKENS / 8) {
      if (8 * n0 >= tokens) break;
      ph_sync_some(1, THREADS);
#pragma unroll
      for (int n8 = 0; n8 < PART_TOKENS / 8; ++n8)
#pragma unroll
        for (int e = 0; e < 4; ++e) part[warp][g + 8 * (e >> 1)][8 * n8 + 2 * t + (e & 1)] = acc[n0 + n8][e];
      ph_sync_some(1, THREADS);
      const int columns = min(tokens - 8 * n0, PART_TOKENS);
      constexpr int WIDTH = 4 * ROW_GROUPS / PARTNERS;  // tiles, or pairs of them
      for (int i = threadIdx.x; i < 16 * WIDTH * columns; i += THREADS) {
        const int row = i & 15, w = (i >> 4) % WIDTH, column = (i >> 4) / WIDTH;
        float sum[PARTNERS];
#pragma unroll
        for (int p = 0; p < PARTNERS; ++p) {
          sum[p] = part[PARTNERS * w + p][row][column];
#pragma unroll
          for (int k = 1; k < K_GROUPS; ++k) sum[p] += part[k * 4 * ROW_GROUPS + PARTNERS * w + p][row][column];
        }
        const int at = 16 * (from + w) + row;
        if (w >= mine || at >= own_rows) continue;
        const i64 index = (i64)(token0 + 8 * n0 + column) * ld + at;
        store(index, sum[0], sum[PARTNERS - 1], store.fetch(index, at));
      }
    }
  }
#endif
}
