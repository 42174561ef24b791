// GGUF blocks, row by row, to the tiles of formats.cuh. A thread makes one lane's share of one unit; it runs once per
// matrix, so it reads single bytes (blocks are aligned to nothing) and leaves the rest to the caches.

#include "formats.cuh"

namespace {

// A row's blocks within one unit; beyond the matrix everything is zero.
struct RawRow {
  const u8* unit;  // the row's first block of the unit, nullptr for a padding row
  int cols;        // columns left from there on

  __device__ const u8* block(int k) const { return unit + (PH_BLOCK == 256 ? 0 : k / 32 * PH_RAW_BYTES); }
  __device__ bool has(int k) const { return unit != nullptr && k < cols; }
};

[[maybe_unused]] __device__ u32 half_at(const u8* p) { return p[0] | p[1] << 8; }

// The code of column k of the unit: PH_LOW_BITS low bits, above them PH_HIGH_BITS.
__device__ u32 raw_code(const RawRow& row, int k) {
  const u8* low = row.block(k) + PH_RAW_LOW;
  [[maybe_unused]] const u8* high = row.block(k) + PH_RAW_HIGH;
#if PH_BLOCK == 32
  const int n = k & 31;
#if PH_LOW_BITS == 8
  return low[n] ^ 128;
#else
  u32 code = low[n & 15] >> (n & 16 ? 4 : 0) & 15;
  if (PH_HIGH_BITS) code |= (high[n >> 3] >> (n & 7) & 1) << 4;
  return code;
#endif
#elif PH_SCALES == 6  // IQ4_XS: like 32-weight blocks, one after another
  return low[k / 32 * 16 + (k & 15)] >> (k & 16 ? 4 : 0) & 15;
#elif PH_SCALES == 3  // Q6_K: two halves of 128
  return (low[(k >> 7) * 64 + (k & 63)] >> (k & 64 ? 4 : 0) & 15) |
         (high[(k >> 7) * 32 + (k & 31)] >> 2 * (k >> 5 & 3) & 3) << 4;
#elif PH_LOW_BITS == 2  // Q2_K and Q3_K
  u32 code = low[(k >> 7) * 32 + (k & 31)] >> 2 * (k >> 5 & 3) & 3;
  if (PH_HIGH_BITS) code |= (high[k & 31] >> (k >> 5) & 1) << 2;
  return code;
#else  // Q4_K and Q5_K
  u32 code = low[(k >> 6) * 32 + (k & 31)] >> (k & 32 ? 4 : 0) & 15;
  if (PH_HIGH_BITS) code |= (high[k & 31] >> (k >> 5) & 1) << 4;
  return code;
#endif
}

// A scale (or with `minimum` its minimum) as the unit stores it, of the part'th 16 or 32 columns of group j.
__device__ u32 raw_scale(const RawRow& row, int j, int part, bool minimum) {
  const int k = 32 * j + 16 * part;
  if (!row.has(k)) return 0;
  [[maybe_unused]] const u8* b = row.block(k);
  [[maybe_unused]] const u8* s = b + PH_RAW_SCALES;
#if PH_SCALES <= 1
  return half_at(b + (minimum ? PH_RAW_MIN : PH_RAW_D));
#elif PH_SCALES == 2
  const u8* own = s + (minimum ? 4 : 0);
  return j < 4 ? own[j] & 63 : (minimum ? s[j + 4] >> 4 : s[j + 4] & 15) | (own[j - 4] >> 6) << 4;
#elif PH_SCALES == 3
  return s[2 * j + part] ^ 128;
#elif PH_SCALES == 4
  const int n = 2 * j + part;
  return (s[n & 7] >> (n & 8 ? 4 : 0) & 15) | (s[8 + (n & 3)] >> 2 * (n >> 2) & 3) << 4;
#elif PH_SCALES == 5
  return s[2 * j + part];
#elif PH_SCALES == 6  // two bytes of high bits, then four of low ones
  return (s[2 + j / 2] >> 4 * (j & 1) & 15) | (half_at(s) >> 2 * j & 3) << 4;
#else
  return b[PH_RAW_D];
#endif
}

__device__ void write_scales(const RawRow (&row)[2], u8* unit, int lane) {
  [[maybe_unused]] const int g = lane >> 2;
  const int t = lane & 3;
  u64 packed[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const int n = (2 * h + c) * PARTS + part;
        const u64 scale = raw_scale(row[h], 2 * t + c, part, false);
        const int bits = PH_SCALES <= 1 ? 16 : PH_SCALES == 2 || PH_SCALES == 4 || PH_SCALES == 6 ? 6 : 8;
        packed[0] |= scale << (bits * n);
        if (PH_SCALES == 1) packed[1] |= (u64)raw_scale(row[h], 2 * t + c, part, true) << (bits * n);
        if (PH_SCALES == 2) packed[0] |= (u64)raw_scale(row[h], 2 * t + c, part, true) << (24 + bits * n);
      }
#if PH_SCALES == 1
  reinterpret_cast<u64*>(unit)[2 * lane] = packed[0];
  reinterpret_cast<u64*>(unit)[2 * lane + 1] = packed[1];
#elif PH_SCALES == 2 || PH_SCALES == 4
  reinterpret_cast<u32*>(unit)[lane] = (u32)packed[0];
  reinterpret_cast<u16*>(unit + 128)[lane] = (u16)(packed[0] >> 32);
#elif PH_SCALES == 6
  reinterpret_cast<u16*>(unit)[lane] = (u16)packed[0];
  unit[64 + lane] = (u8)(packed[0] >> 16);
#elif PH_SCALES == 7
  reinterpret_cast<u32*>(unit)[lane] = (u32)packed[0];
#else
  reinterpret_cast<u64*>(unit)[lane] = packed[0];
#endif
#if PH_SCALES >= 2 && PH_SCALES <= 6
  if (t == 0) {
    u32 pair[2] = {0, 0};  // of rows g and g + 8: d, and above it the scale of the minima
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (row[h].has(0)) {
        pair[h] = half_at(row[h].unit + PH_RAW_D);
        if (PH_HAS_MIN) pair[h] |= half_at(row[h].unit + PH_RAW_MIN) << 16;
      }
#if PH_HAS_MIN
    reinterpret_cast<uint2*>(unit + PH_SUPERS_AT)[g] = make_uint2(pair[0], pair[1]);
#else
    reinterpret_cast<u32*>(unit + PH_SUPERS_AT)[g] = pair[0] | pair[1] << 16;
#endif
  }
#endif
}

}  // namespace

// raw: `rows` rows of blocks. tiles: those of these rows, tile_bytes apart. Grid: (tiles, units / 4), 128 threads.
extern "C" __global__ void __launch_bounds__(128)
    ph_repack(const u8* raw, u8* tiles, int rows, int cols, i64 tile_bytes) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int index = blockIdx.y * (blockDim.x >> 5) + (threadIdx.x >> 5), units = ph_div_up(cols, 256);
  if (index >= units) return;
  const i64 row_bytes = (i64)(cols / PH_BLOCK) * PH_RAW_BYTES;
  RawRow row[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const i64 r = 16 * (i64)blockIdx.x + g + 8 * h;
    row[h].unit = r < rows ? raw + r * row_bytes + (i64)index * (256 / PH_BLOCK) * PH_RAW_BYTES : nullptr;
    row[h].cols = cols - 256 * index;
  }
  u8* unit = tiles + blockIdx.x * tile_bytes + (i64)index * PH_UNIT_BYTES;
  write_scales(row, unit, lane);

  const int vectors = ph_div_up(min(256, row[0].cols) * PH_LOW_BITS, 256);
  for (int word = 0; word < 4 * vectors; ++word) {
    u32 low = 0;
#pragma unroll
    for (int i = 0; i < LOW_STEPS; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (PH_LOW_BITS == 8 && r >> 1 != (word & 1)) continue;
        const int step = PH_LOW_BITS == 8 ? word / 2 : word * LOW_STEPS + i;
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int k = 32 * (step / 2) + column_in_group(step & 1, t, 2 * (r >> 1) + p);
          if (row[r & 1].has(k)) low |= (raw_code(row[r & 1], k) & ((1u << PH_LOW_BITS) - 1)) << low_bit(i, r, p);
        }
      }
    *reinterpret_cast<u32*>(unit + PH_LOW_AT + 512 * (word / 4) + 16 * lane + 4 * (word & 3)) = low;
  }
#if PH_HIGH_BITS
  for (int word = 0; word < HIGH_WORDS; ++word) {
    u32 high = 0;
#pragma unroll
    for (int i = 0; i < HIGH_STEPS; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int step = word * HIGH_STEPS + i;
          const int k = 32 * (step / 2) + column_in_group(step & 1, t, 2 * (r >> 1) + p);
          if (row[r & 1].has(k)) high |= (raw_code(row[r & 1], k) >> PH_LOW_BITS) << high_bit(i, r, p);
        }
    *reinterpret_cast<u32*>(unit + PH_HIGH_AT + 512 * (word / 4) + 16 * lane + 4 * (word & 3)) = high;
  }
#endif
}
