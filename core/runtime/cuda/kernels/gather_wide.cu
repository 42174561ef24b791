// x [tokens, cols] in the order in which linear_wide.cu multiplies it: for each PH_TOKENS tokens, each group of 32 columns
// and each of the four pairs (step, half of a step) a plane [token][8], 16 bytes a token. Tokens beyond the last and
// columns beyond the end are zeros, up to a multiple of 256. A thread does a token's 32 columns; neighbours do
// neighbouring tokens, so that what is written is in one piece.
//
// PH_GROUP as in formats.cuh: how many weights share a scale decides which columns a lane has.

#include "prelude.cuh"

extern "C" __global__ void __launch_bounds__(128)
    ph_gather_wide(const act_t* x, uint4* out, int tokens, int padded, int cols) {
  ph_wait_for_inputs();
  ph_let_next_begin();
  const int token = blockIdx.x * blockDim.x + threadIdx.x, group = blockIdx.y;
  if (token >= padded) return;
  uint4 in[4];
  const act_t* from = x + (i64)token * cols + 32 * group;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    in[i] = token < tokens && 32 * group + 8 * i < cols ? ph_load128(from + 8 * i) : make_uint4(0, 0, 0, 0);
  u32 word[16];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    word[4 * i] = in[i].x, word[4 * i + 1] = in[i].y, word[4 * i + 2] = in[i].z, word[4 * i + 3] = in[i].w;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int step = p >> 1, half = p & 1;
    u32 r[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) r[t] = word[PH_GROUP == 16 ? 8 * step + 2 * t + half : 4 * t + 2 * step + half];
    const i64 plane = ((i64)(token / PH_TOKENS) * gridDim.y + group) * 4 + p;
    out[plane * PH_TOKENS + token % PH_TOKENS] = make_uint4(r[0], r[1], r[2], r[3]);
  }
}
