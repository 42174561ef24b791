// Activations, elementwise in float32; gated: act(first half of a row) * second half.
//
// Macros: those of activate.cuh; PH_GATED; PH_VECTOR (1 or 8 elements per load, which sizes and addresses must allow).

#include "activate.cuh"
#include "prelude.cuh"

struct alignas(sizeof(act_t) * PH_VECTOR) Pack {
  act_t x[PH_VECTOR];
};

// out [rows, size] from src [rows, size], or [rows, 2 * size] where gated. src == out is allowed where not gated.
extern "C" __global__ void __launch_bounds__(256) ph_activate(const act_t* src, act_t* out, int size) {
  ph_wait_for_inputs();
  ph_let_next_begin();
  const int at = (blockIdx.y * blockDim.x + threadIdx.x) * PH_VECTOR;
  if (at >= size) return;
  const i64 row = blockIdx.x;
#ifdef PH_GATED
  src += 2 * row * size + at;
  const Pack up = *reinterpret_cast<const Pack*>(src + size);
#else
  src += row * size + at;
#endif
  Pack pack = *reinterpret_cast<const Pack*>(src);
#pragma unroll
  for (int j = 0; j < PH_VECTOR; ++j) {
    float x = activate(ph_to_float(pack.x[j]));
#ifdef PH_GATED
    x *= ph_to_float(up.x[j]);
#endif
    pack.x[j] = ph_to_act(x);
  }
  *reinterpret_cast<Pack*>(out + row * size + at) = pack;
}
