// Log-probabilities under the logits as they are: the normaliser, the chosen token's logit, and the most likely tokens.
// Runs last, for rows that ask for it. Grid: (chunks, rows).
//
// tops [rows, 4 + 2 * TOP], int32: the normaliser log(sum(exp(logit))) as float64 (2 words), the chosen token's logit as
// float32, how many tokens follow; their ids, best first, the lower first among equals; their logits as float32.

#include "sample.cuh"

constexpr double FINE = 8796093022208.0;  // 2^43: without atomics on halves there is room for finer sums

// Keys order as (logit descending, id ascending) does when sorted descending; 0 is no token.
__device__ inline u64 key_of(float logit, int id) {
  const u32 bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0: they are equal
  return (u64)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | (0xffffffffu - (u32)id);
}
__device__ inline int key_id(u64 key) { return (int)(0xffffffffu - (u32)key); }
__device__ inline float key_logit(u64 key) {
  const u32 bits = (u32)(key >> 32);
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// The n greatest of a warp's keys, in order, to ``out``.
template <int K> __device__ void warp_top(u64 (&key)[K], int n, u64 *out) {
  for (int rank = 0; rank < n; ++rank) {
    u64 best = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) best = max(best, key[k]);
#pragma unroll
    for (int step = 16; step; step /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, step));
    if (threadIdx.x % 32 == 0) out[rank] = best;
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (key[k] == best) key[k] = 0;
  }
}

// The n greatest of a block's keys, in order, to ``out`` in shared memory.
template <int K> __device__ void block_top(u64 (&key)[K], int n, u64 *out) {
  __shared__ u64 parts[WARPS * TOP];
  constexpr int EACH = (WARPS * TOP + 31) / 32;
  warp_top(key, n, parts + threadIdx.x / 32 * TOP);
  __syncthreads();
  if (threadIdx.x < 32) {
    u64 part[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int at = k * 32 + threadIdx.x;
      part[k] = at < WARPS * TOP && at % TOP < n ? parts[at] : 0;
    }
    warp_top(part, n, out);
  }
  __syncthreads();
}

PH_SAMPLE_KERNEL(sample_logprobs) {
  const Task task = PH_SAMPLE_TASK;
  Row *row = task.row;
  const int n = min(task.params->logprobs, TOP);
  if (n < 0 || row->status) return;
  __shared__ u64 best[TOP];
  double x[ITEMS];
  u64 key[ITEMS];
  load_raw(task, blockIdx.x, x);
  u64 sum = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    sum += __double2ull_rn(exp(x[i] - row->raw) * FINE);
    key[i] = x[i] > -infinity() ? key_of((float)x[i], token_id(blockIdx.x, i)) : 0;
  }
  sum = block_sum(sum);
  block_top(key, n, best);
  Chunk *chunk = task.chunks + blockIdx.x;
  if (threadIdx.x == 0) chunk->sum = sum;
  if (threadIdx.x < n) chunk->top[threadIdx.x] = best[threadIdx.x];
  if (!last_chunk(row)) return;

  sum = block_sum(threadIdx.x < gridDim.x ? __ldcg(&task.chunks[threadIdx.x].sum) : 0);
  u64 all[TOP];  // a block has as many threads as a row may have chunks
#pragma unroll
  for (int k = 0; k < TOP; ++k) {
    const int at = k * BLOCK + threadIdx.x;
    all[k] = at < (int)gridDim.x * n ? __ldcg(task.chunks[at / n].top + at % n) : 0;
  }
  block_top(all, n, best);
  int *out = tops + blockIdx.y * (4 + 2 * TOP);
  if (threadIdx.x == 0) {
    const long long normaliser = __double_as_longlong(row->raw + log((double)sum / FINE));
    int count = 0;
    while (count < n && best[count]) ++count;
    out[0] = (int)normaliser;
    out[1] = (int)(normaliser >> 32);
    out[2] = __float_as_int(task.logits[task.result[0]]);
    out[3] = count;
  }
  if (threadIdx.x < n) {
    out[4 + threadIdx.x] = key_id(best[threadIdx.x]);
    out[4 + TOP + threadIdx.x] = __float_as_int(key_logit(best[threadIdx.x]));
  }
}
