// What happens to a token's q, k and v before attention: the norms of the heads, the rotation, and the way into the
// paged cache. A warp takes one head of one token; lane l holds components 2l and 2l+1 of every 64.
//
// Macros: PH_HEAD_DIM (even), PH_BLOCK_SIZE, PH_ROPE_PAIRS (0: no rotation), PH_INTERLEAVED (else the pairs are
// halves), PH_Q_NORM and PH_K_NORM (0 none, 1 RMSNorm, 2 LayerNorm), PH_KV_BF16 (else the cache is float16), PH_KV_FP8
// (e4m3 instead, and for each head of a token the float32 scale that makes its largest component 448).

#include "prelude.cuh"

#ifdef PH_KV_FP8
typedef u16 kv2_t;

// The e4m3 code of x: to nearest even, 448 at most. In software, so that every GPU stores the same bytes.
__device__ __forceinline__ u32 to_e4m3(float x) {
  const u32 sign = __float_as_uint(x) >> 24 & 0x80u;
  const float a = fminf(fabsf(x), 448.0f);
  // Subnormals are multiples of 2^-9, as are floats from 2^14 on; of others 20 bits of the mantissa are rounded away.
  const u32 tiny = __float_as_uint(a + 0x1p14f) - __float_as_uint(0x1p14f);
  const u32 bits = __float_as_uint(a);
  const u32 code = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3);
  return sign | (a < 0x1p-6f ? tiny : code);
}

__device__ __forceinline__ kv2_t to_kv2(float2 x) { return (u16)(to_e4m3(x.x) | to_e4m3(x.y) << 8); }
#elif defined(PH_KV_BF16)
typedef __nv_bfloat162 kv2_t;
__device__ __forceinline__ kv2_t to_kv2(float2 x) { return __floats2bfloat162_rn(x.x, x.y); }
#else
typedef __half2 kv2_t;
__device__ __forceinline__ kv2_t to_kv2(float2 x) { return __floats2half2_rn(x.x, x.y); }
#endif

constexpr int D = PH_HEAD_DIM;
constexpr int ITEMS = ph_div_up(D, 64);
constexpr int WARPS = 4;

// Statistics over the warp, in two passes for LayerNorm; components beyond the head are zero.
template <int KIND>
__device__ __forceinline__ void normalise(float2 (&x)[ITEMS], const float* weight, const float* bias, float eps) {
  if (KIND == 0) return;
  const int lane = threadIdx.x & 31;
  float sum = 0.0f;
  if (KIND == 2) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) sum += x[i].x + x[i].y;
    const float mean = ph_warp_sum(sum) / (float)D;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const bool valid = 64 * i + 2 * lane < D;
      x[i] = valid ? make_float2(x[i].x - mean, x[i].y - mean) : make_float2(0.0f, 0.0f);
    }
    sum = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) sum += x[i].x * x[i].x + x[i].y * x[i].y;
  const float inverse = 1.0f / sqrtf(ph_warp_sum(sum) / (float)D + eps);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int d = 64 * i + 2 * lane;
    if (d >= D) continue;
    x[i].x *= inverse * weight[d];
    x[i].y *= inverse * weight[d + 1];
    if (KIND == 2 && bias != nullptr) {
      x[i].x += bias[d];
      x[i].y += bias[d + 1];
    }
  }
}

#if PH_ROPE_PAIRS > 0
// The pair's partner is the other component of the lane, or half a rotation further, fetched through shared memory.
__device__ __forceinline__ void rotate(float2 (&x)[ITEMS], const float* cos, const float* sin, float* staged) {
  constexpr int P = PH_ROPE_PAIRS;
  const int lane = threadIdx.x & 31;
#ifndef PH_INTERLEAVED
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int d = 64 * i + 2 * lane;
    if (d < D) staged[d] = x[i].x, staged[d + 1] = x[i].y;
  }
  __syncwarp();
#endif
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int d = 64 * i + 2 * lane;
    if (d >= 2 * P) continue;
#ifdef PH_INTERLEAVED
    const float c = cos[d / 2], s = sin[d / 2];
    x[i] = make_float2(x[i].x * c - x[i].y * s, x[i].y * c + x[i].x * s);
#else
    // P may be odd, so the two components can lie on either side of the middle.
    x[i].x = d < P ? x[i].x * cos[d] - staged[d + P] * sin[d] : x[i].x * cos[d - P] + staged[d - P] * sin[d - P];
    const int e = d + 1;
    x[i].y = e < P ? x[i].y * cos[e] - staged[e + P] * sin[e] : x[i].y * cos[e - P] + staged[e - P] * sin[e - P];
#endif
  }
}
#endif

// qkv [N, heads + 2 * kv_heads, D]: q and k are changed in place, k and v go to the caches [blocks, kv_heads,
// PH_BLOCK_SIZE, D]. cos and sin are [context, PH_ROPE_PAIRS]. A negative position marks a row of padding. The scales
// [blocks, kv_heads, PH_BLOCK_SIZE] are written with PH_KV_FP8 only.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    ph_store_kv(act_t* qkv, kv2_t* k_cache, kv2_t* v_cache, const int* positions, const int* sequences,
                const int* block_tables, const float* cos, const float* sin, const float* q_weight,
                const float* q_bias, const float* k_weight, const float* k_bias, int heads, int kv_heads,
                int table_width, float q_eps, float k_eps,
                float* k_scales, float* v_scales) {
#if PH_ROPE_PAIRS > 0 && !defined(PH_INTERLEAVED)
  __shared__ float staged[WARPS][D];
#endif
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int head = blockIdx.y * WARPS + warp;
  const i64 row = blockIdx.x;
  const int position = positions[row];
  if (head >= heads + 2 * kv_heads || position < 0) return;
  act2_t* data = reinterpret_cast<act2_t*>(qkv + (row * (heads + 2 * kv_heads) + head) * D);

  float2 x[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
    x[i] = 64 * i + 2 * lane < D ? ph_to_float2(data[32 * i + lane]) : make_float2(0.0f, 0.0f);

  const bool is_q = head < heads, is_k = !is_q && head < heads + kv_heads;
  if (is_q) normalise<PH_Q_NORM>(x, q_weight, q_bias, q_eps);
  if (is_k) normalise<PH_K_NORM>(x, k_weight, k_bias, k_eps);
#if PH_ROPE_PAIRS > 0
  if (is_q || is_k) {
    const i64 angle = (i64)position * PH_ROPE_PAIRS;
#ifdef PH_INTERLEAVED
    rotate(x, cos + angle, sin + angle, nullptr);
#else
    rotate(x, cos + angle, sin + angle, staged[warp]);
#endif
  }
#endif
  if (is_q || is_k) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (64 * i + 2 * lane < D) data[32 * i + lane] = ph_to_act2(x[i].x, x[i].y);
  }
  if (is_q) return;

  const int kv_head = (head - heads) % kv_heads;
  const i64 block = block_tables[(i64)sequences[row] * table_width + position / PH_BLOCK_SIZE];
  const i64 slot = (block * kv_heads + kv_head) * PH_BLOCK_SIZE + position % PH_BLOCK_SIZE;
#ifdef PH_KV_FP8
  u32 most = 0;  // as bits, where NaN is above infinity: a head with either gets it for its scale
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
    most = max(most, max(__float_as_uint(fabsf(x[i].x)), __float_as_uint(fabsf(x[i].y))));
#pragma unroll
  for (int step = 16; step; step /= 2) most = max(most, __shfl_xor_sync(PH_FULL_MASK, most, step));
  float scale = __uint_as_float(most) / 448.0f;
  if (scale < 0x1p-126f) scale = 1.0f;  // zero, or too small to divide by
  if (lane == 0) (is_k ? k_scales : v_scales)[slot] = scale;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) x[i] = make_float2(x[i].x / scale, x[i].y / scale);
#endif
  kv2_t* cache = (is_k ? k_cache : v_cache) + slot * (D / 2);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
    if (64 * i + 2 * lane < D) cache[32 * i + lane] = to_kv2(x[i]);
}
