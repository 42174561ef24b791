// out = x W^T for one row of x, which may be normed on the way in and activated on the way out. Bound by reading W once.
//
// A block owns a run of whole tiles, and its warps share the tiles' units out among themselves in one long row: each
// warp walks through its part of it without a pause, whatever tiles it crosses, while a ring in shared memory takes in
// the units that follow. So loads are always under way, and the block meets once, at the end, to add up in the order of
// the warps. The ring is filled before the kernel before this one has finished: weights do not depend on it.
//
// What a unit is, and how it is multiplied, row_sums.cuh says.
//
// Macros: PH_WARPS; PH_RING, units of a warp under way; PH_NORM (0: x is act_t, 1: x is float32 and gets an RMSNorm, 2: a
// LayerNorm) with PH_ITEMS, 4 values each, per thread; PH_ACTIVATED with a macro of activate.cuh; PH_GATED: tile i of the
// second half of W is what tile i's activation is multiplied with.

#include "linear.cuh"
#include "row_sums.cuh"

// Blocks that registers must leave room for: this one's, and as much for the kernel beside it. Where that is too little,
// as with more warps, for bytes to bfloat16 and for the compiler from 12.0 on, one.
#if !defined(PH_DENSE) && PH_WARPS > 8
constexpr int BLOCKS = 1;
#elif !defined(PH_DENSE) && defined(PH_ACT_BF16)
constexpr int BLOCKS = PH_LOW_BITS == 8 ? 1 : 2;
#elif defined(PH_DENSE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int BLOCKS = 1;
#else
constexpr int BLOCKS = 2;
#endif
constexpr int WARPS = PH_WARPS, RING = PH_RING, THREADS = 32 * WARPS;
constexpr int MOST_TILES = 128;  // of a block, partners counted
// Of the ring, what is asked for before x: all of it but for an RMSNorm, whose x would come behind it. A LayerNorm takes so
// long that weights are what comes late.
constexpr int BEFORE = PH_NORM == 1 ? RING / 2 : RING;

// ---- a lane's 8 values of a unit's x, in the order in which they are multiplied; zeros beyond the columns

// The first of them, and how far from it the other four are.
__device__ __forceinline__ int lane_column(int lane) {
#if !defined(PH_DENSE) && PH_GROUP == 16
  return 32 * (lane >> 2) + 4 * (lane & 3);
#else
  return 8 * lane;
#endif
}
#if !defined(PH_DENSE) && PH_GROUP == 16
constexpr int HALVES_APART = 16;
#else
constexpr int HALVES_APART = 4;
#endif

#if PH_NORM == 0 && !defined(PH_DENSE)

// From memory: the 16 rows of a tile share it. Kernels before this one have written it, while this one ran perhaps: so it must not come out of L1.
__device__ __forceinline__ uint4 values(const void* x, int unit, int lane, int cols) {
  const int column = 256 * unit + lane_column(lane);
  const act_t* at = reinterpret_cast<const act_t*>(x) + column;
  if (column >= cols) return make_uint4(0, 0, 0, 0);
  if (HALVES_APART == 4) return __ldcg(reinterpret_cast<const uint4*>(at));
  const uint2 low = __ldcg(reinterpret_cast<const uint2*>(at));
  const uint2 high = __ldcg(reinterpret_cast<const uint2*>(at + HALVES_APART));
  return make_uint4(low.x, low.y, high.x, high.y);
}

#else

// From shared memory, where take_in() has put it.
__device__ __forceinline__ uint4 values(const void* x, int unit, int lane, int) {
  const act_t* at = reinterpret_cast<const act_t*>(x) + 256 * unit + lane_column(lane);
  if (HALVES_APART == 4) return *reinterpret_cast<const uint4*>(at);
  const uint2 low = *reinterpret_cast<const uint2*>(at);
  const uint2 high = *reinterpret_cast<const uint2*>(at + HALVES_APART);
  return make_uint4(low.x, low.y, high.x, high.y);
}

#if PH_NORM == 0

// x in shared memory, zeros up to a multiple of 256.
__device__ __forceinline__ void take_in(act_t* xs, const void* from, int cols) {
  ph_wait_for_inputs();
  const int loads = cols / 8, room = 32 * ph_div_up(cols, 256);
#pragma unroll 8
  for (int i = threadIdx.x; i < room; i += THREADS)
    reinterpret_cast<uint4*>(xs)[i] = i < loads ? __ldcg(reinterpret_cast<const uint4*>(from) + i) : make_uint4(0, 0, 0, 0);
}

#else

// A norm's weights in registers: threads ask for them before anything else, so that they do not wait behind the ring.
struct NormWeights {
  float4 w[PH_ITEMS];

  __device__ __forceinline__ void load(const float* weight, int cols) {
#pragma unroll
    for (int i = 0; i < PH_ITEMS; ++i) {
      const int at = i * THREADS + threadIdx.x;
      w[i] = at < cols / 4 ? reinterpret_cast<const float4*>(weight)[at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
};

// The norm of x as act_t in shared memory, zeros up to a multiple of 256. `asked` is called once x is under way.
template <typename Asked>
__device__ __forceinline__ void take_in(act_t* xs, const void* from, const NormWeights& weights, const float* bias,
                                        int cols, float eps, float* scratch, Asked asked) {
  const float4* b4 = reinterpret_cast<const float4*>(bias);
  const int loads = cols / 4, room = 64 * ph_div_up(cols, 256);
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float4(&w)[PH_ITEMS] = weights.w;
  float4 x[PH_ITEMS];
  ph_wait_for_inputs();
#pragma unroll
  for (int i = 0; i < PH_ITEMS; ++i) {
    const int at = i * THREADS + threadIdx.x;
    x[i] = at < loads ? ph_load_now(reinterpret_cast<const float4*>(from) + at) : zero;
  }
  asked();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PH_ITEMS; ++i) {
#if PH_NORM == 2
    sum += x[i].x + x[i].y + x[i].z + x[i].w;
#else
    sum += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
#endif
  }
  sum = ph_block_sum(sum, scratch);
#if PH_NORM == 2
  const float mean = sum / (float)cols;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PH_ITEMS; ++i) {
    x[i] = make_float4(x[i].x - mean, x[i].y - mean, x[i].z - mean, x[i].w - mean);
    if (i * THREADS + threadIdx.x < loads)
      sum += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
  }
  sum = ph_block_sum(sum, scratch);
#endif
  const float inverse = 1.0f / sqrtf(sum / (float)cols + eps);
#pragma unroll
  for (int i = 0; i < PH_ITEMS; ++i) {
    const int at = i * THREADS + threadIdx.x;
    if (at >= room) continue;
    const float4 b = bias != nullptr && at < loads ? b4[at] : zero;  // beyond the columns w is zero
    const uint2 pair = make_uint2(
        ph_act2_bits(ph_to_act2(x[i].x * inverse * w[i].x + b.x, x[i].y * inverse * w[i].y + b.y)),
        ph_act2_bits(ph_to_act2(x[i].z * inverse * w[i].z + b.z, x[i].w * inverse * w[i].w + b.w)));
    reinterpret_cast<uint2*>(xs)[at] = pair;
  }
}

#endif
#endif

// Grid: blocks, each with as many tiles as the next, or one more. `bias` and `norm_bias` may be null. `x` is act_t or,
// where it is normed, float32. Shared memory: the ring, 32 floats, partial sums of (warp + tile) x ROWS, x if it is staged.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    ph_linear_one(const u8* weights, const void* x, out_t* out, const float* bias, const float* norm_weight,
                  const float* norm_bias, int rows, int cols, i64 tile_bytes, float eps, float scale, int accumulate) {
  extern __shared__ uint4 dynamic[];
  u8* shared = reinterpret_cast<u8*>(dynamic);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, units = ph_div_up(cols, 256);
  [[maybe_unused]] float* scratch = reinterpret_cast<float*>(shared + WARPS * RING * SLOT);
  float* parts = scratch + 32;
  // Of each tile, the warps that had its first and its last unit.
  __shared__ u8 first_warp[MOST_TILES], last_warp[MOST_TILES];

  const int own_rows = rows / PARTNERS, items = ph_div_up(own_rows, ROWS);
  const int first = (int)((i64)blockIdx.x * items / gridDim.x);
  const int count = (int)((i64)(blockIdx.x + 1) * items / gridDim.x) - first;
  const int total = count * PARTNERS * units;  // units of the block, tile after tile; partners are neighbours
  const int begin = warp * total / WARPS, end = (warp + 1) * total / WARPS;
  u8* ring = shared + warp * RING * SLOT;

#if PH_NORM != 0
  NormWeights weights_of_norm;
  weights_of_norm.load(norm_weight, cols);
#endif
  // Of the loads, ahead of the sums by the length of the ring.
  Source source = {nullptr, 0, rows, cols, tile_bytes};
  int next_unit = begin % units, next_tile = begin / units;
  auto to_tile = [&] { source.to_tile(weights, first + next_tile / PARTNERS + next_tile % PARTNERS * items, lane); };
  auto fetch_next = [&](int into) {
    source.fetch(ring + into * SLOT, next_unit, lane);
    if (++next_unit == units) {
      next_unit = 0, ++next_tile;
      to_tile();
    }
  };
  auto fill = [&](int i) {
    if (begin + i < end) fetch_next(i);
    ph_cp_async_commit();  // one group each time, so that the waits can count
  };
  to_tile();
#pragma unroll
  for (int i = 0; i < BEFORE; ++i) fill(i);
#if PH_NORM == 0 && !defined(PH_DENSE)
  ph_wait_for_inputs();
#else
  act_t* xs = reinterpret_cast<act_t*>(parts + (WARPS + count * PARTNERS + 1) / 2 * 2 * ROWS);
#if PH_NORM == 0
  take_in(xs, x, cols);
#else
  take_in(xs, x, weights_of_norm, norm_bias, cols, eps, scratch, [&] {
#pragma unroll
    for (int i = BEFORE; i < RING; ++i) fill(i);
  });
#endif
  x = xs;
  __syncthreads();
#endif
  ph_let_next_begin();

  const Store store{out, bias, own_rows, scale, accumulate};
  // Of the first THREADS rows, fetched now: at the end the next kernel would wait for it.
  Addends addends = {0.0f, 0.0f};
  const int early_row = first * ROWS + threadIdx.x;
  if (threadIdx.x < count * ROWS && early_row < own_rows) addends = store.fetch(early_row, early_row);

  Sums sums;
  sums.clear();
  int unit = begin % units, tile = begin / units, slot = 0;
  bool from_first = unit == 0;
  uint4 next_x = values(x, unit, lane, cols);  // one unit ahead
  auto add_next = [&](int n, bool refill) {
    const uint4 own_x = next_x;
    next_x = values(x, unit + 1 == units ? 0 : unit + 1, lane, cols);
    ph_cp_async_wait<RING - 1>();
    __syncwarp();
    sums.add(ring + slot * SLOT, own_x, unit, lane, cols, [&] {
      if (refill) fetch_next(slot);
      ph_cp_async_commit();
    });
    slot = slot + 1 == RING ? 0 : slot + 1;
    if (++unit == units || n + 1 == end) {
      // (warp, tile) runs along a staircase, so that warp + tile is a place of its own
      sums.store(parts + (warp + tile) * ROWS, lane);
      sums.clear();
      if (lane == 0 && from_first) first_warp[tile] = warp;
      if (lane == 0 && unit == units) last_warp[tile] = warp;
      unit = 0, ++tile;
      from_first = true;
    }
  };
  int n = begin;
  for (; n < end - RING; ++n) add_next(n, true);
  for (; n < end; ++n) add_next(n, false);
  __syncthreads();

  for (int i = threadIdx.x; i < count * ROWS; i += THREADS) {
    const int row = first * ROWS + i;
    if (row >= own_rows) continue;
    float value[PARTNERS];
#pragma unroll
    for (int p = 0; p < PARTNERS; ++p) {
      const int tile = i / ROWS * PARTNERS + p;
      value[p] = 0.0f;
      for (int w = first_warp[tile]; w <= last_warp[tile]; ++w)
        if (total >= WARPS || w * total / WARPS < (w + 1) * total / WARPS)  // else it had none
          value[p] += parts[(w + tile) * ROWS + i % ROWS];
    }
    store(row, value[0], value[PARTNERS - 1], i < THREADS ? addends : store.fetch(row, row));
  }
}
