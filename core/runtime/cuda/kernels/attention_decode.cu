// Attention of one token per sequence over the paged cache, the context split over blocks.
//
// A block serves up to 8 query heads of one KV head, so each key and value is read once for all of them. A warp takes
// 16 keys at a time with two tensor-core products, S = K q (16 keys x 8 heads) and O += V^T P (components x heads), and
// nothing goes through shared memory: which component a lane's element stands for may be permuted freely as long as
// both operands agree, so 16 bytes as they lie in the cache are fragments of K, and V needs its halves interleaved only.
// Each warp keeps its own maximum, sum and accumulator; warps are added up in shared memory, blocks by whichever block
// of a sequence and KV head comes last, always in the same order.

#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int K_STEPS = ph_div_up(D, 32);  // a lane loads 8 components of every 32 of a key
constexpr int V_STEPS = ph_div_up(D, 64);  // and 8 of every 64 of a value
constexpr int PAD = ph_div_up(D, 4) * 4;   // floats of a head in the partial results
constexpr int MERGE = 64 * V_STEPS + 4;    // and in shared memory

// Components d..d+7 of a row that begins at p, zeros beyond the head; D may not allow wide loads.
template <typename T> __device__ __forceinline__ uint4 load8(const T* p, int d) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (D % 8 == 0) {
    if (d < D) v = ph_ldg128_once(p + d);
  } else {
    if (d < D) v.x = ph_ldg32_once(p + d);
    if (d + 2 < D) v.y = ph_ldg32_once(p + d + 2);
    if (d + 4 < D) v.z = ph_ldg32_once(p + d + 4);
    if (d + 6 < D) v.w = ph_ldg32_once(p + d + 6);
  }
  return v;
}

#ifdef PH_KV_FP8
typedef uint2 eight_t;  // eight components as the cache holds them

__device__ __forceinline__ eight_t load8_stored(const stored_t* p, int d) {
  uint2 v = make_uint2(0, 0);
  if (D % 8 == 0) {
    if (d < D) v = ph_ldg64_once(p + d);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 pair = d + 2 * i < D ? __ldg(reinterpret_cast<const u16*>(p + d + 2 * i)) : 0;
      if (i < 2) v.x |= pair << 16 * i;
      else v.y |= pair << 16 * (i - 2);
    }
  }
  return v;
}
#else
typedef uint4 eight_t;
__device__ __forceinline__ uint4 load8_stored(const stored_t* p, int d) { return load8(p, d); }
__device__ __forceinline__ uint4 widen(uint4 x) { return x; }
#endif
constexpr bool ALL_AT_ONCE = D <= 128 || sizeof(eight_t) == 8;  // registers hold a tile's keys and values

// Lane 4g+t gets row g, columns 2t and 2t+1 of the transpose of an 8x8 tile held in the same way.
__device__ __forceinline__ u32 transpose8x8(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ void load_values(eight_t (&v)[V_STEPS][4], const stored_t* cache, int row, int g, int t) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // keys 2t, 2t+1, 2t+8, 2t+9 of the 16
    const i64 at = (i64)__shfl_sync(PH_FULL_MASK, row, 2 * t + (i & 1) + 4 * (i & 2)) * D;
#pragma unroll
    for (int c = 0; c < V_STEPS; ++c) v[c][i] = load8_stored(cache + at, 64 * c + 8 * g);
  }
}

__device__ __forceinline__ void add_values(float (&acc)[4][4], const eight_t (&stored)[4], const u32 (&p)[2]) {
  const uint4 v[4] = {widen(stored[0]), widen(stored[1]), widen(stored[2]), widen(stored[3])};
  const u32 w[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w},
                       {v[1].x, v[1].y, v[1].z, v[1].w},
                       {v[2].x, v[2].y, v[2].z, v[2].w},
                       {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const u32 a[4] = {__byte_perm(w[0][j], w[1][j], 0x5410), __byte_perm(w[0][j], w[1][j], 0x7632),
                      __byte_perm(w[2][j], w[3][j], 0x5410), __byte_perm(w[2][j], w[3][j], 0x7632)};
    kv_mma(acc[j], a, p);
  }
}

// Grid (splits, kv_heads * parts, rows). Part p of KV head h serves its query heads p*group .. (p+1)*group - 1. Split x
// takes keys [i, i+1) * split_tokens, i counted from the first split that the window reaches. `work` holds (sequence,
// row of qkv and out) per row, or is null: row z is sequence z. A negative sequence is padding. `counters` [rows,
// kv_heads * parts] are zero before and after; `partial` needs no content. The scales, float32 for each row of the
// caches, are read with PH_KV_FP8 only.
extern "C" __global__ void __launch_bounds__(32 * WARPS, D <= 64 ? 4 : D <= 128 ? 3 : 2)
    ph_attend_decode(const act_t* qkv, const stored_t* k_cache, const stored_t* v_cache, act_t* out, const int* work,
                     const int* context_lens, const int* block_tables, float* partial, int* counters, int heads,
                     int kv_heads, int group, int table_width, int split_tokens, int window, float scale, float cap,
                     const float* k_scales, const float* v_scales) {
  __shared__ __align__(16) float merge[WARPS][8][MERGE];
  __shared__ float warp_max[WARPS][8], warp_sum[WARPS][8];
  __shared__ bool last;

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int sequence = work ? work[2 * blockIdx.z] : blockIdx.z;
  if (sequence < 0) return;
  const i64 row = work ? work[2 * blockIdx.z + 1] : blockIdx.z;
  const int per_kv = heads / kv_heads, parts = gridDim.y / kv_heads;
  const int kv_head = blockIdx.y / parts, part = blockIdx.y % parts;
  const int first_head = kv_head * per_kv + part * group, n = min(group, per_kv - part * group);
  out += (row * heads + first_head) * D;

  const int length = context_lens[sequence];
  if (length <= 0) {  // Padding: zeros, so that nothing strange flows on.
    if (blockIdx.x == 0)
      for (int i = threadIdx.x; i < n * D; i += 32 * WARPS) out[i] = ph_to_act(0.0f);
    return;
  }
#ifdef PH_WINDOW
  const int begin = max(0, length - window);
#else
  const int begin = 0;
#endif
  const int first_split = begin / split_tokens;
  const int splits = min((length - 1) / split_tokens - first_split + 1, (int)gridDim.x);
  const int split = blockIdx.x;
  if (split >= splits) return;
  const int low = max(begin, (first_split + split) * split_tokens);
  const int high = min(length, (first_split + split + 1) * split_tokens);
  const int* table = block_tables + (i64)sequence * table_width;

  uint4 q[K_STEPS];
#pragma unroll
  for (int c = 0; c < K_STEPS; ++c) {
    q[c] = make_uint4(0, 0, 0, 0);
    if (g < n) {
      q[c] = load8(qkv + (row * (heads + 2 * kv_heads) + first_head + g) * D, 32 * c + 8 * t);
      q[c] = make_uint4(act2_to_kv2(q[c].x), act2_to_kv2(q[c].y), act2_to_kv2(q[c].z), act2_to_kv2(q[c].w));
    }
  }

  float acc[V_STEPS][4][4] = {};  // components 64c + 8g + 2j (+1 in [2], [3]) of heads 2t ([0], [2]) and 2t+1
  float most[2] = {-PH_INFINITY, -PH_INFINITY}, sum[2] = {0.0f, 0.0f};  // of heads 2t and 2t+1

  // Lane l knows where key l % 16 lies, one round ahead. Keys outside [low, high) are read as the nearest inside, so
  // that they are finite, and get no weight.
  const int end = ph_div_up(high, 16);
  int tile = low / 16 + warp;
  int next = tile < end ? cache_row(table, min(max(16 * tile + (lane & 15), low), high - 1), kv_heads, kv_head) : 0;
  for (; tile < end; tile += WARPS) {
    const int place = next;
    eight_t k[K_STEPS][2], v[V_STEPS][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // keys g, g+8
      const i64 at = (i64)__shfl_sync(PH_FULL_MASK, place, g + 8 * i) * D;
#pragma unroll
      for (int c = 0; c < K_STEPS; ++c) k[c][i] = load8_stored(k_cache + at, 32 * c + 8 * t);
    }
    if (ALL_AT_ONCE) load_values(v, v_cache, place, g, t);  // all under way before the first is used
#ifdef PH_KV_FP8
    const float k_scale = __ldg(k_scales + place), v_scale = __ldg(v_scales + place);  // of key lane % 16
#endif
    if (tile + WARPS < end)
      next = cache_row(table, min(max(16 * (tile + WARPS) + (lane & 15), low), high - 1), kv_heads, kv_head);

    float s[4] = {}, s2[4] = {};  // two chains of products: half the latency
#pragma unroll
    for (int c = 0; c < K_STEPS; ++c) {
      const uint4 upper = widen(k[c][0]), lower = widen(k[c][1]);
      const u32 a[4] = {upper.x, lower.x, upper.y, lower.y}, b[2] = {q[c].x, q[c].y};
      kv_mma(s, a, b);
      const u32 a2[4] = {upper.z, lower.z, upper.w, lower.w}, b2[2] = {q[c].z, q[c].w};
      kv_mma(s2, a2, b2);
    }
    if (!ALL_AT_ONCE) load_values(v, v_cache, place, g, t);

    // s[0], s[1]: key g of heads 2t, 2t+1; s[2], s[3]: key g+8
    const int key = 16 * tile + g;
    float shrink[2];
#ifdef PH_KV_FP8
    const float k_scale_of[2] = {__shfl_sync(PH_FULL_MASK, k_scale, g), __shfl_sync(PH_FULL_MASK, k_scale, g + 8)};
    const float v_scale_of[2] = {__shfl_sync(PH_FULL_MASK, v_scale, g) * VALUE_UNIT,
                                 __shfl_sync(PH_FULL_MASK, v_scale, g + 8) * VALUE_UNIT};
#endif
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] += s2[i];
#ifdef PH_KV_FP8
      s[i] *= k_scale_of[i >> 1];
#endif
#ifdef PH_SOFTCAP
      s[i] = soften(s[i], scale, cap);
#else
      s[i] *= scale;
#endif
      const int at = key + 4 * (i & 2);
      if (at < low || at >= high) s[i] = -PH_INFINITY;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = fmaxf(most[h], fmaxf(s[h], s[h + 2]));
#pragma unroll
      for (int step = 4; step <= 16; step *= 2) m = fmaxf(m, __shfl_xor_sync(PH_FULL_MASK, m, step));
      shrink[h] = exp2_fast(most[h] - m);  // every tile has a key inside, so m is finite
      s[h] = exp2_fast(s[h] - m);
      s[h + 2] = exp2_fast(s[h + 2] - m);
      sum[h] = sum[h] * shrink[h] + s[h] + s[h + 2];
      most[h] = m;
    }
#ifdef PH_KV_FP8
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] *= v_scale_of[i >> 1];  // the sums are done
#endif
    const u32 p[2] = {transpose8x8(kv2_bits(s[0], s[1])), transpose8x8(kv2_bits(s[2], s[3]))};
#pragma unroll
    for (int c = 0; c < V_STEPS; ++c) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[c][j][i] *= shrink[i & 1];
      add_values(acc[c], v[c], p);
    }
  }

  // ---- the block's warps
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int step = 4; step <= 16; step *= 2) sum[h] += __shfl_xor_sync(PH_FULL_MASK, sum[h], step);
    if (g == 0) {
      warp_max[warp][2 * t + h] = most[h];
      warp_sum[warp][2 * t + h] = sum[h];
    }
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = 2 * t + h;
    float m = warp_max[0][head];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) m = fmaxf(m, warp_max[w][head]);
    const float shrink = exp2_fast(most[h] - m) / VALUE_UNIT;
    if (head < n) {
#pragma unroll
      for (int c = 0; c < V_STEPS; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          *reinterpret_cast<float2*>(&merge[warp][head][64 * c + 8 * g + 2 * j]) =
              make_float2(acc[c][j][h] * shrink, acc[c][j][h + 2] * shrink);
    }
  }
  __syncthreads();
  const int place = blockIdx.z * gridDim.y + blockIdx.y;
  const i64 stride = group * (PAD + 4);  // a multiple of 16 bytes
  float* mine = partial + ((i64)place * gridDim.x + split) * stride;
  for (int i = threadIdx.x; i < n * (D / 2); i += 32 * WARPS) {
    const int head = i / (D / 2), d = 2 * (i % (D / 2));
    float m = warp_max[0][head];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) m = fmaxf(m, warp_max[w][head]);
    float total = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      total += warp_sum[w][head] * exp2_fast(warp_max[w][head] - m);
      x += merge[w][head][d];
      y += merge[w][head][d + 1];
    }
    if (splits == 1) {
      *reinterpret_cast<act2_t*>(out + head * D + d) = ph_to_act2(x / total, y / total);
      continue;
    }
    *reinterpret_cast<float2*>(mine + head * PAD + d) = make_float2(x, y);
    if (d == 0) {
      mine[group * PAD + head] = m;
      mine[group * PAD + group + head] = total;
    }
  }
  if (splits == 1) return;

  // ---- the sequence's blocks
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what the block wrote is visible before the count is
    last = atomicAdd(counters + place, 1) == splits - 1;
    if (last) counters[place] = 0;  // ready for the next launch
    __threadfence();
  }
  __syncthreads();
  if (!last) return;

  const float* all = partial + (i64)place * gridDim.x * stride;
  float* weights = &merge[0][0][0];  // [splits, 8], used up before merge is written again
  float* totals = &warp_sum[0][0];
  for (int head = warp; head < n; head += WARPS) {
    float m = -PH_INFINITY, total = 0.0f;
    for (int i = lane; i < splits; i += 32) m = fmaxf(m, __ldcg(all + i * stride + group * PAD + head));
    m = ph_warp_max(m);
    for (int i = lane; i < splits; i += 32) {
      const float* of = all + i * stride + group * PAD + head;
      const float weight = exp2_fast(__ldcg(of) - m);
      total += __ldcg(of + group) * weight;
      weights[i * 8 + head] = weight;
    }
    total = ph_warp_sum(total);
    if (lane == 0) totals[head] = total;
  }
  __syncthreads();
  // A warp adds up every fourth split, 4 components per lane; then the warps' sums are added. Both in order.
  constexpr int QUADS = PAD / 4;
  constexpr int MOST = ph_div_up(8 * QUADS, 32);
  float4 x[MOST];
#pragma unroll
  for (int b = 0; b < MOST; ++b) {
    const int i = b * 32 + lane, head = i / QUADS;
    x[b] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (b * 32 >= n * QUADS) continue;
    const float* of = all + 4 * (i64)i;
#pragma unroll 8
    for (int w = warp; w < splits; w += WARPS) {
      if (head >= n) continue;
      const float4 y = __ldcg(reinterpret_cast<const float4*>(of + w * stride));
      const float weight = weights[w * 8 + head];
      x[b].x += y.x * weight;
      x[b].y += y.y * weight;
      x[b].z += y.z * weight;
      x[b].w += y.w * weight;
    }
  }
  __syncthreads();
#pragma unroll
  for (int b = 0; b < MOST; ++b) {
    const int i = b * 32 + lane;
    if (i < n * QUADS) *reinterpret_cast<float4*>(&merge[warp][i / QUADS][4 * (i % QUADS)]) = x[b];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n * (D / 2); i += 32 * WARPS) {
    const int head = i / (D / 2), d = 2 * (i % (D / 2));
    float a = 0.0f, b = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      a += merge[w][head][d];
      b += merge[w][head][d + 1];
    }
    *reinterpret_cast<act2_t*>(out + head * D + d) = ph_to_act2(a / totals[head], b / totals[head]);
  }
}
