// What a cuBLAS product leaves to do: a bias on a range of columns.

#include "prelude.cuh"

#ifdef PH_OUT_F32
typedef float out_t;
#else
typedef act_t out_t;
#endif

// out[r, column + j] += scale * bias[j] for j < size; the grid's y is the rows, each `ld` wide.
extern "C" __global__ void __launch_bounds__(256)
    ph_add_bias(const float* bias, out_t* out, int size, i64 ld, int column, float scale) {
  const int j = blockIdx.x * 256 + threadIdx.x;
  if (j >= size) return;
  out_t* place = out + blockIdx.y * ld + column + j;
  *place = ph_from_float<out_t>(ph_to_float(*place) + scale * bias[j]);
}
