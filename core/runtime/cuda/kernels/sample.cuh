// What the sampling kernels share: the layout of their data, sums over a block, and a row's values with bias, mask and
// penalties. cpu/sampler.py says what is computed. Knows nothing of requests or models.
//
// The one idea: weights exp((x - highest) / T) are rounded to multiples of 2^-39 and summed as integers. Integer sums
// have no order, so atomics, any split of a row over blocks and any batch give the same bits, and "the first running sum
// that reaches" is decided exactly. The rounding shifts a boundary by less than 2.5e-7 of the highest weight, however
// long the row. Values stay float64 and are computed as the CPU does, so that ties and the order of tokens are the same.
//
// A row is cut into chunks, one block each; the block that finishes a row's last chunk combines them (last_chunk).
//
// PH_BLOCK threads; PH_ITEMS values of a chunk per thread; PH_BINS buckets; PH_CAPACITY entries of a bucket listed;
// PH_TOP most log-probabilities; PH_PARAMS_BYTES, PH_ROW_BYTES, PH_CHUNK_BYTES: what the host takes the structures for.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int BLOCK = PH_BLOCK, ITEMS = PH_ITEMS, BINS = PH_BINS, CAPACITY = PH_CAPACITY, TOP = PH_TOP;
constexpr int CHUNK = BLOCK * ITEMS, WARPS = BLOCK / 32;
constexpr int PER_SM = ITEMS > 4 ? 2 : 1;  // small chunks are for few rows, which do not fill a GPU anyway
constexpr double ONE = 549755813888.0;  // 2^39, the weight of the highest value
constexpr double FAINT = 28.0;          // exp(-28) rounds to no weight at all
constexpr int ALL = 0x7fffffff;
constexpr int TOP_K = 1, TOP_P = 2;  // filters whose edge is not yet known
// In shared memory a sum of weights is two words, which add natively: 20 low bits and the rest. A chunk's sums fit.
constexpr int LOW_BITS = 20;
static_assert(CHUNK <= 4096 && BINS % BLOCK == 0 && ITEMS * WARPS <= BLOCK, "sums would overflow, or find() not reach");

struct Params {  // one row's SamplingRow; lists are ranges of arrays that all rows share
  double cooling;  // 1 / temperature; 0: greedy
  double top_p, min_p, repetition, presence, frequency;
  u64 seed;
  long long mask_start;  // in words; less than 0: every token may be chosen
  int position;
  int counts_recent;  // recent[row] is one more token of the output, not yet in the lists
  int top_k, logprobs;
  int seen_start, seen_count, bias_start, bias_count;
};

struct Peak {  // of a part of a row
  double raw;   // highest logit
  double best;  // highest adjusted value; the lowest id that has it
  double low;   // lowest adjusted value above -inf
  int id, nan;
};

struct Chunk {
  Peak peak;
  u64 sum;
  u64 top[TOP];
};

struct Row {  // a row's state between kernels; zero before the first
  u32 arrived, listed;
  int status;  // 0; 1 NaN, 2 +inf, 3 nothing but -inf in the logits; 4 everything banned
  int pending, bucket, cut_id;
  double raw, peak, scale, cut;
  u64 above, goal;
  u32 counts[BINS];
  u64 sums[BINS];
  double list_x[CAPACITY];
  int list_id[CAPACITY];
};
static_assert(sizeof(Params) == PH_PARAMS_BYTES && sizeof(Row) == PH_ROW_BYTES && sizeof(Chunk) == PH_CHUNK_BYTES,
              "the host takes the structures for other sizes");

// logits [rows, vocab]; tokens [rows]; results [rows, 2]: token and status; tops: see sample_logprobs.cu.
#define PH_SAMPLE_PARAMETERS                                                                                         \
  const float *__restrict__ logits, int vocab, const Params *__restrict__ params, const int *__restrict__ seen_ids, \
      const int *__restrict__ seen_counts, const int *__restrict__ bias_ids, const double *__restrict__ bias_values, \
      const u32 *__restrict__ masks, const int *recent, char *state, long long stride, int *tokens, int *results,    \
      int *tops
#define PH_SAMPLE_TASK                                                                                              \
  Task {                                                                                                            \
    logits + (size_t)blockIdx.y * vocab, vocab, params + blockIdx.y, seen_ids, seen_counts, bias_ids, bias_values,  \
        masks, recent + blockIdx.y, (Row *)(state + (size_t)blockIdx.y * stride),                                   \
        (Chunk *)(state + (size_t)blockIdx.y * stride + sizeof(Row)), tokens + blockIdx.y, results + 2 * blockIdx.y \
  }
#define PH_SAMPLE_KERNEL(name) extern "C" __global__ void __launch_bounds__(BLOCK, PER_SM) name(PH_SAMPLE_PARAMETERS)

struct Task {
  const float *logits;
  int vocab;
  const Params *params;
  const int *seen_ids, *seen_counts, *bias_ids;
  const double *bias_values;
  const u32 *masks;
  const int *recent;
  Row *row;
  Chunk *chunks;
  int *token, *result;

  __device__ void choose(int id, int status) const {
    *token = id;
    result[0] = id;
    result[1] = status;
  }
};

struct Cut {  // what the filters left: everything before and including this entry, by (value descending, id ascending)
  double x;
  int id;
  __device__ bool keeps(double value, int at) const { return value > x || (value == x && at <= id); }
};

__device__ inline double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }

// ---- a block's threads together; every thread must call these, and all get the result

template <class T, class Op> __device__ T block_reduce(T value, Op op) {
  union Words {
    T t;
    u32 word[sizeof(T) / 4];
    __device__ Words(T v) : t(v) {}
  };
  __shared__ u64 store[WARPS * (sizeof(T) / 8)];
  T *part = reinterpret_cast<T *>(store);
#pragma unroll
  for (int step = 16; step; step /= 2) {
    Words other(value);
#pragma unroll
    for (int w = 0; w < (int)(sizeof(T) / 4); ++w)
      other.word[w] = __shfl_xor_sync(0xffffffffu, other.word[w], step);
    value = op(value, other.t);
  }
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
  __syncthreads();
  value = part[0];
  for (int w = 1; w < WARPS; ++w) value = op(value, part[w]);
  __syncthreads();
  return value;
}

__device__ inline u64 block_sum(u64 value) {
  return block_reduce(value, [](u64 a, u64 b) { return a + b; });
}

// The sum of this and all lower lanes.
__device__ inline u64 warp_scan(u64 value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 other = __shfl_up_sync(0xffffffffu, value, step);
    if ((int)(threadIdx.x % 32) >= step) value += other;
  }
  return value;
}

struct Found {
  int index;  // -1 where the sum of all is less than the goal
  u64 above;  // the sum before index
  u64 total;
};

// The first entry at which the running sum reaches ``goal`` (at least 1); thread t holds entries t*K to t*K + K-1.
template <int K> __device__ Found find(const u64 (&value)[K], u64 goal) {
  __shared__ u64 totals[WARPS];
  __shared__ Found found;
  const int warp = threadIdx.x / 32;
  u64 sum = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) sum += value[k];
  const u64 inclusive = warp_scan(sum);
  if (threadIdx.x % 32 == 31) totals[warp] = inclusive;
  if (threadIdx.x == 0) found.index = -1;
  __syncthreads();
  u64 before = inclusive - sum, total = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += totals[w];
    total += totals[w];
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (before < goal && goal <= before + value[k]) {
      found.index = threadIdx.x * K + k;
      found.above = before;
    }
    before += value[k];
  }
  __syncthreads();
  Found result = found;
  result.total = total;
  __syncthreads();
  return result;
}

// Whether this block is the last of its row in this kernel; then what all of them wrote can be read, past L1.
__device__ inline bool last_chunk(Row *row) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&row->arrived, 1u) + 1 == gridDim.x;
    if (last) row->arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// ---- a row's values

__device__ inline int token_id(int chunk, int item) { return chunk * CHUNK + item * BLOCK + threadIdx.x; }

__device__ inline void load_raw(const Task &task, int chunk, double (&x)[ITEMS]) {
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int id = token_id(chunk, i);
    x[i] = id < task.vocab ? (double)__ldg(task.logits + id) : -infinity();
  }
}

// Explicit roundings: a fused multiply-add would differ from the CPU in the last bit, and so in which tokens tie.
__device__ inline double penalise(double x, const Params &p, int times) {
  if (p.repetition != 1.0) x = x > 0.0 ? __ddiv_rn(x, p.repetition) : __dmul_rn(x, p.repetition);
  if (times > 0) x = __dsub_rn(x, __dadd_rn(p.presence, __dmul_rn(p.frequency, (double)times)));
  return x;
}

__device__ inline double *shared_values() {  // a chunk's, for what has no room in registers
  __shared__ double value[CHUNK];
  return value;
}

// Bias, mask and penalties. Every block of a row reads the whole lists, which are not sorted, and applies its own part.
__device__ inline void adjust(const Task &task, int chunk, double (&x)[ITEMS]) {
  const Params &p = *task.params;
  const bool penalised = p.repetition != 1.0 || p.presence != 0.0 || p.frequency != 0.0;
  const int seen = penalised ? p.seen_count : 0;
  const int recent = penalised && p.counts_recent ? *task.recent : -1;
  const bool masked = p.mask_start >= 0;
  if (p.bias_count == 0 && !masked && seen == 0 && recent < 0) return;
  double *value = shared_values();
  const int first = chunk * CHUNK;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) value[i * BLOCK + threadIdx.x] = x[i];
  __syncthreads();
  for (int k = threadIdx.x; k < p.bias_count; k += BLOCK) {
    const u32 at = task.bias_ids[p.bias_start + k] - first;
    if (at < (u32)CHUNK) value[at] = __dadd_rn(value[at], task.bias_values[p.bias_start + k]);
  }
  __syncthreads();
  if (masked) {
    const u32 *words = task.masks + p.mask_start;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {  // a warp's 32 tokens are one word
      const int id = token_id(chunk, i);
      if (id < task.vocab && !(__ldg(words + id / 32) >> id % 32 & 1)) value[i * BLOCK + threadIdx.x] = -infinity();
    }
    __syncthreads();
  }
  int found = 0;
#pragma unroll 4
  for (int k = threadIdx.x; k < seen; k += BLOCK) {
    const int id = task.seen_ids[p.seen_start + k];
    const u32 at = id - first;
    if (at < (u32)CHUNK) {
      found |= id == recent;
      value[at] = penalise(value[at], p, task.seen_counts[p.seen_start + k] + (id == recent));
    }
  }
  found = __syncthreads_or(found);
  const u32 at = recent - first;
  if (threadIdx.x == 0 && recent >= 0 && !found && at < (u32)CHUNK) value[at] = penalise(value[at], p, 1);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) x[i] = value[i * BLOCK + threadIdx.x];
  __syncthreads();
}
