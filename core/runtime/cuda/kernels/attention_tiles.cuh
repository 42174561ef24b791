// Tiles of 16 keys and their values on their way from the paged cache through shared memory to the tensor cores.
//
// Each warp has tiles of its own, so it waits for nobody else. A tile holds rows as the cache does, 16-byte chunks of
// them permuted, or rows padded, so that neither way of reading meets bank conflicts:
//   keys     are fragments as they lie. Which component an element of a fragment stands for may be permuted freely, as
//            long as queries agree: lane 4g+t takes chunk 4c+t of keys g and g+8;
//   values   are transposed: by ldmatrix, or where they are bytes, two keys at a time in registers.
//
// Macros: those of attention.cuh.

#pragma once

#include "attention.cuh"

constexpr int TILE = 16;                          // keys
constexpr int ROW = D * (int)sizeof(stored_t);    // bytes
constexpr int CHUNKS = ph_div_up(ROW, 16);        // of 16 bytes in a row; the last may be filled up with zeros
constexpr int COPY = ROW % 16 == 0 ? 16 : ROW % 8 == 0 ? 8 : ROW % 4 == 0 ? 4 : 2;  // bytes that rows allow at once
constexpr int K_PITCH = ph_div_up(CHUNKS, 4) * 4;                                   // chunks from row to row
constexpr int V_PITCH = CHUNKS % 8 == 0 ? CHUNKS : CHUNKS | 1;
constexpr int SCALES = TILE * (K_PITCH + V_PITCH);  // the chunk where scales begin: the keys', then the values'
constexpr int TILE_CHUNKS = SCALES + (sizeof(stored_t) == 1 ? 8 : 0);

constexpr int PER_CHUNK = 16 / (int)sizeof(stored_t);  // components
constexpr int K_STEPS = ph_div_up(CHUNKS, 4);          // of 4 chunks of a key
constexpr int Q_COMPONENTS = K_STEPS * 4 * PER_CHUNK;  // of a query, those beyond the head being zero
#ifdef PH_KV_FP8
constexpr int PRODUCTS = 4 * ph_div_up(D, 64);  // of 16 components of the values
#else
constexpr int PRODUCTS = ph_div_up(D, 16);
#endif

__device__ __forceinline__ int k_chunk(int row, int chunk) {
  return row * K_PITCH + (K_PITCH % 8 == 0 ? chunk ^ (row & 1) << 2 : chunk);
}
__device__ __forceinline__ int v_chunk(int row, int chunk) {
  return TILE * K_PITCH + row * V_PITCH + (V_PITCH % 8 == 0 ? chunk ^ (row & 7) : chunk);
}

// Copies BYTES (2, 4, 8 or 16) to shared memory: asynchronously, but for 2. Zeros where not `valid`.
template <int BYTES> __device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if (BYTES == 16) {
    ph_cp_async16(shared, global, valid);
  } else if (BYTES > 2) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(ph_shared_address(shared)), "l"(global),
                 "n"(BYTES > 2 ? BYTES : 4), "r"(valid ? BYTES : 0)
                 : "memory");
  } else {
    *reinterpret_cast<u16*>(shared) = valid ? *reinterpret_cast<const u16*>(global) : 0;
  }
#else
  for (int i = 0; i < BYTES / 2; ++i)
    reinterpret_cast<u16*>(shared)[i] = valid ? reinterpret_cast<const u16*>(global)[i] : 0;
#endif
}

// What follows a row's last component in its last chunk would be multiplied with zeros: it must be finite.
__device__ __forceinline__ void clear_ends(uint4* tile) {
  if (ROW % 16 == 0) return;
  const int row = threadIdx.x & 15;
  tile[threadIdx.x & 16 ? v_chunk(row, CHUNKS - 1) : k_chunk(row, CHUNKS - 1)] = make_uint4(0, 0, 0, 0);
}

// Starts copying a tile. Lane l knows in which row of the caches key l % 16 lies; a negative one leaves zeros.
__device__ __forceinline__ void fetch(uint4* tile, int place, const stored_t* k_cache, const stored_t* v_cache,
                                      const float* k_scales, const float* v_scales) {
  constexpr int EACH = ROW / COPY;
  const int lane = threadIdx.x & 31;
#pragma unroll(COPY == 16 ? 16 : 4)
  for (int i = lane; i < ph_div_up(TILE * EACH, 32) * 32; i += 32) {
    const int row = i / EACH, at = i % EACH * COPY;  // bytes of the row
    const int from = __shfl_sync(PH_FULL_MASK, place, row & 15);
    if (TILE * EACH % 32 != 0 && row >= TILE) continue;
    const i64 offset = (i64)max(from, 0) * ROW + at;
    u8* k = reinterpret_cast<u8*>(tile + k_chunk(row, at / 16)) + at % 16;
    u8* v = reinterpret_cast<u8*>(tile + v_chunk(row, at / 16)) + at % 16;
    copy_async<COPY>(k, reinterpret_cast<const u8*>(k_cache) + offset, from >= 0);
    copy_async<COPY>(v, reinterpret_cast<const u8*>(v_cache) + offset, from >= 0);
  }
#ifdef PH_KV_FP8
  copy_async<4>(reinterpret_cast<float*>(tile + SCALES) + lane, (lane < TILE ? k_scales : v_scales) + max(place, 0),
                place >= 0);
#endif
}

// Puts components d, d+1 of a row where `fetch` would have copied them.
template <typename T> __device__ __forceinline__ void put_key(uint4* tile, int row, int d, T pair) {
  const int at = d * (int)sizeof(stored_t);
  *reinterpret_cast<T*>(reinterpret_cast<u8*>(tile + k_chunk(row, at / 16)) + at % 16) = pair;
}
template <typename T> __device__ __forceinline__ void put_value(uint4* tile, int row, int d, T pair) {
  const int at = d * (int)sizeof(stored_t);
  *reinterpret_cast<T*>(reinterpret_cast<u8*>(tile + v_chunk(row, at / 16)) + at % 16) = pair;
}

// Queries as the second operand: the components of chunk 4c+t, in their order.
typedef u32 queries_t[K_STEPS][PER_CHUNK / 2];

// `query` is Q_COMPONENTS values of the head that the lane's column stands for.
__device__ __forceinline__ void load_queries(queries_t& q, const kv_t* query, bool valid) {
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int c = 0; c < K_STEPS; ++c)
#pragma unroll
    for (int i = 0; i < PER_CHUNK / 8; ++i) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (valid) x = *reinterpret_cast<const uint4*>(query + (4 * c + t) * PER_CHUNK + 8 * i);
      q[c][4 * i] = x.x, q[c][4 * i + 1] = x.y, q[c][4 * i + 2] = x.z, q[c][4 * i + 3] = x.w;
    }
}

// Register i of a chunk; with i known when compiling, nothing is left of this.
__device__ __forceinline__ u32 word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// s = keys times queries: s[0], s[1] are key g with heads 2t, 2t+1, s[2], s[3] key g+8.
__device__ __forceinline__ void score(float (&s)[4], const uint4* tile, const queries_t& q) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float other[4] = {};  // two chains of products: half the latency
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = 0.0f;
#pragma unroll
  for (int c = 0; c < K_STEPS; ++c) {
    uint4 upper = make_uint4(0, 0, 0, 0), lower = upper;
    if (CHUNKS % 4 == 0 || 4 * c + t < CHUNKS) {
      upper = tile[k_chunk(g, 4 * c + t)];
      lower = tile[k_chunk(g + 8, 4 * c + t)];
    }
#pragma unroll
    for (int i = 0; i < PER_CHUNK / 4; ++i) {
#ifdef PH_KV_FP8
      const u32 x = word(upper, i), y = word(lower, i);
      const u32 a[4] = {widen2(x), widen2(y), widen2(x >> 16), widen2(y >> 16)};
#else
      const u32 a[4] = {word(upper, 2 * i), word(lower, 2 * i), word(upper, 2 * i + 1), word(lower, 2 * i + 1)};
#endif
      const u32 b[2] = {q[c][2 * i], q[c][2 * i + 1]};
      kv_mma(i & 1 ? other : s, a, b);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] += other[i];
}

// acc += values times probabilities, p being those of head g: p[0] of keys 2t, 2t+1, p[1] of 2t+8, 2t+9. Of acc[j], [0]
// and [1] are component value_component(j, 0) with heads 2t, 2t+1; [2] and [3] are value_component(j, 1).
__device__ __forceinline__ void add_values(float (&acc)[PRODUCTS][4], const uint4* tile, const u32 (&p)[2]) {
  const int lane = threadIdx.x & 31;
#ifdef PH_KV_FP8
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int c = 0; c < PRODUCTS / 4; ++c) {
    const int at = 64 * c + 8 * g;
    uint4 v[4];  // components at..at+7 of keys 2t, 2t+1, 2t+8, 2t+9
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint2 x = make_uint2(0, 0);
      if (D % 64 == 0 || at < D)
        x = reinterpret_cast<const uint2*>(tile + v_chunk(2 * t + (i & 1) + 4 * (i & 2), at / 16))[g & 1];
      v[i] = widen(x);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 a[4] = {__byte_perm(word(v[0], j), word(v[1], j), 0x5410),
                        __byte_perm(word(v[0], j), word(v[1], j), 0x7632),
                        __byte_perm(word(v[2], j), word(v[3], j), 0x5410),
                        __byte_perm(word(v[2], j), word(v[3], j), 0x7632)};
      kv_mma(acc[4 * c + j], a, p);
    }
  }
#else
#pragma unroll
  for (int j = 0; j < PRODUCTS; ++j) {
    u32 a[4];
    const int chunk = min(2 * j + (lane >> 3 & 1), CHUNKS - 1);  // what lies beyond the head is not used
    ph_ldmatrix4_transposed(a, tile + v_chunk((lane & 7) + (lane >> 4) * 8, chunk));
    kv_mma(acc[j], a, p);
  }
#endif
}

__device__ __forceinline__ int value_component(int j, int half) {
  const int g = (threadIdx.x & 31) >> 2;
#ifdef PH_KV_FP8
  return 64 * (j / 4) + 8 * g + 2 * (j % 4) + half;
#else
  return 16 * j + g + 8 * half;
#endif
}
