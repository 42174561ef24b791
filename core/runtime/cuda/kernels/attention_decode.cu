// A decode step's attention: one token per sequence, from the rows that the projection left to the mixed values. Head
// norms, rotation, the way of k and v into the paged cache, and attention over it, the context split over blocks.
//
// A block serves up to 8 query heads of one KV head, so each key and value is read once for all of them. Warps take 16
// keys at a time, each through a ring of tiles of its own (attention_tiles.cuh) with two tensor-core products, S = K q
// (16 keys x 8 heads) and O = V^T P (components x heads); then warps and blocks are added up (attention_combine.cuh).
//
// All that older steps left in the cache is under way before the kernel waits for the projection. The newest key and
// value are not read back: the block whose keys end with them computes them, keeps them in shared memory in the form
// that the cache gets, and puts them into their tile when its turn comes.
//
// Macros: those of the headers; PH_STAGES tiles in a warp's ring; PH_Q_NORM and PH_K_NORM (0 none, 1 RMSNorm, 2
// LayerNorm).

#include "attention_combine.cuh"
#include "heads.cuh"

constexpr int STAGES = PH_STAGES;
constexpr int RING = STAGES * TILE_CHUNKS;  // of a warp
constexpr int MERGE_BYTES = WARPS * HEADS * MERGE * 4;
constexpr int DYNAMIC = WARPS * RING * 16 > MERGE_BYTES ? WARPS * RING * 16 : MERGE_BYTES;  // bytes of shared memory
// Blocks on a multiprocessor: as many as its shared memory and its registers hold.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ / 100 == 10)
constexpr int SHARED_KB = 228;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr int SHARED_KB = 164;
#else
constexpr int SHARED_KB = 100;
#endif
constexpr int BY_SHARED = SHARED_KB / (DYNAMIC / 1024 + 12), BY_REGISTERS = (D <= 64 ? 16 : D <= 128 ? 12 : 8) / WARPS;
constexpr int RESIDENT = BY_SHARED < 1 || BY_REGISTERS < 1 ? 1 : BY_SHARED < BY_REGISTERS ? BY_SHARED : BY_REGISTERS;

// Lane 4g+t gets row g, columns 2t and 2t+1 of the transpose of an 8x8 tile held in the same way.
__device__ __forceinline__ u32 transpose8x8(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Takes a tile's keys from `low` up to `high` into the result; there is one at least.
__device__ __forceinline__ void add_tile(Partial& mine, const uint4* at, const queries_t& q, int tile, int low,
                                         int high, float scale, float cap) {
  const int lane = threadIdx.x & 31, g = lane >> 2, key = TILE * tile + g;
  float s[4], shrink[2];
  score(s, at, q);
#ifdef PH_KV_FP8
  const float* scales = reinterpret_cast<const float*>(at + SCALES);
#endif
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#ifdef PH_KV_FP8
    s[i] *= scales[g + 4 * (i & 2)];
#endif
#ifdef PH_SOFTCAP
    s[i] = soften(s[i], scale, cap);
#else
    s[i] *= scale;
#endif
    const int of = key + 4 * (i & 2);
    if (of < low || of >= high) s[i] = -PH_INFINITY;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m = fmaxf(mine.most[h], fmaxf(s[h], s[h + 2]));
#pragma unroll
    for (int step = 4; step <= 16; step *= 2) m = fmaxf(m, __shfl_xor_sync(PH_FULL_MASK, m, step));
    shrink[h] = exp2_fast(mine.most[h] - m);
    s[h] = exp2_fast(s[h] - m);
    s[h + 2] = exp2_fast(s[h + 2] - m);
    mine.sum[h] = mine.sum[h] * shrink[h] + s[h] + s[h + 2];
    mine.most[h] = m;
  }
#ifdef PH_KV_FP8
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] *= VALUE_UNIT * scales[TILE + g + 4 * (i & 2)];  // the sums are done
#endif
  const u32 p[2] = {transpose8x8(kv2_bits(s[0], s[1])), transpose8x8(kv2_bits(s[2], s[3]))};
#pragma unroll
  for (int j = 0; j < PRODUCTS; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) mine.acc[j][i] *= shrink[i & 1];
  add_values(mine.acc, at, p);
}

// Grid (kv_heads * parts, sequences, splits): blocks without work come last. Part p of KV head h serves its query heads
// p*group .. (p+1)*group - 1. `qkv` [sequences, heads + 2 * kv_heads, D] is as the projection left it. `positions` are
// those of the rows, `context_lens` one more each; where either says there is no token, `out` gets zeros and the cache
// nothing. cos and sin are [context, PH_ROPE_PAIRS].
//
// A context of up to `single` keys is not split, others are into at most `most` pieces of at least `least` keys, so the
// split depends on nothing but the context and these three. `counters` [sequences, kv_heads * parts] are zero before and
// after; `partial` needs no content. The scales, float32 for each row of the caches, are there with PH_KV_FP8 only.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    ph_attend_decode(const act_t* qkv, stored_t* k_cache, stored_t* v_cache, act_t* out, const int* positions,
                     const int* context_lens, const int* block_tables, float* partial, int* counters, const float* cos,
                     const float* sin, const float* q_weight, const float* q_bias, const float* k_weight,
                     const float* k_bias, float* k_scales, float* v_scales, int heads, int kv_heads, int group,
                     int table_width, int single, int least, int most, int window, float scale, float cap, float q_eps,
                     float k_eps) {
  extern __shared__ uint4 dynamic[];
  __shared__ Shared shared;
  __shared__ __align__(16) kv_t queries[HEADS][Q_COMPONENTS];
  __shared__ kv2_t fresh[2][D / 2];  // the newest key and value as the cache gets them
#ifdef PH_KV_FP8
  __shared__ float fresh_scales[2];
#endif
#if PH_ROPE_PAIRS > 0 && !defined(PH_INTERLEAVED)
  __shared__ float staged[WARPS][D];
#endif
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int sequence = blockIdx.y, split = blockIdx.z;
  const int per_kv = heads / kv_heads, parts = gridDim.x / kv_heads;
  const int kv_head = blockIdx.x / parts, part = blockIdx.x % parts;
  const int first_head = kv_head * per_kv + part * group, n = min(group, per_kv - part * group);
  out += ((i64)sequence * heads + first_head) * D;

  // Until it has waited the kernel reads what no kernel of this step has written: the step's integers, whose copies
  // ended before its first kernel began; tables and weights; and in the cache what older steps wrote. A step's first
  // kernel is launched plainly, after all that was before it, and each later one begins after the one before it has
  // begun: so when this begins, every older step is done. A block that leaves early need not wait: in each row there is
  // one that does.
  const int length = __ldcg(context_lens + sequence), position = __ldcg(positions + sequence);
  const int* table = block_tables + (i64)sequence * table_width;
  // Where the first keys of all lie is asked for before it is known whether they are the block's.
  int guesses[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; ++s) {
    const int at = (TILE * (warp + s * WARPS) + (lane & 15)) / PH_BLOCK_SIZE;
    guesses[s] = at < table_width ? __ldcg(table + at) : 0;
  }
  if (length <= 0 || position < 0) {
    if (split > 0) return;
    ph_wait_for_inputs();
    for (int i = threadIdx.x; i < n * D; i += THREADS) out[i] = ph_to_act(0.0f);
    return;
  }
#ifdef PH_WINDOW
  const int begin = max(0, length - window);
#else
  const int begin = 0;
#endif
  const int first = begin / TILE, tiles = ph_div_up(length, TILE) - first;
  const int each = tiles * TILE <= single ? tiles : max(least / TILE, ph_div_up(tiles, most));  // tiles of a split
  const int splits = ph_div_up(tiles, each);
  if (split >= splits) return;
  const int low = max(begin, (first + split * each) * TILE), high = min(length, (first + (split + 1) * each) * TILE);
  const bool newest = high == length;
  const int older = newest ? length - 1 : high;  // keys from here on are not in the cache yet
  const int first_tile = low / TILE, end = ph_div_up(high, TILE);

  // Where the lane's key of a tile lies, if it is one of the block's.
  auto place = [&](int of) {
    const int key = TILE * of + (lane & 15);
    return key >= low && key < older ? cache_row(table, key, kv_heads, kv_head) : -1;
  };
  uint4* ring = dynamic + warp * RING;
  int tile = first_tile + warp, places[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; ++s) {
    const int key = TILE * (warp + s * WARPS) + (lane & 15);
    places[s] = first_tile > 0                 ? place(tile + s * WARPS)
                : key >= low && key < older ? cache_row(guesses[s], key, kv_heads, kv_head)
                                            : -1;
    clear_ends(ring + s * TILE_CHUNKS);
  }
  __syncwarp();
#pragma unroll
  for (int s = 0; s < STAGES; ++s) {
    if (tile + s * WARPS < end)
      fetch(ring + s * TILE_CHUNKS, places[s], k_cache, v_cache, k_scales, v_scales);
    ph_cp_async_commit();
  }
  int next = place(tile + STAGES * WARPS);
  const Angles angles = load_angles(cos, sin, position);

  ph_wait_for_inputs();
  ph_let_next_begin();

  // ---- the row's heads
  const act_t* row = qkv + (i64)sequence * (heads + 2 * kv_heads) * D;
  for (int i = warp; i < n + (newest ? 2 : 0); i += WARPS) {
    const bool is_q = i < n, is_k = i == n;
    head_t x;
    load_head(x, row + (i64)(is_q ? first_head + i : heads + (i - n) * kv_heads + kv_head) * D);
    if (is_q) normalise<PH_Q_NORM>(x, q_weight, q_bias, q_eps);
    if (is_k) normalise<PH_K_NORM>(x, k_weight, k_bias, k_eps);
#if PH_ROPE_PAIRS > 0
#ifdef PH_INTERLEAVED
    if (is_q || is_k) rotate(x, angles, nullptr);
#else
    if (is_q || is_k) rotate(x, angles, staged[warp]);
#endif
#endif
    if (is_q) {
#pragma unroll
      for (int j = 0; j < ITEMS; ++j)
        if (component(j) < Q_COMPONENTS)
          *reinterpret_cast<u32*>(&queries[i][component(j)]) = act2_to_kv2(ph_act2_bits(ph_to_act2(x[j].x, x[j].y)));
      continue;
    }
    const i64 slot = cache_row(table, position, kv_heads, kv_head);
#ifdef PH_KV_FP8
    const float by = take_scale(x);
    if (lane == 0) {
      fresh_scales[i - n] = by;
      if (part == 0) (is_k ? k_scales : v_scales)[slot] = by;
    }
#endif
    kv2_t* cache = reinterpret_cast<kv2_t*>((is_k ? k_cache : v_cache) + slot * D);
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
      const int d = component(j);
      if (d >= D) continue;
      const kv2_t pair = to_kv2(x[j]);
      fresh[i - n][d / 2] = pair;
      if (part == 0) cache[d / 2] = pair;  // the other parts have the same values, for themselves
    }
  }
  __syncthreads();
  queries_t q;
  load_queries(q, queries[min(lane >> 2, n - 1)], (lane >> 2) < n);

  // ---- the keys
  Partial mine;
#pragma unroll
  for (int j = 0; j < PRODUCTS; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) mine.acc[j][i] = 0.0f;
#pragma unroll
  for (int h = 0; h < 2; ++h) mine.most[h] = -PH_INFINITY, mine.sum[h] = 0.0f;

  for (int stage = 0; tile < end; tile += WARPS) {
    uint4* at = ring + stage * TILE_CHUNKS;
    ph_cp_async_wait<STAGES - 1>();
    __syncwarp();  // the tile is here
    if (newest && tile == end - 1) {
#pragma unroll
      for (int j = 0; j < ITEMS; ++j) {
        const int d = component(j);
        if (d >= D) continue;
        put_key(at, (length - 1) % TILE, d, fresh[0][d / 2]);
        put_value(at, (length - 1) % TILE, d, fresh[1][d / 2]);
      }
#ifdef PH_KV_FP8
      if (lane < 2) reinterpret_cast<float*>(at + SCALES)[lane * TILE + (length - 1) % TILE] = fresh_scales[lane];
#endif
      __syncwarp();
    }
    add_tile(mine, at, q, tile, low, high, scale, cap);
    __syncwarp();  // nobody needs the tile any more
    if (tile + STAGES * WARPS < end) fetch(at, next, k_cache, v_cache, k_scales, v_scales);
    ph_cp_async_commit();
    next = place(tile + (STAGES + 1) * WARPS);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }

  // ---- the block's warps, the sequence's blocks
  float* room = reinterpret_cast<float*>(dynamic);
  const int where = sequence * gridDim.x + blockIdx.x;
  float* all = partial + (i64)where * gridDim.z * record_size(group);
  merge_warps(mine, shared, room, min(WARPS, end - first_tile), n, group, out,
              splits == 1 ? nullptr : all + (i64)split * record_size(group));
  if (splits > 1 && comes_last(counters + where, splits, shared))
    add_splits(all, splits, shared, room, DYNAMIC / 4, n, group, out);
}
