// The activation functions, in float32. One of PH_GELU, PH_GELU_TANH, PH_GELU_QUICK, PH_SILU, PH_RELU and
// PH_RELU_SQUARED chooses.

#pragma once

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
