// How a warp fetches the units of a tile and multiplies them with one row of x: of quantised tiles (formats.cuh) or, with
// PH_DENSE, of PH_TILE_ROWS rows as they are. A unit is a tile's next 256 columns.
//
// With quantised tiles, seven of the tensor core's eight columns would be idle with one row of x. So column j is given group
// j's activations: a product of group j's weights is right in column j, and that is the one that is kept. A lane then holds
// the sums of groups 2t and 2t + 1, just those whose scales it loaded.

#pragma once

#include "prelude.cuh"
#ifndef PH_DENSE
#include "formats.cuh"
#endif

#ifdef PH_DENSE

constexpr int ROWS = PH_TILE_ROWS;  // of a tile
constexpr int SLOT = 512 * ROWS;    // bytes of a unit

// Where a warp's loads go on: in the row of units of its block's tiles. A lane copies what it will read, 8 columns of each
// row; columns beyond the end become zeros.
struct Source {
  const u8* base;  // the tile's first row, at the lane's columns of the first unit
  int tile, rows, cols;
  i64 tile_bytes;  // nothing here

  __device__ __forceinline__ void to_tile(const u8* weights, int index, int lane) {
    tile = index;
    base = weights + 2 * ((i64)tile * ROWS * cols + 8 * lane);
  }
  __device__ __forceinline__ void fetch(u8* slot, int unit, int lane) const {
    const bool inside = 256 * unit + 8 * lane < cols;
    const u8* from = base + 512 * (i64)unit;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const bool exists = inside && tile * ROWS + r < rows;
      ph_cp_async16(slot + 512 * r + 16 * lane, exists ? from + 2 * (i64)r * cols : base, exists);
    }
  }
};

struct Sums {
  float row[ROWS];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) row[r] = 0.0f;
  }

  static __device__ __forceinline__ void unpack(const uint4& v, float (&f)[8]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = ph_to_float2(ph_bits_act2(words[i]));
      f[2 * i] = pair.x, f[2 * i + 1] = pair.y;
    }
  }

  // `refill` is called once the slot's content is in registers.
  template <typename Refill>
  __device__ __forceinline__ void add(const u8* slot, const uint4& x, int, int lane, int, Refill refill) {
    uint4 packed[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) packed[r] = *reinterpret_cast<const uint4*>(slot + 512 * r + 16 * lane);
    float xs[8];
    unpack(x, xs);
    refill();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float ws[8];
      unpack(packed[r], ws);
#pragma unroll
      for (int e = 0; e < 8; ++e) row[r] = fmaf(ws[e], xs[e], row[r]);
    }
  }

  __device__ __forceinline__ void store(float* part, int lane) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float sum = ph_warp_sum(row[r]);
      if (lane == r) part[r] = sum;
    }
  }
};

#else

constexpr int ROWS = 16;
constexpr int SLOT = PH_UNIT_BYTES;

// Where a warp's loads go on: in the row of units of its block's tiles. The warp copies a unit as it lies.
struct Source {
  const u8* base;  // the tile's first unit, at the lane's first bytes
  int tile, rows, cols;
  i64 tile_bytes;

  __device__ __forceinline__ void to_tile(const u8* weights, int index, int lane) {
    base = weights + index * tile_bytes + 16 * lane;
  }
  __device__ __forceinline__ void fetch(u8* slot, int unit, int lane) const {
    const u8* from = base + (i64)unit * SLOT;
    // Where blocks are smaller than a unit, a tile's last unit may be shorter.
    const int bytes = PH_BLOCK == 256 ? SLOT : (int)min((i64)SLOT, tile_bytes - (i64)unit * SLOT);
#pragma unroll
    for (int i = 0; i < ph_div_up(SLOT, 512); ++i)
      if ((PH_BLOCK == 256 && 512 * (i + 1) <= SLOT) || 512 * i + 16 * lane < bytes)
        ph_cp_async16(slot + 512 * i + 16 * lane, from + 512 * i);
  }
};

struct Sums {
  float row[2];  // g and g + 8

  __device__ __forceinline__ void clear() { row[0] = row[1] = 0.0f; }

  template <typename Refill>
  __device__ __forceinline__ void add(const u8* slot, const uint4& x, int unit, int lane, int cols, Refill refill) {
    const int t = lane & 3;
    Unit q;
    load_unit<FromShared>(q, slot, lane, vectors_in(unit, cols));
    const u32 b[2][2] = {{x.x, x.y}, {x.z, x.w}};
    __syncwarp();
    refill();

    float v[2][2][PARTS] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        u32 a[4];
        fragment(q, 2 * j + p, a);
        ph_mma(d, a, b[p]);
        if (PARTS == 1) {
          fragment(q, 2 * j + 1, a);
          ph_mma(d, a, b[1]);
        }
        if (t == j >> 1) v[0][j & 1][p] = d[j & 1], v[1][j & 1][p] = d[2 + (j & 1)];
      }
    float sum[PARTS][2] = {};  // of the activations in columns 2t and 2t + 1
    if (NEEDS_SUMS) {
      const u32 ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        ph_mma(d, ones, b[p]);
        if (PARTS == 1) ph_mma(d, ones, b[1]);
        sum[p][0] = d[0], sum[p][1] = d[1];
      }
    }
    Scales scales;
    read_scales(q, scales);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
          if (BIAS[h] != 0.0f) v[h][c][p] = fmaf(-BIAS[h], sum[p][c], v[h][c][p]);
          row[h] = fmaf(scales.scale[h][c][p], v[h][c][p], row[h]);
          if (PH_HAS_MIN) row[h] = fmaf(-scales.minimum[h][c][p], sum[p][c], row[h]);
        }
  }

  __device__ __forceinline__ void store(float* part, int lane) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = ph_warp_sum<4>(row[h]);
      if ((lane & 3) == 0) part[(lane >> 2) + 8 * h] = sum;
    }
  }
};

#endif
