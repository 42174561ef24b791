// The first two steps of sampling. sample_max finds what is highest and chooses for greedy rows: alone, it is all that
// a greedy batch needs. sample_weigh sums weights, draws where only min-p filters, and else finds the bucket in which
// top-k or top-p cuts. Grid: (chunks, rows).

#include "sample_draw.cuh"

struct Higher {
  __device__ Peak operator()(const Peak &a, const Peak &b) const {
    const bool first = a.best > b.best || (a.best == b.best && a.id < b.id);
    return Peak{fmax(a.raw, b.raw), first ? a.best : b.best, fmin(a.low, b.low), first ? a.id : b.id, a.nan | b.nan};
  }
};

PH_SAMPLE_KERNEL(sample_max) {
  const Task task = PH_SAMPLE_TASK;
  const Params &p = *task.params;
  Row *row = task.row;
  const int chunk = blockIdx.x;
  for (int b = chunk * BLOCK + threadIdx.x; b < BINS; b += gridDim.x * BLOCK) row->counts[b] = 0, row->sums[b] = 0;
  double x[ITEMS];
  load_raw(task, chunk, x);
  Peak peak{-infinity(), -infinity(), infinity(), ALL, 0};
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    peak.raw = fmax(peak.raw, x[i]);  // passes NaN by, hence the flag
    peak.nan |= x[i] != x[i];
  }
  adjust(task, chunk, x);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    if (x[i] > peak.best) peak.best = x[i], peak.id = token_id(chunk, i);  // ids ascend, so the first of equals stays
    if (x[i] > -infinity()) peak.low = fmin(peak.low, x[i]);
  }
  peak = block_reduce(peak, Higher());
  if (threadIdx.x == 0) task.chunks[chunk].peak = peak;
  if (!last_chunk(row)) return;

  peak = Peak{-infinity(), -infinity(), infinity(), ALL, 0};
  if (threadIdx.x < gridDim.x) {
    const Peak *part = &task.chunks[threadIdx.x].peak;
    peak = Peak{__ldcg(&part->raw), __ldcg(&part->best), __ldcg(&part->low), __ldcg(&part->id), __ldcg(&part->nan)};
  }
  peak = block_reduce(peak, Higher());
  if (threadIdx.x != 0) return;
  const int status = peak.nan                    ? 1
                     : peak.raw == infinity()    ? 2
                     : peak.raw == -infinity()   ? 3
                     : peak.best == -infinity() ? 4
                                                 : 0;
  const double range = fmin(FAINT, __dmul_rn(__dsub_rn(peak.best, peak.low), p.cooling));
  row->status = status;
  row->raw = peak.raw;
  row->peak = peak.best;
  row->scale = range > 1e-290 ? BINS / range : 0.0;  // buckets divide what has weight evenly
  row->pending = 0;
  row->cut = -infinity();
  row->cut_id = ALL;
  if (status || p.cooling == 0.0) task.choose(status ? 0 : peak.id, status);
}

PH_SAMPLE_KERNEL(sample_weigh) {
  const Task task = PH_SAMPLE_TASK;
  const Params &p = *task.params;
  Row *row = task.row;
  if (row->status || p.cooling == 0.0) return;
  const int chunk = blockIdx.x;
  const int filters = (p.top_k > 0 && p.top_k < vocab ? TOP_K : 0) | (p.top_p < 1.0 ? TOP_P : 0);
  __shared__ u32 count[BINS], low[BINS], high[BINS];
  if (filters)
    for (int b = threadIdx.x; b < BINS; b += BLOCK) count[b] = low[b] = high[b] = 0;
  double x[ITEMS];
  load_raw(task, chunk, x);
  adjust(task, chunk, x);
  __syncthreads();
  const double peak = row->peak, scale = row->scale;
  u64 sum = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const Weight weight = weigh(x[i], peak, p.cooling, scale);
    sum += weight.if_at_least(p.min_p);
    if (filters && weight.units) {
      atomicAdd(count + weight.bucket, 1u);
      atomicAdd(low + weight.bucket, (u32)weight.units & ((1u << LOW_BITS) - 1));
      atomicAdd(high + weight.bucket, (u32)(weight.units >> LOW_BITS));
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) task.chunks[chunk].sum = sum;
  if (filters)
    for (int b = threadIdx.x; b < BINS; b += BLOCK)
      if (count[b]) {
        atomicAdd(row->counts + b, count[b]);
        atomicAdd(row->sums + b, ((u64)high[b] << LOW_BITS) + low[b]);
      }
  if (!last_chunk(row)) return;

  if (filters && seek(task, filters, 0)) return;
  draw(task, Cut{-infinity(), ALL}, threadIdx.x < gridDim.x ? __ldcg(&task.chunks[threadIdx.x].sum) : 0);
}
