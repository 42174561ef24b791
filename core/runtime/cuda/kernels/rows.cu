// Small steps between the big ones: picking rows, changing types, adding branches, finishing logits.
//
// Macros: PH_IN_F32 and PH_OUT_F32 (else act_t), PH_SOFTCAP.

#include "prelude.cuh"

#ifdef PH_IN_F32
typedef float in_t;
#else
typedef act_t in_t;
#endif
#ifdef PH_OUT_F32
typedef float out_t;
#else
typedef act_t out_t;
#endif

// out [m, size] = src[rows[m]]; a negative row gives zeros.
extern "C" __global__ void __launch_bounds__(256) ph_gather(const in_t* src, const int* rows, out_t* out, int size) {
  ph_wait_for_inputs();
  ph_let_next_begin();
  const int at = blockIdx.y * blockDim.x + threadIdx.x;
  if (at >= size) return;
  const i64 m = blockIdx.x;
  const i64 row = rows[m];
  out[m * size + at] = ph_from_float<out_t>(row < 0 ? 0.0f : ph_to_float(src[row * size + at]));
}

// dst = src
extern "C" __global__ void __launch_bounds__(256) ph_convert(const in_t* src, out_t* dst, i64 size) {
  ph_wait_for_inputs();
  ph_let_next_begin();
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < size) dst[at] = ph_from_float<out_t>(ph_to_float(src[at]));
}

// dst += scale * src
extern "C" __global__ void __launch_bounds__(256) ph_add(const in_t* src, out_t* dst, i64 size, float scale) {
  ph_wait_for_inputs();
  ph_let_next_begin();
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < size) dst[at] = ph_from_float<out_t>(ph_to_float(dst[at]) + scale * ph_to_float(src[at]));
}

// In place: x * scale, then cap * tanh(x / cap).
extern "C" __global__ void __launch_bounds__(256) ph_finish(float* x, i64 size, float scale, float cap) {
  ph_wait_for_inputs();
  ph_let_next_begin();
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= size) return;
#ifdef PH_SOFTCAP
  x[at] = cap * tanhf(x[at] * scale / cap);
#else
  x[at] *= scale;
#endif
}
