// A lane's share of a tile's unit in registers, multiplied group after group with TILES x 8 tokens, and filled again from
// memory as it is used up: each vector as soon as the one before it in its place is done with, so that a whole unit is
// always under way.
//
// With PH_SUMMED, the bytes of shared memory that a tile's scales have, codes are multiplied as they are and sums are scaled
// (summed.cuh); else weights become float16 numbers (scaled.cuh).

#pragma once

#include "formats.cuh"
#ifdef PH_SUMMED
#include "summed.cuh"
#else
#include "scaled.cuh"
#endif

// A lane's columns of a group of 32 are 8*t..8*t+7 or, where 16 weights share a scale, 4*t..4*t+3 and 16 more: the same of
// weights and activations, so sums do not change.
constexpr bool SPLIT = PH_GROUP == 16, EVEN = PH_BLOCK == 256;

#ifdef PH_SUMMED

static_assert(SCALE_BYTES + OFFSET_BYTES <= PH_SUMMED, "a tile's scales need more room than the host thinks");
constexpr int SCALE_ROOM = PH_SUMMED;  // of a tile, in shared memory

template <int TOKEN_TILES> struct Scaling {
  // Between two barriers of the warp: before, others may still read the last unit's scales; after, all lie there.
  __device__ __forceinline__ void begin(const Unit& q, u8* own, int lane) {
    put_scales(q, own, lane >> 2, lane & 3);
    if (OFFSETS) put_offsets(q, own + SCALE_BYTES, lane);
  }
  __device__ __forceinline__ void multiply(const Unit& q, const u8* own, int j, int lane,
                                           const u32 (&b)[TOKEN_TILES][4], float (&acc)[TOKEN_TILES][4]) {
    float d[TOKEN_TILES][4] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      u32 a[4];
      codes_of_step(q, 2 * j + s, a);
#pragma unroll
      for (int n8 = 0; n8 < TOKEN_TILES; ++n8) {
        const u32 pair[2] = {b[n8][2 * s], b[n8][2 * s + 1]};
        ph_mma(d[n8], a, pair);
        if (s < 2 - PARTS) continue;
        const float2 factor = scales_at(own, PARTS == 2 ? 2 * j + s : j, lane >> 2);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          acc[n8][e] = fmaf(e < 2 ? factor.x : factor.y, d[n8][e], acc[n8][e]);
          d[n8][e] = 0.0f;
        }
      }
    }
  }
};

#else

constexpr int SCALE_ROOM = 0;

template <int TOKEN_TILES> struct Scaling {
  Packed scales;
  u32 factor[2], minus[2];  // of the step under way

  __device__ __forceinline__ void begin(const Unit& q, u8*, int) { pack(q, scales); }
  __device__ __forceinline__ void multiply(const Unit& q, const u8*, int j, int lane, const u32 (&b)[TOKEN_TILES][4],
                                           float (&acc)[TOKEN_TILES][4]) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s < PARTS) scales_of(scales, j, s, lane, factor, minus);
      u32 a[4];
      weights_of_step(q, 2 * j + s, factor, minus, a);
#pragma unroll
      for (int n8 = 0; n8 < TOKEN_TILES; ++n8) {
        const u32 pair[2] = {b[n8][2 * s], b[n8][2 * s + 1]};
        ph_mma(acc[n8], a, pair);
      }
    }
  }
};

#endif

template <int TOKEN_TILES> struct Tile {
  Unit now;
  Scaling<TOKEN_TILES> scaling;
  const u8* next;  // the lane's place in its vectors; null: there is none

  __device__ __forceinline__ void find(const u8* weights, int tile, int unit, i64 tile_bytes, int lane) {
    next = weights + tile * tile_bytes + (i64)unit * PH_UNIT_BYTES + 16 * lane;
  }
  __device__ __forceinline__ void load_all(int unit, int cols, int lane) {
    if (next != nullptr) load_unit(now, next - 16 * lane, lane, vectors_in(unit, cols));
  }
  __device__ __forceinline__ void begin(u8* own, int lane) { scaling.begin(now, own, lane); }
  __device__ __forceinline__ void refill_scales(int lane) {
    if (next != nullptr) load_scales(now, next - 16 * lane, lane);
  }
  // Vectors beyond the last column keep the codes that were there before: activations are zeros there.
  __device__ __forceinline__ void refill(int j, int vectors) {
    const int low = j / LOW_GROUPS, high = j / HIGH_GROUPS;
    if ((j + 1) % LOW_GROUPS == 0)
      ph_ldg128_once_if(now.low + 4 * low, next + PH_LOW_AT + 512 * low, next != nullptr && low < vectors);
    if (PH_HIGH_BITS && (j + 1) % HIGH_GROUPS == 0)
      ph_ldg128_once_if(now.high + 4 * high, next + PH_HIGH_AT + 512 * high, next != nullptr);
  }
};
