// Quantised weights as float16 numbers of their own, scale and minimum included, for the tensor cores: for kernels in
// which a weight meets many tokens, so that its scale costs nothing per token.
//
// Codes are masked into the mantissa of 1024, brought back to code / 32 exactly, and multiplied by 32 * scale with the
// minimum subtracted, in one rounding. A scale may be as large as 2047; below 2e-6 it loses bits, as the weight itself does.

#pragma once

#include "formats.cuh"

#ifdef PH_ACT_BF16
#error "scaled weights are float16"
#endif

constexpr float SHIFT = 32.0f;

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  return ph_act2_bits(__hfma2(ph_bits_act2(a), ph_bits_act2(b), ph_bits_act2(c)));
}

// What a lane's scales become: pairs of float16. With a minimum [row half][group of the two][part] of (32 * scale,
// -minimum), else [group][part] of both rows' 32 * scale.
struct Packed {
  u32 pair[PH_HAS_MIN ? 2 : 1][2][PARTS];
};

__device__ __forceinline__ void pack(const Unit& q, Packed& out) {
  Scales s;
  read_scales(q, s);
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
      const float scale[2] = {s.scale[0][c][p] * (SHIFT * UNIT[0]), s.scale[1][c][p] * (SHIFT * UNIT[1])};
#if PH_HAS_MIN
#pragma unroll
      for (int h = 0; h < 2; ++h) out.pair[h][c][p] = ph_act2_bits(ph_to_act2(scale[h], -s.minimum[h][c][p]));
#else
      out.pair[0][c][p] = ph_act2_bits(ph_to_act2(scale[0], scale[1]));
#endif
    }
}

// Scales and minima of rows g and g + 8 in group j, doubled, from the lane of the quad that holds them.
__device__ __forceinline__ void scales_of(const Packed& s, int j, int p, int lane, u32 (&scale)[2], u32 (&minus)[2]) {
  const int from = (lane & 28) | (j >> 1);
#if PH_HAS_MIN
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const u32 pair = __shfl_sync(PH_FULL_MASK, s.pair[h][j & 1][p], from);
    scale[h] = __byte_perm(pair, 0, 0x1010), minus[h] = __byte_perm(pair, 0, 0x3232);
  }
#else
  const u32 pair = __shfl_sync(PH_FULL_MASK, s.pair[0][j & 1][p], from);
  scale[0] = __byte_perm(pair, 0, 0x1010), scale[1] = __byte_perm(pair, 0, 0x3232);
  minus[0] = minus[1] = 0;
#endif
}

// A step's weights as the tensor core's a.
__device__ __forceinline__ void weights_of_step(const Unit& q, int step, const u32 (&scale)[2], const u32 (&minus)[2],
                                                u32 (&a)[4]) {
  fragment<true>(q, step, a);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int h = r & 1;
    const float place = h && !PH_BYTES ? 16.0f : 1.0f;  // what the codes of row g + 8 count
    const u32 code = fma2(a[r], twice(1.0f / (SHIFT * place)), twice(-(1024.0f / place + PH_ZERO) / SHIFT));
    a[r] = fma2(code, scale[h], minus[h]);
  }
}
