// What both attention kernels share: the cache's type, its tensor-core step, and scores in powers of two.
//
// Macros: PH_HEAD_DIM (even), PH_BLOCK_SIZE, PH_KV_BF16 (else the cache is float16), PH_WINDOW, PH_SOFTCAP.
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

// Row of the cache [blocks, kv_heads, PH_BLOCK_SIZE, D] that holds a key; its values begin at row * D.
__device__ __forceinline__ int cache_row(const int* block_table, int key, int kv_heads, int kv_head) {
  return (__ldg(block_table + key / PH_BLOCK_SIZE) * kv_heads + kv_head) * PH_BLOCK_SIZE + key % PH_BLOCK_SIZE;
}
