// Weights, the draw, and where to look for the edge of top-k or top-p: for the kernels of rows that are not greedy.
// sample.cuh explains the integer sums.

#pragma once

#include "sample.cuh"

// ---- weights

struct Weight {
  double share;  // 1 for the highest value
  u64 units;     // the same in multiples of 1 / ONE
  int bucket;    // 0 for the highest; never lower for a lower value
  __device__ u64 if_at_least(double least) const { return share >= least ? units : 0; }
};

__device__ inline Weight weigh(double x, double peak, double cooling, double scale) {
  const double drop = __dmul_rn(__dsub_rn(peak, x), cooling);
  if (!(drop < FAINT)) return Weight{0.0, 0, BINS - 1};
  const double share = exp(-drop);
  return Weight{share, __double2ull_rn(share * ONE), min(BINS - 1, (int)__dmul_rn(drop, scale))};
}

// ---- the draw

// philox.py: Philox4x32-10 with the seed as key and (position, 0, 0, 0) as counter; the upper 53 of the first 64 bits.
__device__ inline u64 random53(u64 seed, u32 position) {
  u32 c0 = position, c1 = 0, c2 = 0, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return ((u64)c0 << 21) | (c1 >> 11);
}

// Chooses the first token, by id, whose running sum exceeds u times the total. Thread t holds chunk t's sum of what
// ``cut`` and min_p keep. By the last block of a row.
__device__ inline void draw(const Task &task, Cut cut, u64 chunk_sum) {
  const Params &p = *task.params;
  const u64 total = block_sum(chunk_sum);
  const u64 random = random53(p.seed, (u32)p.position);
  // floor(u * total) + 1, u = random / 2^53: sums are integers, so one exceeds u * total exactly if it reaches this.
  const u64 goal = ((__umul64hi(random, total) << 11) | (random * total >> 53)) + 1;
  const u64 sums[1] = {chunk_sum};
  const Found in = find(sums, goal);
  double x[ITEMS];
  load_raw(task, in.index, x);
  adjust(task, in.index, x);
  __shared__ u64 stripes[ITEMS * WARPS];  // sums over 32 neighbouring ids, in order of id
  const double peak = task.row->peak;
  u64 units[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const bool kept = cut.keeps(x[i], token_id(in.index, i));
    units[i] = kept ? weigh(x[i], peak, p.cooling, 0.0).if_at_least(p.min_p) : 0;
    const u64 sum = warp_scan(units[i]);
    if (threadIdx.x % 32 == 31) stripes[i * WARPS + threadIdx.x / 32] = sum;
  }
  __syncthreads();
  const u64 stripe[1] = {threadIdx.x < ITEMS * WARPS ? stripes[threadIdx.x] : 0};
  const Found at = find(stripe, goal - in.above);
  const u64 rest = goal - in.above - at.above;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const u64 reached = warp_scan(units[i]);
    const bool here = at.index == (int)(i * WARPS + threadIdx.x / 32);
    if (here && reached >= rest && reached - units[i] < rest) task.choose(token_id(in.index, i), 0);
  }
}

// ---- the edge of top-k or top-p

// Finds the bucket in which the first of the pending filters cuts, and leaves it in the row for sample_cut. ``total``
// is the weight that top-p refers to; 0: of all. False if nothing is cut. By the last block of a row.
__device__ inline bool seek(const Task &task, int pending, u64 total) {
  const Params &p = *task.params;
  Row *row = task.row;
  u64 counts[BINS / BLOCK], sums[BINS / BLOCK];
#pragma unroll
  for (int k = 0; k < BINS / BLOCK; ++k) {
    counts[k] = __ldcg(row->counts + threadIdx.x * (BINS / BLOCK) + k);
    sums[k] = __ldcg(row->sums + threadIdx.x * (BINS / BLOCK) + k);
  }
  u64 goal = (u64)p.top_k;
  Found edge{-1, 0, 0};
  if (pending & TOP_K) {
    edge = find(counts, goal);
    if (edge.index < 0) pending &= ~TOP_K;  // fewer tokens than k have any weight
  }
  if (pending == TOP_P) {
    if (total == 0) total = find(sums, 1).total;
    goal = min(max((u64)ceil(p.top_p * (double)total), (u64)1), total);
    edge = find(sums, goal);
  }
  if (threadIdx.x == 0) {
    row->pending = pending;
    row->bucket = edge.index;
    row->above = edge.above;
    row->goal = goal;
  }
  return pending != 0;
}
