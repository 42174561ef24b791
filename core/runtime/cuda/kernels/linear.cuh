// What the matrix-vector kernels share: B fragments from rows of activations, and how a result is stored.

#pragma once

#include "prelude.cuh"

#ifdef PH_OUT_F32
typedef float out_t;
#else
typedef act_t out_t;
#endif

// What a result is added to, where that is fetched long before the result is there.
struct Addends {
  float bias, before;  // of StoreActivated: bias, and the partner's
};

// out[index] = scale * (value + bias[row]), or that added to what is there.
struct Store {
  out_t* out;
  const float* bias;  // nullptr: none
  float scale;
  int accumulate;

  __device__ __forceinline__ Addends fetch(i64 index, int row) const {
    return Addends{bias != nullptr ? ph_load_now(bias + row) : 0.0f,
                   accumulate ? ph_to_float(ph_load_now(out + index)) : 0.0f};
  }
  __device__ __forceinline__ void operator()(i64 index, float value, float, const Addends& to) const {
    out[index] = ph_from_float<out_t>(fmaf(value + to.bias, scale, to.before));
  }
  __device__ __forceinline__ void operator()(i64 index, int row, float value) const {
    if (bias != nullptr) value += bias[row];
    value *= scale;
    if (accumulate) value += ph_to_float(out[index]);
    out[index] = ph_from_float<out_t>(value);
  }
};

#ifdef PH_ACTIVATED
#include "activate.cuh"

// out[index] = act(value + bias[row]) or, where PH_GATED, that times (partner + bias[own + row]): row `row` of the second
// half of the matrix is the partner of row `row` of the first, which has `own` rows.
struct StoreActivated {
  out_t* out;
  const float* bias;  // nullptr: none
  int own;

  __device__ __forceinline__ Addends fetch(i64, int row) const {
    Addends of = {0.0f, 0.0f};
    if (bias != nullptr) of.bias = ph_load_now(bias + row);
#ifdef PH_GATED
    if (bias != nullptr) of.before = ph_load_now(bias + own + row);
#endif
    return of;
  }
  __device__ __forceinline__ void operator()(i64 index, float value, [[maybe_unused]] float partner,
                                             const Addends& to) const {
    value = activate(value + to.bias);
#ifdef PH_GATED
    value *= partner + to.before;
#endif
    out[index] = ph_from_float<out_t>(value);
  }
  __device__ __forceinline__ void operator()(i64 index, int row, float value, float partner) const {
    Addends to = {0.0f, 0.0f};
    if (bias != nullptr) to.bias = bias[row];
#ifdef PH_GATED
    if (bias != nullptr) to.before = bias[own + row];
#endif
    (*this)(index, value, partner, to);
  }
};
#endif

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
    if (first_row + row < rows) store(column * ld + first_row + row, first_row + row, sum);
  }
}
