// Cuts a row exactly where top-k or top-p says, then draws, or seeks the next filter's edge. One launch per filter of a
// row. Grid: (chunks, rows).
//
// sample_weigh left the bucket with the edge. Whole buckets before it are in. Its own entries are listed by all blocks
// (in any order, nothing depends on it) and the last block splits them further, until one value is left, then, among
// the ids that have it, one id. A bucket of more entries than the list holds, which means many equal or nearly equal
// values, is read again from the row instead: slower, and the same result.

#include "sample_draw.cuh"

// A chunk's adjusted values to shared memory, where each thread finds its own. Rare and by itself, which keeps the rest
// within its registers.
__device__ __noinline__ void reload(Task task, int chunk) {
  double x[ITEMS];
  load_raw(task, chunk, x);
  adjust(task, chunk, x);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) shared_values()[i * BLOCK + threadIdx.x] = x[i];
}

struct Edge {  // what the cut is looked for in: the entries of one bucket that an earlier cut keeps
  const Task &task;
  double peak, scale;
  int bucket;
  Cut before;
  u32 listed;

  __device__ bool has(double x, int id, const Weight &weight) const {
    return weight.bucket == bucket && weight.units && before.keeps(x, id);
  }
  __device__ u64 units(double x) const { return weigh(x, peak, task.params->cooling, 0.0).units; }

  // Shows this thread's entries. All threads must call.
  template <class Visit> __device__ void list(Visit visit) const {
    for (u32 k = threadIdx.x; k < listed; k += BLOCK) visit(__ldcg(task.row->list_x + k), __ldcg(task.row->list_id + k));
  }
  template <class Visit> __device__ void each(Visit visit) const {
    if (listed <= (u32)CAPACITY) {
      list(visit);
      return;
    }
    for (int c = 0; c < (int)gridDim.x; ++c) {
      reload(task, c);
#pragma unroll 1
      for (int i = 0; i < ITEMS; ++i) {
        const double x = shared_values()[i * BLOCK + threadIdx.x];
        const int id = token_id(c, i);
        if (has(x, id, weigh(x, peak, task.params->cooling, scale))) visit(x, id);
      }
    }
  }
};

// The last entry that a filter keeps. In order of value descending, a running measure (1 for top-k, the weight for
// top-p) that begins with ``above`` reaches ``goal`` at some value; among the ids with this value, ascending, it is
// reached at one id. Both are found alike, values first: each round divides what is left between the least and the
// greatest into BINS parts and goes on with one of them, until least and greatest are equal.
__device__ Cut settle(const Edge &edge, bool by_count, u64 above, u64 goal) {
  __shared__ u64 bins[BINS];
  Cut cut{0.0, 0};
  bool ids = false, filling = false;
  double low = -infinity(), high = infinity(), start = 0.0, scale = 0.0;
  int part = 0;
  while (true) {
    double least = infinity(), most = -infinity();
    edge.each([&](double x, int id) {
      if (ids && x != cut.x) return;
      const double v = ids ? -(double)id : x;
      if (v < low || v > high) return;
      const double drop = start - v;  // the scale may be infinite: then only start itself is in part 0
      const int place = drop > 0.0 ? (int)fmin(drop * scale, (double)(BINS - 1)) : 0;
      if (filling)
        atomicAdd(bins + place, by_count ? (u64)1 : edge.units(x));
      else if (place == part)
        least = fmin(least, v), most = fmax(most, v);
    });
    if (filling) {
      __syncthreads();
      u64 mine[BINS / BLOCK];
#pragma unroll
      for (int k = 0; k < BINS / BLOCK; ++k) mine[k] = bins[threadIdx.x * (BINS / BLOCK) + k];
      const Found found = find(mine, goal - above);
      part = found.index;
      above += found.above;
      filling = false;
      continue;
    }
    least = block_reduce(least, [](double a, double b) { return fmin(a, b); });
    most = block_reduce(most, [](double a, double b) { return fmax(a, b); });
    if (least < most) {
      low = least;
      high = start = most;
      scale = BINS / (most - least);
      for (int b = threadIdx.x; b < BINS; b += BLOCK) bins[b] = 0;
      __syncthreads();
      filling = true;
    } else if (!ids) {
      // Entries of equal value weigh the same, so now it is their number that counts.
      const u64 each = by_count ? 1 : edge.units(most);
      cut.x = most;
      goal = (goal - above + each - 1) / each;
      above = 0;
      ids = by_count = true;
      low = -infinity(), high = infinity(), start = 0.0, scale = 0.0;
      part = 0;
    } else {
      cut.id = (int)-most;
      return cut;
    }
  }
}

PH_SAMPLE_KERNEL(sample_cut) {
  const Task task = PH_SAMPLE_TASK;
  const Params &p = *task.params;
  Row *row = task.row;
  const int pending = row->pending;
  if (row->status || pending == 0) return;
  const bool both = pending == (TOP_K | TOP_P);
  const double least = both ? 0.0 : p.min_p;  // top-p counts what min-p will drop
  Edge edge{task, row->peak, row->scale, row->bucket, Cut{row->cut, row->cut_id}, 0};
  double x[ITEMS];
  load_raw(task, blockIdx.x, x);
  adjust(task, blockIdx.x, x);
  u64 sum = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const Weight weight = weigh(x[i], edge.peak, p.cooling, edge.scale);
    const int id = token_id(blockIdx.x, i);
    if (weight.bucket < edge.bucket) sum += weight.if_at_least(least);
    if (edge.has(x[i], id, weight)) {
      const u32 at = atomicAdd(&row->listed, 1u);
      if (at < (u32)CAPACITY) row->list_x[at] = x[i], row->list_id[at] = id;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) task.chunks[blockIdx.x].sum = sum;
  if (!last_chunk(row)) return;

  edge.listed = __ldcg(&row->listed);
  const Cut cut = settle(edge, pending & TOP_K, row->above, row->goal);
  if (edge.listed <= (u32)CAPACITY) {
    __shared__ u64 added[BLOCK];  // to the chunks' sums
    added[threadIdx.x] = 0;
    __syncthreads();
    edge.list([&](double v, int id) {
      if (cut.keeps(v, id)) atomicAdd(added + id / CHUNK, weigh(v, edge.peak, p.cooling, 0.0).if_at_least(least));
    });
    __syncthreads();
    sum = (threadIdx.x < gridDim.x ? __ldcg(&task.chunks[threadIdx.x].sum) : 0) + added[threadIdx.x];
  } else {
    sum = 0;
    for (int c = 0; c < (int)gridDim.x; ++c) {
      reload(task, c);
      u64 part = 0;
#pragma unroll 1
      for (int i = 0; i < ITEMS; ++i) {
        const double v = shared_values()[i * BLOCK + threadIdx.x];
        if (cut.keeps(v, token_id(c, i))) part += weigh(v, edge.peak, p.cooling, 0.0).if_at_least(least);
      }
      part = block_sum(part);
      if ((int)threadIdx.x == c) sum = part;
    }
  }
  if (threadIdx.x == 0) {
    row->listed = 0;
    row->pending = 0;
    row->cut = cut.x;
    row->cut_id = cut.id;
  }
  if (both) {
    seek(task, TOP_P, block_sum(sum));
    return;
  }
  draw(task, cut, sum);
}
