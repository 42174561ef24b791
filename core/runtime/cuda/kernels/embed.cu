// out[n] = table[tokens[n]] * scale, plus positions[at[n]] where the model learned them; float32. A token outside the
// table gives NaN, which nothing downstream can mistake for a value.
//
// PH_LOW_BITS chooses a quantised table (formats.cuh): four lanes decode a row's share of a unit. Else the table is
// row-major.

#include "prelude.cuh"

#ifdef PH_LOW_BITS

#include "formats.cuh"

// Grid: tokens * units / 64, 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    ph_embed_tiles(const int* tokens, const u8* table, float* out, const int* at, const float* positions, int count,
                int rows, int cols, i64 tile_bytes, float scale) {
  const int units = ph_div_up(cols, 256), t = threadIdx.x & 3;
  const i64 item = (i64)blockIdx.x * 64 + (threadIdx.x >> 2);
  const bool exists = item < (i64)count * units;  // all lanes stay for the shuffles
  const int n = exists ? (int)(item / units) : 0, index = exists ? (int)(item % units) : 0;
  const int token = tokens[n], row = token >= 0 && token < rows ? token : 0, left = cols - 256 * index;
  Unit q;
  load_unit(q, table + row / 16 * tile_bytes + (i64)index * PH_UNIT_BYTES, 4 * (row & 7) + t,
            ph_div_up(min(256, left) * PH_LOW_BITS, 256));
  Scales scales;
  read_scales(q, scales);
  const float factor = row == token ? scale : __int_as_float(0x7fffffff);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float w[2][8];
    weights_of_group(q, scales, j, w);
    if (!exists || 32 * j >= left) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int k = 256 * index + 32 * j + column_in_group(i >> 2, t, i & 3);
      float value = (row & 8 ? w[1][i] : w[0][i]) * factor;
      if (at != nullptr) value += positions[(i64)at[n] * cols + k];
      out[(i64)n * cols + k] = value;
    }
  }
}

#else

// Grid: (columns / 256, tokens), 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    ph_embed_rows(const int* tokens, const act_t* table, float* out, const int* at, const float* positions, int rows,
               int cols, float scale) {
  const int n = blockIdx.y, k = blockIdx.x * 256 + threadIdx.x;
  if (k >= cols) return;
  const int token = tokens[n];
  const bool known = token >= 0 && token < rows;
  float value = known ? ph_to_float(table[(i64)token * cols + k]) * scale : __int_as_float(0x7fffffff);
  if (at != nullptr) value += positions[(i64)at[n] * cols + k];
  out[(i64)n * cols + k] = value;
}

#endif
