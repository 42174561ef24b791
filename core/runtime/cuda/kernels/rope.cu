// The rows of a prefill step on their way into attention: heads.cuh for each head of each token, then k and v into the
// paged cache. A warp takes one head of one token.
//
// Macros: those of heads.cuh; PH_BLOCK_SIZE, PH_Q_NORM and PH_K_NORM (0 none, 1 RMSNorm, 2 LayerNorm).

#include "heads.cuh"

constexpr int D = PH_HEAD_DIM;
constexpr int WARPS = 4;

// qkv [N, heads + 2 * kv_heads, D]: q and k are changed in place, k and v go to the caches [blocks, kv_heads,
// PH_BLOCK_SIZE, D]. cos and sin are [context, PH_ROPE_PAIRS]. A negative position marks a row of padding. The scales
// [blocks, kv_heads, PH_BLOCK_SIZE] are written with PH_KV_FP8 only.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    ph_store_kv(act_t* qkv, kv2_t* k_cache, kv2_t* v_cache, const int* positions, const int* sequences,
                const int* block_tables, const float* cos, const float* sin, const float* q_weight,
                const float* q_bias, const float* k_weight, const float* k_bias, int heads, int kv_heads,
                int table_width, float q_eps, float k_eps,
                float* k_scales, float* v_scales) {
#if PH_ROPE_PAIRS > 0 && !defined(PH_INTERLEAVED)
  __shared__ float staged[WARPS][D];
#endif
  ph_wait_for_inputs();
  ph_let_next_begin();
  const int warp = threadIdx.x >> 5;
  const int head = blockIdx.y * WARPS + warp;
  const i64 row = blockIdx.x;
  const int position = positions[row];
  if (head >= heads + 2 * kv_heads || position < 0) return;
  act_t* data = qkv + (row * (heads + 2 * kv_heads) + head) * D;

  head_t x;
  load_head(x, data);
  const bool is_q = head < heads, is_k = !is_q && head < heads + kv_heads;
  if (is_q) normalise<PH_Q_NORM>(x, q_weight, q_bias, q_eps);
  if (is_k) normalise<PH_K_NORM>(x, k_weight, k_bias, k_eps);
  if (is_q || is_k) {
#if PH_ROPE_PAIRS > 0
    const Angles by = load_angles(cos, sin, position);
#ifdef PH_INTERLEAVED
    rotate(x, by, nullptr);
#else
    rotate(x, by, staged[warp]);
#endif
#endif
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (component(i) < D) *reinterpret_cast<act2_t*>(data + component(i)) = ph_to_act2(x[i].x, x[i].y);
  }
  if (is_q) return;

  const int kv_head = (head - heads) % kv_heads;
  const i64 block = block_tables[(i64)sequences[row] * table_width + position / PH_BLOCK_SIZE];
  const i64 slot = (block * kv_heads + kv_head) * PH_BLOCK_SIZE + position % PH_BLOCK_SIZE;
#ifdef PH_KV_FP8
  const float scale = take_scale(x);
  if (threadIdx.x % 32 == 0) (is_k ? k_scales : v_scales)[slot] = scale;
#endif
  kv2_t* cache = (is_k ? k_cache : v_cache) + slot * (D / 2);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
    if (component(i) < D) cache[component(i) / 2] = to_kv2(x[i]);
}
