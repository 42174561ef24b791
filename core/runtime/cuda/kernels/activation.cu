// Activations, elementwise in float32; gated: act(first half of a row) * second half.
//
// Macros: PH_GELU, PH_GELU_TANH, PH_GELU_QUICK, PH_SILU, PH_RELU or PH_RELU_SQUARED; PH_GATED; PH_VECTOR (1 or 8
// elements per load, which sizes and addresses must allow).

#include "prelude.cuh"

__device__ __forceinline__ float activate(float x) {
#if defined(PH_GELU)  // x Phi(x)
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
#elif defined(PH_GELU_TANH)  // Hendrycks and Gimpel 2016
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
#elif defined(PH_GELU_QUICK)  // exp overflows to infinity, and x / infinity is the right limit
  return x / (1.0f + expf(-1.702f * x));
#elif defined(PH_SILU)
  return x / (1.0f + expf(-x));
#elif defined(PH_RELU)
  return fmaxf(x, 0.0f);
#elif defined(PH_RELU_SQUARED)
  const float positive = fmaxf(x, 0.0f);
  return positive * positive;
#else
#error "name an activation"
#endif
}

struct alignas(sizeof(act_t) * PH_VECTOR) Pack {
  act_t x[PH_VECTOR];
};

// out [rows, size] from src [rows, size], or [rows, 2 * size] where gated. src == out is allowed where not gated.
extern "C" __global__ void __launch_bounds__(256) ph_activate(const act_t* src, act_t* out, int size) {
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
