// Adding up what shared the work on a row: the warps of a block in shared memory, then the blocks of a sequence and KV
// head by whichever of them comes last. Always in the same order, so the same values give the same bits.
//
// A partial result is an accumulator for each head, the maximum that its weights are relative to, and their sum.
//
// Macros: those of attention.cuh; PH_WARPS.

#pragma once

#include "attention_tiles.cuh"

constexpr int WARPS = PH_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int HEADS = 8;                   // that a block serves at most
constexpr int MERGE = 16 * PRODUCTS + 4;   // floats of a head in shared memory
constexpr int PAD = ph_div_up(D, 4) * 4;   // and in a partial result in memory
constexpr int MOST_SPLITS = 128;           // that are added up
constexpr int PAIRS = D / 2;

// What a warp has of heads 2t and 2t+1; `sum` is of the keys that the lane saw.
struct Partial {
  float acc[PRODUCTS][4];
  float most[2], sum[2];
};

// Floats of a partial result of `group` heads in memory: a multiple of 16 bytes.
__device__ __forceinline__ int record_size(int group) { return group * (PAD + 4); }

struct Shared {
  float most[WARPS][HEADS], sum[WARPS][HEADS];
  float weights[MOST_SPLITS][HEADS], totals[HEADS];
  bool last;
};

// Adds up the warps, of which the first `used` had keys. The result goes to `out` [n, D], or to `record` where that is
// given. All threads call; `merge` is WARPS * HEADS * MERGE floats that nobody needs any more once all have called.
__device__ __forceinline__ void merge_warps(Partial& mine, Shared& shared, float* merge, int used, int n, int group,
                                            act_t* out, float* record) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int step = 4; step <= 16; step *= 2) mine.sum[h] += __shfl_xor_sync(PH_FULL_MASK, mine.sum[h], step);
    if (g == 0) {
      shared.most[warp][2 * t + h] = mine.most[h];
      shared.sum[warp][2 * t + h] = mine.sum[h];
    }
  }
  __syncthreads();
  auto highest = [&](int head) {
    float m = shared.most[0][head];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) m = fmaxf(m, shared.most[w][head]);
    return m;
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = 2 * t + h;
    if (head >= n || warp >= used) continue;
    const float shrink = exp2_fast(mine.most[h] - highest(head)) / VALUE_UNIT;
    float* row = merge + (warp * HEADS + head) * MERGE;
#pragma unroll
    for (int j = 0; j < PRODUCTS; ++j) {
      row[value_component(j, 0)] = mine.acc[j][h] * shrink;
      row[value_component(j, 1)] = mine.acc[j][h + 2] * shrink;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < n * PAIRS; i += THREADS) {
    const int head = i / PAIRS, d = 2 * (i % PAIRS);
    const float m = highest(head);
    float total = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float2 part = make_float2(0.0f, 0.0f);
      if (w < used) part = *reinterpret_cast<const float2*>(merge + (w * HEADS + head) * MERGE + d);
      total += shared.sum[w][head] * exp2_fast(shared.most[w][head] - m);
      x += part.x;
      y += part.y;
    }
    if (record == nullptr) {
      const float inverse = __frcp_rn(total);
      *reinterpret_cast<act2_t*>(out + head * D + d) = ph_to_act2(x * inverse, y * inverse);
      continue;
    }
    *reinterpret_cast<float2*>(record + head * PAD + d) = make_float2(x, y);
    if (d == 0) {
      record[group * PAD + head] = m;
      record[group * PAD + group + head] = total;
    }
  }
}

// Counts the block, and tells whether it is the last of `splits`, which then sees what the others wrote. The counter is
// zero before and after. All threads call.
__device__ __forceinline__ bool comes_last(int* counter, int splits, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    int before;  // what the block wrote is visible to who sees the count, and what others wrote to this block
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    shared.last = before == splits - 1;
    if (shared.last) *counter = 0;  // ready for the next launch
  }
  __syncthreads();
  return shared.last;
}

// Adds up the records at `all`, one after the other, into `out` [n, D]. They pass through `room`, `size` floats of
// shared memory, all under way at once as far as they fit: their latency is paid once, with that of the maxima.
__device__ __forceinline__ void add_splits(const float* all, int splits, Shared& shared, float* room, int size, int n,
                                           int group, act_t* out) {
  constexpr int EACH = ph_div_up(HEADS * PAIRS, THREADS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, record = record_size(group), fit = size / record;
  float2 x[EACH];
#pragma unroll
  for (int b = 0; b < EACH; ++b) x[b] = make_float2(0.0f, 0.0f);
  for (int base = 0; base < splits; base += fit) {
    const int count = min(fit, splits - base);
    for (int i = threadIdx.x; i < count * record / 4; i += THREADS)
      ph_cp_async16(room + 4 * i, all + (i64)base * record + 4 * i);
    ph_cp_async_commit();
    for (int head = base == 0 ? warp : n; head < n; head += WARPS) {
      const float* of = all + group * PAD + head;
      float most[MOST_SPLITS / 32], sums[MOST_SPLITS / 32], m = -PH_INFINITY, total = 0.0f;
#pragma unroll
      for (int i = 0; i < MOST_SPLITS / 32; ++i) {
        const int split = 32 * i + lane;
        most[i] = split < splits ? __ldcg(of + (i64)split * record) : -PH_INFINITY;
        sums[i] = split < splits ? __ldcg(of + (i64)split * record + group) : 0.0f;
        m = fmaxf(m, most[i]);
      }
      m = ph_warp_max(m);
#pragma unroll
      for (int i = 0; i < MOST_SPLITS / 32; ++i) {
        const float weight = exp2_fast(most[i] - m);
        total += sums[i] * weight;
        shared.weights[32 * i + lane][head] = weight;
      }
      total = ph_warp_sum(total);
      if (lane == 0) shared.totals[head] = total;
    }
    ph_cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int b = 0; b < EACH; ++b) {
      const int i = b * THREADS + threadIdx.x, head = i / PAIRS, d = 2 * (i % PAIRS);
      if (i >= n * PAIRS) break;
      for (int split = 0; split < count; ++split) {
        const float2 y = *reinterpret_cast<const float2*>(room + split * record + head * PAD + d);
        const float weight = shared.weights[base + split][head];
        x[b].x += y.x * weight;
        x[b].y += y.y * weight;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int b = 0; b < EACH; ++b) {
    const int i = b * THREADS + threadIdx.x, head = i / PAIRS, d = 2 * (i % PAIRS);
    if (i >= n * PAIRS) break;
    const float inverse = __frcp_rn(shared.totals[head]);
    *reinterpret_cast<act2_t*>(out + head * D + d) = ph_to_act2(x[b].x * inverse, x[b].y * inverse);
  }
}
