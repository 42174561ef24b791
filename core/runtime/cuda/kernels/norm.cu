// RMSNorm and LayerNorm of rows, or of the heads inside rows. One block per norm, its values held in registers between
// the passes, so that the variance is of centred values and nothing cancels.
//
// Macros: PH_LAYER_NORM (else RMSNorm), PH_BIAS, PH_IN_F32 and PH_OUT_F32 (else act_t), PH_VECTOR (1 or 4 elements per
// load, which sizes, strides and addresses must allow), PH_ITEMS (loads per thread).

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

template <typename T> struct alignas(sizeof(T) * PH_VECTOR) Pack {
  T x[PH_VECTOR];
};

// Weights and biases are constants, so they can come before the row does, where there are registers for them.
constexpr bool AHEAD = PH_ITEMS * PH_VECTOR <= 8;

struct Affine {
  Pack<float> weight, bias;

  __device__ __forceinline__ void load(const float* weights, [[maybe_unused]] const float* biases, int at) {
    weight = *reinterpret_cast<const Pack<float>*>(weights + at);
#ifdef PH_BIAS
    bias = *reinterpret_cast<const Pack<float>*>(biases + at);
#endif
  }
};

// Row r of the grid is head r % heads of token r / heads; it has `size` values. in == out is allowed.
extern "C" __global__ void __launch_bounds__(1024)
    ph_norm(const in_t* in, const float* weight, const float* bias, out_t* out, int size, int heads, i64 in_stride,
            i64 out_stride, float eps) {
  __shared__ float scratch[32];
  // Few blocks let the next kernel in before they wait, against the rule in prelude.cuh. It is a projection most of the
  // time, with weights to fetch, and finds room wherever blocks of the kernel before this one have ended.
  const bool few = gridDim.x <= 64;
  if (few) ph_let_next_begin();
  Affine affine[AHEAD ? PH_ITEMS : 1];
  if (AHEAD) {
#pragma unroll
    for (int i = 0; i < PH_ITEMS; ++i) {
      const int at = (i * blockDim.x + threadIdx.x) * PH_VECTOR;
      if (at < size) affine[i].load(weight, bias, at);
    }
  }
  ph_wait_for_inputs();
  if (!few) ph_let_next_begin();
  const int token = blockIdx.x / heads, head = blockIdx.x % heads;
  in += token * in_stride + (i64)head * size;
  out += token * out_stride + (i64)head * size;

  float x[PH_ITEMS][PH_VECTOR];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PH_ITEMS; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * PH_VECTOR;
    Pack<in_t> pack;
    if (at < size) pack = *reinterpret_cast<const Pack<in_t>*>(in + at);
#pragma unroll
    for (int j = 0; j < PH_VECTOR; ++j) {
      x[i][j] = at < size ? ph_to_float(pack.x[j]) : 0.0f;
#ifdef PH_LAYER_NORM
      sum += x[i][j];
#else
      sum += x[i][j] * x[i][j];
#endif
    }
  }
  sum = ph_block_sum(sum, scratch);
#ifdef PH_LAYER_NORM
  const float mean = sum / (float)size;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PH_ITEMS; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * PH_VECTOR;
#pragma unroll
    for (int j = 0; j < PH_VECTOR; ++j) {
      x[i][j] -= mean;
      if (at < size) sum += x[i][j] * x[i][j];
    }
  }
  sum = ph_block_sum(sum, scratch);
#endif
  const float inverse = 1.0f / sqrtf(sum / (float)size + eps);

#pragma unroll
  for (int i = 0; i < PH_ITEMS; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * PH_VECTOR;
    if (at >= size) continue;
    Affine& own = affine[AHEAD ? i : 0];
    if (!AHEAD) own.load(weight, bias, at);
    Pack<out_t> pack;
#pragma unroll
    for (int j = 0; j < PH_VECTOR; ++j) {
#ifdef PH_BIAS
      pack.x[j] = ph_from_float<out_t>(x[i][j] * inverse * own.weight.x[j] + own.bias.x[j]);
#else
      pack.x[j] = ph_from_float<out_t>(x[i][j] * inverse * own.weight.x[j]);
#endif
    }
    *reinterpret_cast<Pack<out_t>*>(out + at) = pack;
  }
}
