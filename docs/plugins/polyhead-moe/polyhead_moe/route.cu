// Which experts a row goes to, which rows an expert is given, and the sum of what comes back.
//
// A row (a token) and one of its experts are a pair: pair = row * used + slot. ph_moe_group sorts the pairs by expert
// and cuts each expert's share into tiles of neighbours in that order, which experts.cu works through. The sort is
// stable and counts with integers only, so nothing depends on the order in which blocks run.

#include "prelude.cuh"

constexpr int MOST_EXPERTS = 1024;

// A tile: pairs order[first] to order[first + count - 1], all of one expert.
struct Tile {
  int expert, first, count;
};

// A row's `used` experts with the highest scores (of equal ones the first), and their shares: the softmax over all
// experts, or over the chosen ones where `normalise`, times `scale`. Where `shared` each row of
// `shares` has one more value, sigmoid(x . gate), or where `gate` is null the sigmoid of what is there. A lone row needs no sort: its tiles are made here. Grid: rows, one warp each.
extern "C" __global__ void __launch_bounds__(32)
    ph_moe_choose(const float* scores, const act_t* x, const float* gate, int* chosen, float* shares, int* order,
                  Tile* tiles, int experts, int used, int hidden, int normalise, int shared,
                  float scale) {
  __shared__ float score[MOST_EXPERTS];
  __shared__ int taken[MOST_EXPERTS], picks[MOST_EXPERTS];
  const int lane = threadIdx.x, row = blockIdx.x, width = used + shared;
  for (int e = lane; e < experts; e += 32) score[e] = scores[(i64)row * experts + e], taken[e] = 0;
  __syncwarp();

  float most = 0.0f;
  for (int slot = 0; slot < used; ++slot) {
    // Some expert is always found: one that is not a number counts as the lowest.
    float best = -PH_INFINITY;
    int at = experts;
    for (int e = lane; e < experts; e += 32) {
      const float value = score[e] == score[e] ? score[e] : -PH_INFINITY;
      if (!taken[e] && (at == experts || value > best)) best = value, at = e;
    }
#pragma unroll
    for (int step = 16; step; step /= 2) {
      const float other = __shfl_xor_sync(PH_FULL_MASK, best, step);
      const int there = __shfl_xor_sync(PH_FULL_MASK, at, step);
      const bool better = at == experts || other > best || (other == best && there < at);
      if (there < experts && better) best = other, at = there;
    }
    if (slot == 0) most = best;
    if (lane == 0) taken[at] = 1, picks[slot] = at;
    __syncwarp();
  }

  float sum = 0.0f;
  if (normalise)
    for (int slot = lane; slot < used; slot += 32) sum += expf(score[picks[slot]] - most);
  else
    for (int e = lane; e < experts; e += 32) sum += expf(score[e] - most);
  sum = ph_warp_sum(sum);
  for (int slot = lane; slot < used; slot += 32) {
    chosen[row * used + slot] = picks[slot];
    shares[row * width + slot] = scale * (expf(score[picks[slot]] - most) / sum);
    if (gridDim.x == 1) order[slot] = slot, tiles[slot] = Tile{picks[slot], slot, 1};
  }
  if (shared) {
    float* share = shares + row * width + used;
    float dot = 0.0f;
    if (gate != nullptr) {
      for (int k = lane; k < hidden; k += 32) dot = fmaf(ph_to_float(x[(i64)row * hidden + k]), gate[k], dot);
      dot = ph_warp_sum(dot);
    }
    if (lane == 0) *share = 1.0f / (1.0f + expf(-(gate != nullptr ? dot : *share)));
  }
}

// order [pairs] and tiles [most]; those beyond the last have no pairs. Grid: experts, 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    ph_moe_group(const int* chosen, int* order, Tile* tiles, int pairs, int experts, int size, int most) {
  __shared__ int counts[MOST_EXPERTS], mine[8];
  const int expert = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int e = threadIdx.x; e < experts; e += 256) counts[e] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < pairs; p += 256) atomicAdd(&counts[chosen[p]], 1);

  // A warp ranks the pairs of its share of the list.
  const int share = ph_div_up(ph_div_up(pairs, 8), 32) * 32, from = warp * share, to = min(from + share, pairs);
  int found = 0;
  for (int p = from; p < to; p += 32)
    found += __popc(__ballot_sync(PH_FULL_MASK, p + lane < to && chosen[p + lane] == expert));
  if (lane == 0) mine[warp] = found;
  __syncthreads();

  int before = 0, tiles_before = 0, tiles_in_all = 0;
  for (int e = 0; e < experts; ++e) {
    const int count = counts[e], needed = ph_div_up(count, size);
    if (e < expert) before += count, tiles_before += needed;
    tiles_in_all += needed;
  }
  int place = before;
  for (int w = 0; w < warp; ++w) place += mine[w];
  for (int p = from; p < to; p += 32) {
    const bool is = p + lane < to && chosen[p + lane] == expert;
    const u32 all = __ballot_sync(PH_FULL_MASK, is);
    if (is) order[place + __popc(all & ((1u << lane) - 1))] = p + lane;
    place += __popc(all);
  }
  const int count = counts[expert];
  for (int i = threadIdx.x; i * size < count; i += 256)
    tiles[tiles_before + i] = Tile{expert, before + i * size, min(size, count - i * size)};
  if (expert == 0)
    for (int i = tiles_in_all + threadIdx.x; i < most; i += 256) tiles[i] = Tile{0, 0, 0};
}

// out[row] = sum over slots of shares[row, slot] * results[row, slot], plus shares[row, used] * out[row] where `shared`.
// Grid: (rows, blocks of 256 columns).
extern "C" __global__ void __launch_bounds__(256)
    ph_moe_sum(const float* results, const float* shares, float* out, int used, int hidden, int shared) {
  const int column = blockIdx.y * 256 + threadIdx.x, row = blockIdx.x;
  if (column >= hidden) return;
  const float* share = shares + (i64)row * (used + shared);
  const i64 at = (i64)row * hidden + column;
  float sum = shared ? share[used] * out[at] : 0.0f;
  for (int slot = 0; slot < used; ++slot)
    sum = fmaf(share[slot], results[((i64)row * used + slot) * hidden + column], sum);
  out[at] = sum;
}

// inner [rows, size] = silu(first half of both [rows, 2 * size]) * second half. Grid: (rows, blocks of 256 columns).
extern "C" __global__ void __launch_bounds__(256) ph_moe_gate(const act_t* both, act_t* inner, int size) {
  const int column = blockIdx.y * 256 + threadIdx.x;
  if (column >= size) return;
  const i64 row = blockIdx.x;
  const float gate = ph_to_float(both[2 * row * size + column]), up = ph_to_float(both[(2 * row + 1) * size + column]);
  inner[row * size + column] = ph_to_act(gate / (1.0f + expf(-gate)) * up);
}
