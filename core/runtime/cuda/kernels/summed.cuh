// Quantised weights as bare codes for the tensor cores, their scales applied to sums: for kernels in which a weight meets
// so few tokens that a scale for each sum of a group costs less than one for each weight.
//
// A group's codes are multiplied as formats.cuh's fragments have them, into sums of their own. Scales are float32 and lie
// in shared memory, where the four lanes that need one find it.
//
// What a code has too much, and what a minimum takes away, is the same for all columns of a group: it meets the sums of
// the activations. These are the sums of 32 columns and 8 tokens at a time that a product with ones gives: the ones stand
// in column j for group j, so that after eight groups a lane holds the sums of groups 2t and 2t + 1, just those whose
// minima it has loaded. Both are what the tensor core wants next, with no lane asking another: minima as its a, sums as b.
//
// Every number is exact but for sums in float32: minima and zero points are float16 or small integers times a float32 of
// the row, and a sum of activations is two float16 numbers, 22 bits. Of the lower one fewer are left where what it meets is
// a block's own scale or minimum (PH_SCALES 0 and 1) below 4e-3: 1/64 of that is a float16 subnormal.

#pragma once

#include "formats.cuh"

#ifdef PH_ACT_BF16
#error "sums of activations are float16"
#endif

// Powers of two may be too small for float16: there codes lose their zero point in registers.
constexpr bool CENTRED = PH_SCALES == 7, OFFSETS = !CENTRED && NEEDS_SUMS;

__device__ __forceinline__ u32 plus2(u32 a, float b) {
  return ph_act2_bits(__hadd2(ph_bits_act2(a), ph_bits_act2(twice(b))));
}
__device__ __forceinline__ u32 times2(u32 a, float b) {
  return ph_act2_bits(__hmul2(ph_bits_act2(a), ph_bits_act2(twice(b))));
}

// ---- scales

// Those of a unit in shared memory: four floats for each row g and two groups, or parts of one. Rows of four are so far
// apart that neither those who write nor those who read meet in a bank.
constexpr int SCALE_STEP = PARTS == 1 ? 160 : 144, SCALE_BYTES = SCALE_STEP * 4 * PARTS;

__device__ __forceinline__ void put_scales(const Unit& q, u8* shared, int g, int t) {
  Scales s;
  read_scales(q, s);
  const float one[2] = {CENTRED ? UNIT[0] : 1.0f, CENTRED ? UNIT[1] : 1.0f};
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const int c[2] = {PARTS == 1 ? 0 : i, PARTS == 1 ? 1 : i}, p[2] = {0, PARTS - 1};
    *reinterpret_cast<float4*>(shared + (PARTS * t + i) * SCALE_STEP + 16 * g) =
        make_float4(s.scale[0][c[0]][p[0]] * one[0], s.scale[1][c[0]][p[0]] * one[1], s.scale[0][c[1]][p[1]] * one[0],
                    s.scale[1][c[1]][p[1]] * one[1]);
  }
}

// Those of rows g and g + 8, of group i or, where it has two parts, of half a group.
__device__ __forceinline__ float2 scales_at(const u8* shared, int i, int g) {
  return *reinterpret_cast<const float2*>(shared + (i >> 1) * SCALE_STEP + 16 * g + 8 * (i & 1));
}

// ---- codes

__device__ __forceinline__ void codes_of_step(const Unit& q, int step, u32 (&a)[4]) {
  fragment<CENTRED>(q, step, a);
  if (CENTRED)
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = plus2(a[r], -(1024.0f + PH_ZERO));
}

// ---- sums of activations

constexpr float SUM_SHARE = 1.0f / 32.0f;  // of a sum, so that no float16 is too large
constexpr float REST = 64.0f;              // that what is left of it is multiplied with, so that it is not too small

template <int TILES>
struct Sums {
  float d[TILES][4];
  u32 pick[2];  // the upper bytes of 1.0 in float16, in byte g of the eight

  __device__ __forceinline__ void begin(int g) {
    pick[0] = g < 4 ? 0x3cu << (8 * g) : 0, pick[1] = g < 4 ? 0 : 0x3cu << (8 * (g - 4));
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) d[n][e] = 0.0f;
  }
  // Here tokens are rows: of parts of a group g those of the first, g + 8 those of the second; else both are halves.
  __device__ __forceinline__ void add(int j, const u32 (&b)[TILES][4]) {
    u32 column[2];  // made anew each time: sixteen registers are too many to keep
#pragma unroll
    for (int i = 0; i < 2; ++i)
      asm volatile("prmt.b32 %0, %1, %2, %3;"
                   : "=r"(column[i])
                   : "r"(pick[j >> 2]), "r"(0), "r"(0x0404 | (j & 3) << 12 | (j & 3) << 4));
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const u32 a[4] = {b[n][0], b[n][PARTS], b[n][3 - PARTS], b[n][3]};
      ph_mma(d[n], a, column);
    }
  }
  // Token g's sums of groups 2t and 2t + 1, or parts p of them, in two numbers.
  __device__ __forceinline__ void pair(int n, int p, u32 (&b)[2]) const {
    const float first = (PARTS == 1 ? d[n][0] + d[n][2] : d[n][2 * p]) * SUM_SHARE;
    const float second = (PARTS == 1 ? d[n][1] + d[n][3] : d[n][2 * p + 1]) * SUM_SHARE;
    const act2_t large = ph_to_act2(first, second);
    const float2 found = ph_to_float2(large);
    b[0] = ph_act2_bits(large);
    b[1] = ph_act2_bits(ph_to_act2((first - found.x) * REST, (second - found.y) * REST));
  }
};

// ---- what meets them

// Of rows g and g + 8, groups 2t and 2t + 1, each lane keeps in shared memory what meets the sums at the unit's end: base *
// pair is scale * zero point + minimum, for a share of the sums.
constexpr int OFFSET_BYTES = !OFFSETS ? 0 : PARTS == 1 ? 512 : 1024;

__device__ __forceinline__ void put_offsets(const Unit& q, u8* shared, int lane) {
  [[maybe_unused]] constexpr u32 AT_1024 = 0x64006400;
  u32 pair[2][PARTS];
  float base[2];
#if PH_SCALES == 2 || PH_SCALES == 5
  base[0] = half_pair(q.supers[0]).y / SUM_SHARE, base[1] = half_pair(q.supers[1]).y / SUM_SHARE;
#elif PH_SCALES == 3 || PH_SCALES == 4 || PH_SCALES == 6
  const float2 d = half_pair(q.supers[0]);
  base[0] = d.x * (PH_ZERO / SUM_SHARE), base[1] = d.y * (PH_ZERO / SUM_SHARE);
#else
  base[0] = base[1] = (PH_HAS_MIN ? -1.0f : PH_ZERO) / SUM_SHARE;
#endif
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
#if PH_SCALES == 0 || PH_SCALES == 1
      pair[h][p] = q.scales[2 * PH_HAS_MIN + h];
#elif PH_SCALES == 2 || PH_SCALES == 6
      const u32 six = (PH_HAS_MIN ? __funnelshift_r(q.scales[0], q.scales[1], 24) : q.scales[0]) >> (12 * h);
      pair[h][p] = plus2((six & 0x3f) | (six << 10 & 0x3f0000) | AT_1024, -(1024.0f + (PH_HAS_MIN ? 0 : 32)));
#elif PH_SCALES == 3
      pair[h][p] = plus2(__byte_perm(q.scales[h], 0x64, 0x4240 + 0x0101 * p), -(1024.0f + 128.0f));
#elif PH_SCALES == 4
      const u32 six = h ? __funnelshift_r(q.scales[0], q.scales[1], 24) : q.scales[0];
      pair[h][p] = plus2((six >> 6 * p & 0x3f) | (six << 4 >> 6 * p & 0x3f0000) | AT_1024, -(1024.0f + 32.0f));
#elif PH_SCALES == 5
      pair[h][p] = plus2((q.scales[h] >> (8 * p + 4) & 0x000f000f) | AT_1024, -1024.0f);
#else
      pair[h][p] = 0;
#endif
    }
  uint4* const to = reinterpret_cast<uint4*>(shared) + lane;
  *to = make_uint4(pair[0][0], pair[1][0], __float_as_uint(base[0]), __float_as_uint(base[1]));
  if (PARTS == 2) *reinterpret_cast<uint2*>(to + 32) = make_uint2(pair[0][PARTS - 1], pair[1][PARTS - 1]);
}

// acc -= base * pair * sums
template <int TILES>
__device__ __forceinline__ void take_away(const u8* shared, int lane, const u32 (&sums)[TILES][PARTS][2],
                                          float (&acc)[TILES][4]) {
  const uint4* const from = reinterpret_cast<const uint4*>(shared) + lane;
  const uint4 first = *from;
  const uint2 second = PARTS == 2 ? *reinterpret_cast<const uint2*>(from + 32) : make_uint2(0, 0);
  const float base[2] = {__uint_as_float(first.z), __uint_as_float(first.w)};
  const u32 a[2][4] = {{first.x, first.y, times2(first.x, 1.0f / REST), times2(first.y, 1.0f / REST)},
                       {second.x, second.y, times2(second.x, 1.0f / REST), times2(second.y, 1.0f / REST)}};
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int p = 0; p < PARTS; ++p) ph_mma(d, a[p], sums[n][p]);
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = fmaf(-base[e >> 1], d[e], acc[n][e]);
  }
}
