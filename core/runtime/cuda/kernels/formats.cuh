// Quantised weights as tiles for the tensor cores: how a lane loads its share of a unit and turns it into fragments.
//
// A tile is 16 rows, a unit 16 rows x 256 columns: 8 groups of 32 columns, two steps of 16 in each. Lane 4*g + t owns
// rows g and g + 8 of every step and, in group j, the columns
//   32*j + 8*t + 4*s + i   where 32 weights share a scale, so that a lane's columns of both steps are 16 bytes of x
//   32*j + 16*s + 4*t + i  where 16 do, so that a step lies within one scale
// for step s and i = 0..3. The tensor core is told that i = 0, 1 are its k = 2t, 2t+1 and i = 2, 3 its k = 2t+8, 2t+9;
// weights and activations are permuted alike, so the sum does not change.
//
// The clever idea: codes are never converted. Bits masked out in place are the mantissa of a float16 subnormal, code *
// 2^-24, which the tensor core multiplies exactly; the scales are multiplied by 2^24. The codes of row g + 8 keep their
// place four bits higher and count 16-fold, which saves a shift. (bfloat16 has too little range for that: there the
// bits are OR-ed into the mantissa of 128, which makes it 128 + code.) What a format's code has too much, its zero
// point, leaves in float32 through the sum of the activations, which a product with ones gives.

#pragma once

#include "prelude.cuh"

#define PH_BYTES (PH_LOW_BITS == 8 || PH_TABLE != 0)  // a code passes through a byte holding value + 128
#define PH_HAS_MIN (PH_SCALES == 1 || PH_SCALES == 2 || PH_SCALES == 5)

constexpr int LOW_WORDS = 4 * PH_LOW_BITS;
constexpr int LOW_VECTORS = PH_LOW_BITS;
constexpr int HIGH_WORDS = 4 * PH_HIGH_BITS;
constexpr int PARTS = PH_GROUP == 16 ? 2 : 1;  // scales in a group of 32
// Groups of 32 columns after which a vector of low (high) bits is used up.
constexpr int LOW_GROUPS = 8 / LOW_VECTORS, HIGH_GROUPS = PH_HIGH_BITS == 2 ? 4 : 8;

// A fragment's value is UNIT[h] * integer + BIAS[h] in rows g (h = 0) and g + 8 (h = 1).
#ifdef PH_ACT_BF16
constexpr float UNIT[2] = {1.0f, 1.0f};
constexpr float BIAS[2] = {PH_BYTES ? 0.0f : 128.0f + PH_ZERO, PH_BYTES ? 0.0f : 128.0f + PH_ZERO};
constexpr u32 ONES = 0x3f803f80;
#else
constexpr float TINY = 1.0f / 16777216.0f;
constexpr float UNIT[2] = {TINY, PH_BYTES ? TINY : 16.0f * TINY};
constexpr float BIAS[2] = {PH_ZERO * UNIT[0], PH_ZERO * UNIT[1]};
constexpr u32 ONES = 0x3c003c00;
#endif
constexpr bool NEEDS_SUMS = BIAS[0] != 0.0f || PH_HAS_MIN;

// ---- where the bits lie; the kernel that packs and the ones that unpack both ask here

// Column within its group of 32.
__host__ __device__ constexpr int column_in_group(int s, int t, int i) {
  return PH_GROUP == 16 ? 16 * s + 4 * t + i : 8 * t + 4 * s + i;
}

// Steps whose low (high) bits share a word, and the first position in a fragment register that the bits of row g take.
constexpr int LOW_STEPS = PH_LOW_BITS == 2 ? 2 : 1;
constexpr int HIGH_STEPS = PH_HIGH_BITS == 2 ? 2 : 4;
constexpr int HIGH_PLACE = PH_LOW_BITS;

// How far a word is rotated to the right to bring step i's bits for registers 0 and 1 into place; 2 and 3: 8 more.
__host__ __device__ constexpr int low_turn(int i) { return PH_LOW_BITS * i; }
__host__ __device__ constexpr int high_turn(int i) {
  return PH_HIGH_BITS == 2 ? 2 * i : i + (PH_LOW_BITS == 2 ? -2 : 0);
}

// The bit of its word where the low (high) bits of register r, half p, step i of the word begin.
__host__ __device__ constexpr int low_bit(int i, int r, int p) {
  return PH_LOW_BITS == 8 ? 16 * (r & 1) + 8 * p  // two words a step: registers 0 and 1, 2 and 3
         : PH_TABLE       ? 8 * r + 4 * p
                          : (4 * (r & 1) + 16 * p + low_turn(i) + 8 * (r >> 1)) & 31;
}
__host__ __device__ constexpr int high_bit(int i, int r, int p) {
  return (HIGH_PLACE + 4 * (r & 1) + 16 * p + high_turn(i) + 8 * (r >> 1) + 32) & 31;
}

// A number in both halves of a register.
__device__ __forceinline__ u32 twice(float x) { return ph_act2_bits(ph_to_act2(x, x)); }

// ---- a lane's share of a unit

struct Unit {
  u32 low[LOW_WORDS], high[HIGH_WORDS + 1], scales[4], supers[2];
};

// Where a unit is read from: memory of the device, once; or a copy in shared memory.
struct FromGlobal {
  static __device__ __forceinline__ uint4 load128(const u8* p) { return ph_ldg128_once(p); }
  static __device__ __forceinline__ uint2 load64(const u8* p) { return ph_ldg64_once(p); }
  static __device__ __forceinline__ u32 load32(const u8* p) { return ph_ldg32_once(p); }
  static __device__ __forceinline__ u32 load16(const u8* p) { return __ldg(reinterpret_cast<const u16*>(p)); }
  static __device__ __forceinline__ u32 load8(const u8* p) { return __ldg(p); }
};
struct FromShared {
  static __device__ __forceinline__ uint4 load128(const u8* p) { return *reinterpret_cast<const uint4*>(p); }
  static __device__ __forceinline__ uint2 load64(const u8* p) { return *reinterpret_cast<const uint2*>(p); }
  static __device__ __forceinline__ u32 load32(const u8* p) { return *reinterpret_cast<const u32*>(p); }
  static __device__ __forceinline__ u32 load16(const u8* p) { return *reinterpret_cast<const u16*>(p); }
  static __device__ __forceinline__ u32 load8(const u8* p) { return *p; }
};

// A unit is loaded whole, or vector by vector as room becomes free.

// `vectors` is how many vectors of low bits the unit holds; the others become zero codes.
template <typename From = FromGlobal>
__device__ __forceinline__ void load_low(Unit& q, const u8* unit, int lane, int v, int vectors) {
  uint4 w = make_uint4(0, 0, 0, 0);
  if (PH_BLOCK == 256 || v < vectors) w = From::load128(unit + PH_LOW_AT + 512 * v + 16 * lane);
  q.low[4 * v] = w.x, q.low[4 * v + 1] = w.y, q.low[4 * v + 2] = w.z, q.low[4 * v + 3] = w.w;
}

template <typename From = FromGlobal>
__device__ __forceinline__ void load_high(Unit& q, const u8* unit, int lane, int v) {
  const uint4 w = From::load128(unit + PH_HIGH_AT + 512 * v + 16 * lane);
  q.high[4 * v] = w.x, q.high[4 * v + 1] = w.y, q.high[4 * v + 2] = w.z, q.high[4 * v + 3] = w.w;
}

template <typename From = FromGlobal>
__device__ __forceinline__ void load_scales(Unit& q, const u8* unit, int lane) {
#if PH_SCALES == 0 || PH_SCALES == 3 || PH_SCALES == 5
  const uint2 s = From::load64(unit + 8 * lane);
  q.scales[0] = s.x, q.scales[1] = s.y;
#elif PH_SCALES == 1
  const uint4 s = From::load128(unit + 16 * lane);
  q.scales[0] = s.x, q.scales[1] = s.y, q.scales[2] = s.z, q.scales[3] = s.w;
#elif PH_SCALES == 2 || PH_SCALES == 4
  q.scales[0] = From::load32(unit + 4 * lane);
  q.scales[1] = From::load16(unit + 128 + 2 * lane);
#elif PH_SCALES == 6
  q.scales[0] = From::load16(unit + 2 * lane) | From::load8(unit + 64 + lane) << 16;
#else
  q.scales[0] = From::load32(unit + 4 * lane);
#endif
#if PH_SCALES == 2 || PH_SCALES == 5
  const uint2 d = From::load64(unit + PH_SUPERS_AT + 8 * (lane >> 2));
  q.supers[0] = d.x, q.supers[1] = d.y;
#elif PH_SCALES == 3 || PH_SCALES == 4 || PH_SCALES == 6
  q.supers[0] = From::load32(unit + PH_SUPERS_AT + 4 * (lane >> 2));
#endif
}

template <typename From = FromGlobal>
__device__ __forceinline__ void load_unit(Unit& q, const u8* unit, int lane, int vectors) {
#pragma unroll
  for (int v = 0; v < LOW_VECTORS; ++v) load_low<From>(q, unit, lane, v, vectors);
#pragma unroll
  for (int v = 0; v < PH_HIGH_BITS; ++v) load_high<From>(q, unit, lane, v);
  load_scales<From>(q, unit, lane);
}

__device__ __forceinline__ int vectors_in(int unit, int cols) {
  return PH_BLOCK == 256 ? LOW_VECTORS : ph_div_up(min(256, cols - 256 * unit) * PH_LOW_BITS, 256);
}

// ---- codes to fragments

__device__ __forceinline__ u32 turn_right(u32 w, int bits) { return __funnelshift_r(w, w, bits & 31); }

// Four bytes, each an integer + 128, to registers 2*half and 2*half + 1; `above` is put over each byte (float16 only).
__device__ __forceinline__ void spread_bytes(u32 w, u32& first, u32& second, u32 above = 0) {
#ifdef PH_ACT_BF16
  // 128 + 127 is all that a mantissa of 7 bits can hold: the top bit chooses between adding -256 and -128, exactly.
  u32 r[2] = {__byte_perm(w, 0, 0x4140), __byte_perm(w, 0, 0x4342)};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const act2_t small = ph_bits_act2((r[n] & 0x007f007f) | 0x43004300);
    const act2_t shift = ph_bits_act2((r[n] & 0x00800080) ^ 0xc380c380);
    r[n] = ph_act2_bits(__hadd2(small, shift));
  }
  first = r[0], second = r[1];
#else
  first = __byte_perm(w, above, 0x4140), second = __byte_perm(w, above, 0x4342);
#endif
}

// Eight 4-bit codes to the bytes table[code] + 128.
__device__ __forceinline__ void look_up(u32 w, u32& first, u32& second) {
#if PH_TABLE == 1
  constexpr u32 T[4] = {0x3f2d1801, 0x766a5d4f, 0xa6998d81, 0xf1d9c5b5};
#else
  constexpr u32 T[4] = {0x83828180, 0x8c888684, 0x7d7e7f80, 0x74787a7c};
#endif
  const u32 index = w & 0x77777777, choice = 0x32103210 | ((w >> 1) & 0x44444444);
  first = __byte_perm(__byte_perm(T[0], T[1], index), __byte_perm(T[2], T[3], index), choice);
  second = __byte_perm(__byte_perm(T[0], T[1], index >> 16), __byte_perm(T[2], T[3], index >> 16), choice >> 16);
}

// Bits of `width` that begin at `place` in both halves.
__host__ __device__ constexpr u32 field(int width, int place) { return (((1u << width) - 1) << place) * 0x00010001u; }

// The weights of step 0..15 as the tensor core's a. In float16 with AT_1024 not as subnormals, but as what is added to
// 1024: 1024 + code, in rows g + 8 of codes that are no bytes 1024 + 16 * code.
template <bool AT_1024 = false>
__device__ __forceinline__ void fragment(const Unit& q, int step, u32 (&a)[4]) {
#if PH_BYTES
  u32 first, second;
#if PH_TABLE
  look_up(q.low[step], first, second);
#else
  first = q.low[2 * step], second = q.low[2 * step + 1];
#endif
  spread_bytes(first, a[0], a[1], AT_1024 ? 0x64 : 0);
  spread_bytes(second, a[2], a[3], AT_1024 ? 0x64 : 0);
#else
  const u32 low = q.low[step / LOW_STEPS], high = PH_HIGH_BITS ? q.high[step / HIGH_STEPS] : 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#ifdef PH_ACT_BF16
    const int up = 0, extra = 4 * (r & 1);
#else
    const int up = 4 * (r & 1), extra = 0;
#endif
    const int turn = extra + 8 * (r >> 1);
    a[r] = turn_right(low, low_turn(step % LOW_STEPS) + turn) & field(PH_LOW_BITS, up);
    if (PH_HIGH_BITS)
      a[r] |= turn_right(high, high_turn(step % HIGH_STEPS) + turn + 32) & field(PH_HIGH_BITS, HIGH_PLACE + up);
#ifdef PH_ACT_BF16
    a[r] |= 0x43004300;
#else
    if (AT_1024) a[r] |= 0x64006400;
#endif
  }
#endif
}

// ---- scales

// Of rows g and g + 8 (first index), groups 2t and 2t + 1 of the unit (second), parts of a group. `scale` is already
// divided by UNIT: a weight is scale * (fragment's value - BIAS) - minimum.
struct Scales {
  float scale[2][2][PARTS], minimum[2][2][PARTS];
};

__device__ __forceinline__ float2 half_pair(u32 bits) { return __half22float2(*reinterpret_cast<__half2*>(&bits)); }

// d * v, exactly, for an integer 0 <= v < 2^23 and minus_d = -2^23 * d.
__device__ __forceinline__ float times_small(float d, u32 v, float minus_d) {
  return fmaf(d, __uint_as_float(v | 0x4b000000), minus_d);
}
constexpr float TWO_23 = 8388608.0f;

__device__ __forceinline__ void read_scales(const Unit& q, Scales& out) {
#if PH_SCALES == 2 || PH_SCALES == 5
  const float2 pair[2] = {half_pair(q.supers[0]), half_pair(q.supers[1])};
  const float d[2] = {pair[0].x / UNIT[0], pair[1].x / UNIT[1]}, low[2] = {pair[0].y, pair[1].y};
  const float minus_low[2] = {low[0] * -TWO_23, low[1] * -TWO_23};
#elif PH_SCALES == 3 || PH_SCALES == 4 || PH_SCALES == 6
  const float2 pair = half_pair(q.supers[0]);
  const float d[2] = {pair.x / UNIT[0], pair.y / UNIT[1]};
#endif
#if PH_SCALES >= 2 && PH_SCALES <= 6
  const float minus_d[2] = {d[0] * -TWO_23, d[1] * -TWO_23};
#endif
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        [[maybe_unused]] const int n = (2 * h + c) * PARTS + part;
        float scale, minimum = 0.0f;
#if PH_SCALES == 0 || PH_SCALES == 1
        const float2 both = half_pair(q.scales[h]);
        scale = (c ? both.y : both.x) / UNIT[h];
        if (PH_SCALES == 1) {
          const float2 lows = half_pair(q.scales[2 + h]);
          minimum = -(c ? lows.y : lows.x);
        }
#elif PH_SCALES == 2
        scale = times_small(d[h], (q.scales[0] >> (6 * n)) & 63, minus_d[h]);
        const u32 m = n == 0   ? q.scales[0] >> 24
                      : n == 1 ? __funnelshift_r(q.scales[0], q.scales[1], 30)
                               : q.scales[1] >> (6 * n - 8);
        minimum = times_small(low[h], m & 63, minus_low[h]);
#elif PH_SCALES == 3
        const u32 byte = (q.scales[n >> 2] >> (8 * (n & 3))) & 255;  // the signed byte + 128
        scale = times_small(d[h], byte, minus_d[h]) - 128.0f * d[h];
#elif PH_SCALES == 4
        const u32 six = n == 5 ? __funnelshift_r(q.scales[0], q.scales[1], 30)
                               : (n < 5 ? q.scales[0] >> (6 * n) : q.scales[1] >> (6 * n - 32));
        scale = times_small(d[h], six & 63, minus_d[h]) - 32.0f * d[h];
#elif PH_SCALES == 5
        const u32 byte = q.scales[n >> 2] >> (8 * (n & 3));
        scale = times_small(d[h], byte & 15, minus_d[h]);
        minimum = times_small(low[h], (byte >> 4) & 15, minus_low[h]);
#elif PH_SCALES == 6
        scale = times_small(d[h], (q.scales[0] >> (6 * n)) & 63, minus_d[h]) - 32.0f * d[h];
#else
        const u32 e = (q.scales[0] >> (8 * n)) & 255;
        scale = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23) / UNIT[h];
#endif
        out.scale[h][c][part] = scale;
        out.minimum[h][c][part] = minimum;
      }
}

// Scale and minimum of rows g and g + 8 in group j, part of 32 columns, from the lane of the quad that holds them.
__device__ __forceinline__ void group_scales(const Scales& s, int j, int part, float (&scale)[2], float (&minimum)[2]) {
  const int from = (threadIdx.x & 28) | (j >> 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    scale[h] = __shfl_sync(PH_FULL_MASK, s.scale[h][j & 1][part], from);
    minimum[h] = PH_HAS_MIN ? __shfl_sync(PH_FULL_MASK, s.minimum[h][j & 1][part], from) : 0.0f;
  }
}

// A lane's weights of row g (h = 0) or g + 8 (h = 1) in group j: of both steps, in the order of their columns within
// a step. The arithmetic is exact but for the one rounding that subtracting a minimum takes.
__device__ __forceinline__ void weights_of_group(const Unit& q, const Scales& s, int j, float (&w)[2][8]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    u32 a[4];
    float scale[2], minimum[2];
    fragment(q, 2 * j + step, a);
    group_scales(s, j, step % PARTS, scale, minimum);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int h = r & 1, at = 4 * step + 2 * (r >> 1);
      const float2 v = ph_to_float2(ph_bits_act2(a[r]));
      w[h][at] = (v.x - BIAS[h]) * scale[h] - minimum[h];
      w[h][at + 1] = (v.y - BIAS[h]) * scale[h] - minimum[h];
    }
  }
}
