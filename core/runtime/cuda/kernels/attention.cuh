// What both attention kernels share: the cache's type, its tensor-core step, and scores in powers of two.
//
// Macros: PH_HEAD_DIM (even), PH_BLOCK_SIZE, PH_KV_BF16 (else the cache is float16), PH_KV_FP8, PH_WINDOW, PH_SOFTCAP.
//
// With PH_KV_FP8 the cache holds e4m3 bytes and a float32 scale for each of its rows; PH_KV_BF16 then tells what bytes
// are widened to, exactly, for the tensor cores. The scales stay outside the products: a key's multiplies its score, a
// value's the probability.
//
// Softmax is taken in base 2. `scale` is the score's scale times log2(e); with a soft cap, cap * tanh(scale * x / cap),
// it is 2 * log2(e) * scale / cap and `cap` is log2(e) * cap.

#pragma once

#include "prelude.cuh"

#ifdef PH_KV_BF16
typedef __nv_bfloat16 kv_t;
#else
typedef __half kv_t;
#endif

#ifdef PH_KV_FP8
typedef u8 stored_t;
// Probabilities times the values' scales are rounded to kv_t, which for float16 has a floor (2^-24) and a ceiling
// (65504). Scales are at most 65504 / 448 = 146 with float16 activations, so 256 times them is below the ceiling, and
// the floor 2^-24 / 256 times the largest code, 448, is what the activations' own type loses. Being a constant, and a
// power of two, it leaves a row's result independent of the rows and keys beside it.
constexpr float VALUE_UNIT = 256.0f;
#else
typedef kv_t stored_t;
constexpr float VALUE_UNIT = 1.0f;
#endif

constexpr int D = PH_HEAD_DIM;
static_assert(D % 2 == 0 && D <= 256, "head_dim is even and at most 256");

// Two floats in one register as the cache's type, the first in the low half.
__device__ __forceinline__ u32 kv2_bits(float x, float y) {
#ifdef PH_KV_BF16
  __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
#else
  __half2 pair = __floats2half2_rn(x, y);
#endif
  return *reinterpret_cast<u32*>(&pair);
}

#ifdef PH_KV_FP8
// Two e4m3 bytes, the low half of `pair`, as kv_t. NaN codes are never stored: a row with NaN has a scale of NaN.
__device__ __forceinline__ u32 widen2(u32 pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890 && !defined(PH_KV_BF16)
  u32 wide;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"((u16)pair));
  return wide;
#else
  // Exponent and mantissa move into their places, subnormals included; the biases differ by a power of two.
  const u32 x = __byte_perm(pair, 0, 0x1404);  // bytes to the tops of the halves
#ifdef PH_KV_BF16
  const u32 wide = (x & 0x80008000u) | (x >> 4 & 0x07f007f0u);
  const __nv_bfloat162 unit = __floats2bfloat162_rn(0x1p120f, 0x1p120f);
  __nv_bfloat162 y = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&wide), unit);
#else
  const u32 wide = (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
  const __half2 unit = __floats2half2_rn(256.0f, 256.0f);
  __half2 y = __hmul2(*reinterpret_cast<const __half2*>(&wide), unit);
#endif
  return *reinterpret_cast<u32*>(&y);
#endif
}

__device__ __forceinline__ uint4 widen(uint2 x) {
  return make_uint4(widen2(x.x), widen2(x.x >> 16), widen2(x.y), widen2(x.y >> 16));
}
#endif

// Two activations as two values of the cache's type.
__device__ __forceinline__ u32 act2_to_kv2(u32 bits) {
#if defined(PH_KV_BF16) == defined(PH_ACT_BF16)
  return bits;
#else
  const float2 x = ph_to_float2(ph_bits_act2(bits));
  return kv2_bits(x.x, x.y);
#endif
}

// ph_mma for operands of the cache's type.
__device__ __forceinline__ void kv_mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if defined(PH_KV_BF16) == defined(PH_ACT_BF16)
  ph_mma(d, a, b);
#elif defined(PH_KV_BF16)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// 2^x to 2 ulp; 0 for -infinity.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A capped score. tanh(x) = 1 - 2 / (1 + e^2x): absolute error 1e-7, where tanh.approx has 5e-4 of the cap.
__device__ __forceinline__ float soften(float x, float scale, float cap) {
  return cap - __fdividef(2.0f * cap, 1.0f + exp2_fast(x * scale));
}

// Row of the cache [blocks, kv_heads, PH_BLOCK_SIZE, D] that holds a key, in this block; its values begin at row * D.
__device__ __forceinline__ int cache_row(int block, int key, int kv_heads, int kv_head) {
  return (block * kv_heads + kv_head) * PH_BLOCK_SIZE + key % PH_BLOCK_SIZE;
}

// The same by a block table. It is read past L1: a kernel that reads before it has waited must not meet what an older step
// left there.
__device__ __forceinline__ int cache_row(const int* block_table, int key, int kv_heads, int kv_head) {
  return cache_row(__ldcg(block_table + key / PH_BLOCK_SIZE), key, kv_heads, kv_head);
}
