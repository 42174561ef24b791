// What happens to a head of q, k or v before attention: norm, rotation, and the form in which the cache holds it. A
// warp takes a head; lane l holds components 2l and 2l+1 of every 64.
//
// Prefill and decode are two kernels that must store the same bits, and which products the compiler fuses into the sums
// behind them differs from place to place. So every fused step is written out here, and no other is left to be found.
//
// Macros: PH_HEAD_DIM (even), PH_ROPE_PAIRS (0: no rotation), PH_INTERLEAVED (else the pairs are halves), PH_KV_BF16
// (else the cache is float16), PH_KV_FP8 (e4m3 instead, and for each head of a token the float32 scale that makes its
// largest component 448).

#pragma once

#include "prelude.cuh"

constexpr int ITEMS = ph_div_up(PH_HEAD_DIM, 64);

typedef float2 head_t[ITEMS];  // a lane's components; those beyond the head are zero

// The first of the two components that item i of the lane is.
__device__ __forceinline__ int component(int i) { return 64 * i + 2 * (threadIdx.x & 31); }

__device__ __forceinline__ void load_head(head_t& x, const act_t* head) {
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int d = component(i);
    x[i] = d < PH_HEAD_DIM ? ph_to_float2(*reinterpret_cast<const act2_t*>(head + d)) : make_float2(0.0f, 0.0f);
  }
}

// KIND is 0 for none, 1 for RMSNorm, 2 for LayerNorm, whose statistics take two passes.
template <int KIND>
__device__ __forceinline__ void normalise(head_t& x, const float* weight, const float* bias, float eps) {
  if (KIND == 0) return;
  float sum = 0.0f;
  if (KIND == 2) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) sum += x[i].x + x[i].y;
    const float mean = __fdiv_rn(ph_warp_sum(sum), (float)PH_HEAD_DIM);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (component(i) < PH_HEAD_DIM) x[i] = make_float2(__fsub_rn(x[i].x, mean), __fsub_rn(x[i].y, mean));
    sum = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) sum = __fmaf_rn(x[i].x, x[i].x, __fmaf_rn(x[i].y, x[i].y, sum));
  const float mean = __fdiv_rn(ph_warp_sum(sum), (float)PH_HEAD_DIM);
  const float inverse = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, eps)));
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int d = component(i);
    if (d >= PH_HEAD_DIM) continue;
    const bool shifted = KIND == 2 && bias != nullptr;
    const float2 of = make_float2(__fmul_rn(inverse, weight[d]), __fmul_rn(inverse, weight[d + 1]));
    x[i].x = __fmaf_rn(x[i].x, of.x, shifted ? bias[d] : 0.0f);
    x[i].y = __fmaf_rn(x[i].y, of.y, shifted ? bias[d + 1] : 0.0f);
  }
}

// By how much the lane's components turn.
struct Angles {
#if PH_ROPE_PAIRS > 0
#ifdef PH_INTERLEAVED
  float cos[ITEMS], sin[ITEMS];
#else
  float2 cos[ITEMS], sin[ITEMS];
#endif
#endif
};

// cos and sin are [context, PH_ROPE_PAIRS].
__device__ __forceinline__ Angles load_angles(const float* cos, const float* sin, int position) {
  Angles of;
#if PH_ROPE_PAIRS > 0
  cos += (i64)position * PH_ROPE_PAIRS;
  sin += (i64)position * PH_ROPE_PAIRS;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int d = component(i);
    const bool turns = d < 2 * PH_ROPE_PAIRS;
#ifdef PH_INTERLEAVED
    of.cos[i] = turns ? cos[d / 2] : 1.0f;
    of.sin[i] = turns ? sin[d / 2] : 0.0f;
#else
    // The number of pairs may be odd, so the two components can lie on either side of the middle.
    const int a = d < PH_ROPE_PAIRS ? d : d - PH_ROPE_PAIRS, b = d + 1 < PH_ROPE_PAIRS ? d + 1 : d + 1 - PH_ROPE_PAIRS;
    of.cos[i] = turns ? make_float2(cos[a], cos[b]) : make_float2(1.0f, 1.0f);
    of.sin[i] = turns ? make_float2(sin[a], sin[b]) : make_float2(0.0f, 0.0f);
#endif
  }
#endif
  return of;
}

// A component's partner in its pair is the lane's other one, or half a rotation away, fetched through `staged`: shared
// memory of the warp for PH_HEAD_DIM floats.
__device__ __forceinline__ void rotate(head_t& x, const Angles& by, float* staged) {
#if PH_ROPE_PAIRS > 0
#ifndef PH_INTERLEAVED
  __syncwarp();
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int d = component(i);
    if (d < PH_HEAD_DIM) staged[d] = x[i].x, staged[d + 1] = x[i].y;
  }
  __syncwarp();
#endif
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int d = component(i);
    if (d >= 2 * PH_ROPE_PAIRS) continue;
#ifdef PH_INTERLEAVED
    x[i] = make_float2(__fmaf_rn(x[i].x, by.cos[i], -__fmul_rn(x[i].y, by.sin[i])),
                       __fmaf_rn(x[i].y, by.cos[i], __fmul_rn(x[i].x, by.sin[i])));
#else
    const bool first = d < PH_ROPE_PAIRS, second = d + 1 < PH_ROPE_PAIRS;
    const float a = __fmul_rn(staged[first ? d + PH_ROPE_PAIRS : d - PH_ROPE_PAIRS], by.sin[i].x);
    const float b = __fmul_rn(staged[second ? d + 1 + PH_ROPE_PAIRS : d + 1 - PH_ROPE_PAIRS], by.sin[i].y);
    x[i] = make_float2(__fmaf_rn(x[i].x, by.cos[i].x, first ? -a : a),
                       __fmaf_rn(x[i].y, by.cos[i].y, second ? -b : b));
#endif
  }
#endif
}

// ---- the cache's form: two neighbouring components as kv2_t

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

// Divides a head by its scale, and returns that.
__device__ __forceinline__ float take_scale(head_t& x) {
  u32 most = 0;  // as bits, where NaN is above infinity: a head with either gets it for its scale
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
    most = max(most, max(__float_as_uint(fabsf(x[i].x)), __float_as_uint(fabsf(x[i].y))));
#pragma unroll
  for (int step = 16; step; step /= 2) most = max(most, __shfl_xor_sync(PH_FULL_MASK, most, step));
  float scale = __fdiv_rn(__uint_as_float(most), 448.0f);
  if (scale < 0x1p-126f) scale = 1.0f;  // zero, or too small to divide by
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) x[i] = make_float2(__fdiv_rn(x[i].x, scale), __fdiv_rn(x[i].y, scale));
  return scale;
}
#elif defined(PH_KV_BF16)
typedef __nv_bfloat162 kv2_t;
__device__ __forceinline__ kv2_t to_kv2(float2 x) { return __floats2bfloat162_rn(x.x, x.y); }
#else
typedef __half2 kv2_t;
__device__ __forceinline__ kv2_t to_kv2(float2 x) { return __floats2half2_rn(x.x, x.y); }
#endif
