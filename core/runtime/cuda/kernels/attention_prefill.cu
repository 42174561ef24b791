// Attention of chunks: tiles of 64 queries of one head over the paged cache, 64 keys at a time, softmax as it goes.
//
// A warp owns 16 queries and keeps their maximum, sum and accumulator in registers; the fragments of S = Q K^T are those
// that O += P V wants, so P never leaves registers. K and V have one buffer each: values arrive while scores are
// computed, the next keys while values are added. Tiles of keys begin at multiples of 64 and one that a row does not see
// leaves the row's state as it is, so a row's result does not depend on the rows beside it nor on how its sequence was
// cut into chunks.

// An fp8 cache keeps this schedule and this memory: bytes arrive in the end of the buffer and are widened in place.

#include "attention.cuh"

constexpr int TILE = 64;  // queries, and keys
constexpr int THREADS = 128;
constexpr int DP = ph_div_up(D, 16) * 16;  // components with the zeros that fill up a tensor-core step
constexpr int CHUNKS = DP / 8;             // of 16 bytes in a row of shared memory
constexpr bool SWIZZLE = DP % 64 == 0;     // else rows are padded; both keep 8 rows of a chunk in different banks
constexpr int STRIDE = SWIZZLE ? DP : DP + 8;
constexpr bool Q_SHARED = DP > 128;  // there registers do not hold the queries as well

// Left to itself ptxas spills a little in small heads on sm_120; told more it holds fewer blocks of large ones.
#if PH_HEAD_DIM <= 64
#define PH_BOUNDS THREADS, 3
#else
#define PH_BOUNDS THREADS
#endif

__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * STRIDE + 8 * (SWIZZLE ? chunk ^ (row & 7) : chunk);
}

#ifdef PH_KV_FP8
constexpr bool STAGED = D % 16 == 0;            // else loads are narrow, and widened on the way
constexpr int STAGE = TILE * (2 * STRIDE - D);  // bytes of a buffer before those that arrive

// Starts copying 64 rows of a cache to the end of their buffer. The caller commits, and widens what has come.
__device__ __forceinline__ void fetch(kv_t* shared, const stored_t* cache, const int* rows) {
  if (STAGED) {
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * CHUNKS / 2; i += THREADS) {
      const int row = i / (CHUNKS / 2), d = i % (CHUNKS / 2) * 16;
      ph_cp_async16(reinterpret_cast<u8*>(shared) + STAGE + 16 * i, cache + (i64)rows[row] * D + d);
    }
  } else if (D % 8 == 0) {
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const uint2 x = 8 * chunk < D ? ph_ldg64(cache + (i64)rows[row] * D + 8 * chunk) : make_uint2(0, 0);
      *reinterpret_cast<uint4*>(shared + chunk_at(row, chunk)) = widen(x);
    }
  } else {
    for (int i = threadIdx.x; i < TILE * DP / 2; i += THREADS) {
      const int row = i / (DP / 2), d = 2 * (i % (DP / 2));
      *reinterpret_cast<u32*>(shared + chunk_at(row, d / 8) + d % 8) =
          d < D ? widen2(__ldg(reinterpret_cast<const u16*>(cache + (i64)rows[row] * D + d))) : 0;
    }
  }
}

// Starts copying the scales of the same keys, which the caller commits together with the keys.
__device__ __forceinline__ void fetch_scales(float (&shared)[2][TILE], const float* k_scales, const float* v_scales,
                                             const int* rows) {
  if (threadIdx.x >= TILE) return;
  ph_cp_async4(&shared[0][threadIdx.x], k_scales + rows[threadIdx.x]);
  ph_cp_async4(&shared[1][threadIdx.x], v_scales + rows[threadIdx.x]);
}

// Widens the bytes at a buffer's end to its rows; all threads call, after a barrier, and there is one at the end. The
// wide rows of the upper half end before the bytes begin. Those of the lower half lie over bytes, which are held in
// registers meanwhile: a batch of wide rows ends where its own bytes do or before, so later ones are still in place.
__device__ __forceinline__ void widen_rows(kv_t* shared) {
  if (!STAGED) return;
  constexpr int HALF = TILE / 2 * CHUNKS;    // chunks of 8 components in half of the rows
  constexpr int BATCHES = Q_SHARED ? 4 : 1;  // large heads leave no registers for half of the bytes
  constexpr int BATCH = HALF / BATCHES;
  constexpr int EACH = ph_div_up(BATCH, THREADS);
  const uint2* stored = reinterpret_cast<const uint2*>(reinterpret_cast<u8*>(shared) + STAGE);
#pragma unroll EACH
  for (int i = threadIdx.x; i < HALF; i += THREADS)
    *reinterpret_cast<uint4*>(shared + chunk_at(i / CHUNKS, i % CHUNKS)) = widen(stored[i]);
#pragma unroll 1
  for (int batch = HALF; batch < 2 * HALF; batch += BATCH) {
    uint2 held[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int i = j * THREADS + threadIdx.x;
      held[j] = i < BATCH ? stored[batch + i] : make_uint2(0, 0);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int i = j * THREADS + threadIdx.x, at = batch + i;
      if (i < BATCH) *reinterpret_cast<uint4*>(shared + chunk_at(at / CHUNKS, at % CHUNKS)) = widen(held[j]);
    }
  }
  __syncthreads();
}
#else
// Starts copying 64 rows of a cache to shared memory. The caller commits.
__device__ __forceinline__ void fetch(kv_t* shared, const kv_t* cache, const int* rows) {
  if (D % 8 == 0) {
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const bool valid = 8 * chunk < D;
      ph_cp_async16(shared + chunk_at(row, chunk), cache + (i64)rows[row] * D + (valid ? 8 * chunk : 0), valid);
    }
  } else {
    for (int i = threadIdx.x; i < TILE * DP / 2; i += THREADS) {
      const int row = i / (DP / 2), d = 2 * (i % (DP / 2));
      *reinterpret_cast<u32*>(shared + chunk_at(row, d / 8) + d % 8) =
          d < D ? ph_ldg32(cache + (i64)rows[row] * D + d) : 0;
    }
  }
}
#endif

__device__ __forceinline__ u32 load_query(const act_t* row, int d) {
  return d < D ? act2_to_kv2(ph_ldg32(row + d)) : 0;
}

// Grid (heads, tiles). `work` [tiles, 2] holds (sequence, first row); a negative sequence is padding. Sequence s owns
// rows query_start[s] .. query_start[s+1] - 1 of qkv and out, the last of its context_lens[s] tokens. The scales,
// float32 for each row of the caches, are read with PH_KV_FP8 only.
extern "C" __global__ void __launch_bounds__(PH_BOUNDS)
    ph_attend_prefill(const act_t* qkv, const stored_t* k_cache, const stored_t* v_cache, act_t* out, const int* work,
                      const int* query_start, const int* context_lens, const int* block_tables, int heads,
                      int kv_heads, int table_width, int window, float scale, float cap, const float* k_scales,
                      const float* v_scales) {
  extern __shared__ uint4 dynamic[];
  __shared__ int places[2][TILE];  // where the keys of this tile and of the next lie
#ifdef PH_KV_FP8
  __shared__ __align__(8) float scales[2][2][TILE];  // of the same keys: keys' and values'
#endif
  kv_t* k_shared = reinterpret_cast<kv_t*>(dynamic);
  kv_t* v_shared = k_shared + TILE * STRIDE;
  kv_t* q_shared = v_shared + TILE * STRIDE;

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int sequence = work[2 * blockIdx.y], first_row = work[2 * blockIdx.y + 1];
  if (sequence < 0) return;
  const int head = blockIdx.x, kv_head = head / (heads / kv_heads);
  const int end_row = query_start[sequence + 1], length = context_lens[sequence];
  const int rows = min(TILE, end_row - first_row);
  if (rows <= 0 || length <= 0) return;
  const int first_position = length - end_row + first_row, last_key = first_position + rows - 1;
#ifdef PH_WINDOW
  const int first_key = max(0, first_position - window + 1);
#else
  const int first_key = 0;
#endif
  const int* table = block_tables + (i64)sequence * table_width;
  const i64 columns = (i64)(heads + 2 * kv_heads) * D;
  qkv += first_row * columns + (i64)head * D;

  // Keys that no row of the tile sees are read as the nearest that one does, so that they are finite.
  int tile = first_key / TILE;
  const int tiles = last_key / TILE + 1;
  auto place = [&](int of) {
    return cache_row(table, min(max(of * TILE + (int)threadIdx.x, first_key), last_key), kv_heads, kv_head);
  };
  if (threadIdx.x < TILE) places[tile & 1][threadIdx.x] = place(tile);
  __syncthreads();
  fetch(k_shared, k_cache, places[tile & 1]);
#ifdef PH_KV_FP8
  fetch_scales(scales[tile & 1], k_scales, v_scales, places[tile & 1]);
#endif
  ph_cp_async_commit();

  // The warp's rows are 16 * warp + g (row 0) and + 8 (row 1); those beyond the chunk repeat its last.
  u32 q[Q_SHARED ? 1 : DP / 16][4];
  if (Q_SHARED) {
    for (int i = threadIdx.x; i < TILE * DP / 2; i += THREADS) {
      const int row = i / (DP / 2), d = 2 * (i % (DP / 2));
      *reinterpret_cast<u32*>(q_shared + chunk_at(row, d / 8) + d % 8) =
          load_query(qkv + min(row, rows - 1) * columns, d);
    }
  } else {
    const act_t* upper = qkv + min(16 * warp + g, rows - 1) * columns;
    const act_t* lower = qkv + min(16 * warp + g + 8, rows - 1) * columns;
#pragma unroll
    for (int i = 0; i < DP / 16; ++i) {
      q[i][0] = load_query(upper, 16 * i + 2 * t);
      q[i][1] = load_query(lower, 16 * i + 2 * t);
      q[i][2] = load_query(upper, 16 * i + 2 * t + 8);
      q[i][3] = load_query(lower, 16 * i + 2 * t + 8);
    }
  }
  const int position[2] = {first_position + min(16 * warp + g, rows - 1),
                           first_position + min(16 * warp + g + 8, rows - 1)};
  const int lowest = first_position + min(16 * warp, rows - 1);  // of the warp's positions
  const int highest = first_position + min(16 * warp + 15, rows - 1);

  float acc[DP / 8][4] = {};  // of row 0: [0], [1] at components 8i + 2t, +1; of row 1: [2], [3]
  float most[2] = {-PH_INFINITY, -PH_INFINITY}, sum[2] = {0.0f, 0.0f};
#ifdef PH_SOFTCAP
  const float factor = 1.0f;
#else
  const float factor = scale;
#endif

  for (; tile < tiles; ++tile) {
    ph_cp_async_wait<0>();
    __syncthreads();  // the keys are here, and no warp needs the values of the tile before
#ifdef PH_KV_FP8
    widen_rows(k_shared);
#endif
    fetch(v_shared, v_cache, places[tile & 1]);
    ph_cp_async_commit();
    const bool more = tile + 1 < tiles;
    const int next = more && threadIdx.x < TILE ? place(tile + 1) : 0;

    const int key = tile * TILE;
    bool seen = 16 * warp < rows && key <= highest;
    bool masked = key + TILE - 1 > lowest;
#ifdef PH_WINDOW
    seen = seen && key + TILE - 1 > lowest - window;
    masked = masked || key <= highest - window;
#endif
    float s[TILE / 8][4] = {};  // of row 0: [0], [1] of keys 8i + 2t, +1; of row 1: [2], [3]
    if (seen) {
#pragma unroll
      for (int i = 0; i < DP / 16; ++i) {
        u32 a[4];
        if (Q_SHARED) {
          ph_ldmatrix4(a, q_shared + chunk_at(16 * warp + (lane & 15), 2 * i + (lane >> 4)));
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) a[j] = q[Q_SHARED ? 0 : i][j];
        }
#pragma unroll
        for (int j = 0; j < TILE / 16; ++j) {
          u32 b[4];
          ph_ldmatrix4(b, k_shared + chunk_at(16 * j + (lane & 7) + (lane >> 4) * 8, 2 * i + (lane >> 3 & 1)));
          const u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
          kv_mma(s[2 * j], a, left);
          kv_mma(s[2 * j + 1], a, right);
        }
      }
    }
    if (threadIdx.x < TILE) places[(tile + 1) & 1][threadIdx.x] = next;
    __syncthreads();  // no warp needs these keys any more
    if (more) fetch(k_shared, k_cache, places[(tile + 1) & 1]);
#ifdef PH_KV_FP8
    if (more) fetch_scales(scales[(tile + 1) & 1], k_scales, v_scales, places[(tile + 1) & 1]);
#endif
    ph_cp_async_commit();

    if (seen) {
#ifdef PH_KV_FP8
#pragma unroll
      for (int i = 0; i < TILE / 8; ++i) {
        const float2 of = *reinterpret_cast<const float2*>(&scales[tile & 1][0][8 * i + 2 * t]);
#pragma unroll
        for (int j = 0; j < 4; ++j) s[i][j] *= j & 1 ? of.y : of.x;
      }
#endif
#ifdef PH_SOFTCAP
#pragma unroll
      for (int i = 0; i < TILE / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) s[i][j] = soften(s[i][j], scale, cap);
#endif
      if (masked) {
#pragma unroll
        for (int i = 0; i < TILE / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int at = key + 8 * i + 2 * t + (j & 1);
            bool hidden = at > position[j >> 1];
#ifdef PH_WINDOW
            hidden = hidden || at <= position[j >> 1] - window;
#endif
            if (hidden) s[i][j] = -PH_INFINITY;
          }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float m = -PH_INFINITY;
#pragma unroll
        for (int i = 0; i < TILE / 8; ++i) m = fmaxf(m, fmaxf(s[i][2 * r], s[i][2 * r + 1]));
        m = fmaxf(most[r], ph_warp_max<4>(m));
        const float base = m == -PH_INFINITY ? 0.0f : m * factor;  // a window may hide a row's first tiles
        const float shrink = exp2_fast(most[r] * factor - base);
        float add = 0.0f;
#pragma unroll
        for (int i = 0; i < TILE / 8; ++i)
#pragma unroll
          for (int j = 2 * r; j < 2 * r + 2; ++j) {
            s[i][j] = exp2_fast(fmaf(s[i][j], factor, -base));
            add += s[i][j];
          }
        sum[r] = sum[r] * shrink + add;
        most[r] = m;
#pragma unroll
        for (int i = 0; i < DP / 8; ++i) {
          acc[i][2 * r] *= shrink;
          acc[i][2 * r + 1] *= shrink;
        }
      }
#ifdef PH_KV_FP8
#pragma unroll
      for (int i = 0; i < TILE / 8; ++i) {
        const float2 of = *reinterpret_cast<const float2*>(&scales[tile & 1][1][8 * i + 2 * t]);
#pragma unroll
        for (int j = 0; j < 4; ++j) s[i][j] *= VALUE_UNIT * (j & 1 ? of.y : of.x);  // the sums are done
      }
#endif
    }
    ph_cp_async_wait<1>();
    __syncthreads();  // the values are here
#ifdef PH_KV_FP8
    widen_rows(v_shared);
#endif
    if (seen) {
#pragma unroll
      for (int i = 0; i < TILE / 16; ++i) {
        const u32 a[4] = {kv2_bits(s[2 * i][0], s[2 * i][1]), kv2_bits(s[2 * i][2], s[2 * i][3]),
                          kv2_bits(s[2 * i + 1][0], s[2 * i + 1][1]), kv2_bits(s[2 * i + 1][2], s[2 * i + 1][3])};
#pragma unroll
        for (int j = 0; j < DP / 16; ++j) {
          u32 b[4];
          ph_ldmatrix4_transposed(b, v_shared + chunk_at(16 * i + (lane & 15), 2 * j + (lane >> 4)));
          const u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
          kv_mma(acc[2 * j], a, left);
          kv_mma(acc[2 * j + 1], a, right);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * warp + g + 8 * r;
    const float total = ph_warp_sum<4>(sum[r]) * VALUE_UNIT;
    if (row >= rows) continue;
    act_t* of = out + ((i64)(first_row + row) * heads + head) * D;
#pragma unroll
    for (int i = 0; i < DP / 8; ++i) {
      const int d = 8 * i + 2 * t;
      if (d < D) *reinterpret_cast<act2_t*>(of + d) = ph_to_act2(acc[i][2 * r] / total, acc[i][2 * r + 1] / total);
    }
  }
}
