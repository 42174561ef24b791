// What the kernels of projections share: how a result is stored, and how sums of warps meet.

#pragma once

#include "prelude.cuh"

#ifdef PH_OUT_F32
typedef float out_t;
#else
typedef act_t out_t;
#endif

#ifdef PH_ACTIVATED
#include "activate.cuh"
#endif

// What a result is added to: it may be fetched long before the result is there.
struct Addends {
  float bias, before;  // before: what is there or, where PH_GATED, the partner's bias
};

// out[index] = scale * (value + bias[row]), or that added to what is there.
// With PH_ACTIVATED act(value + bias[row]) or, where PH_GATED, that times (partner + bias[own + row]): row `row` of the
// second half of the matrix is the partner of row `row` of the first, which has `own` rows.
struct Store {
  out_t* out;
  const float* bias;  // nullptr: none
  int own;
  float scale;
  int accumulate;

  __device__ __forceinline__ Addends fetch([[maybe_unused]] i64 index, int row) const {
    Addends of = {bias != nullptr ? ph_load_now(bias + row) : 0.0f, 0.0f};
#if defined(PH_GATED)
    if (bias != nullptr) of.before = ph_load_now(bias + own + row);
#elif !defined(PH_ACTIVATED)
    if (accumulate) of.before = ph_to_float(ph_load_now(out + index));
#endif
    return of;
  }
  __device__ __forceinline__ void operator()(i64 index, float value, [[maybe_unused]] float partner,
                                             const Addends& to) const {
#ifdef PH_ACTIVATED
    value = activate(value + to.bias);
#ifdef PH_GATED
    value *= partner + to.before;
#endif
#else
    value = fmaf(value + to.bias, scale, to.before);
#endif
    out[index] = ph_from_float<out_t>(value);
  }
};

#ifdef PH_GATED
constexpr int PARTNERS = 2;
#else
constexpr int PARTNERS = 1;
#endif

// The sums of `warps` warps' 16 x COLUMNS results in the order of the warps, stored: out[column * ld + row].
template <int COLUMNS>
__device__ __forceinline__ void sum_and_store(const float (&part)[8][16][COLUMNS + 1], int first_row, int rows,
                                              int columns, i64 ld, const Store& store) {
  __syncthreads();
  const int warps = blockDim.x >> 5;
  for (int n = threadIdx.x; n < 16 * columns; n += blockDim.x) {
    const int row = n & 15, column = n >> 4;
    float sum = part[0][row][column];
    for (int w = 1; w < warps; ++w) sum += part[w][row][column];
    const i64 index = column * ld + first_row + row;
    if (first_row + row < rows) store(index, sum, 0.0f, store.fetch(index, first_row + row));
  }
}
