// SPDX-License-Identifier: Apache-2.0
// topk_gating on CUDA: formulas and conventions in ../csrc/ops/topk_gating.h.
//
// Up to 512 experts a *team* of 1 to 32 neighbouring lanes takes a row: 16-byte loads, the row
// stays in registers as float32, softmax and the K rounds of arg-max are shuffles. A lane meets the
// same experts in every row, so it adds up their p in registers; a block writes one row of sums and
// the last blocks to arrive add those (sum_block_rows). More experts, and float64, take a block per
// row, which reads the row again for each step and keeps nothing of size E. The grid depends on the
// shape alone and floats are added in a fixed order: the same bits on every GPU.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../csrc/ops/topk_gating.h"
#include "block.cuh"
#include "host.h"
#include "launch.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxTeamExperts = 512;
constexpr int64_t kMaxBlocks = 512;
static_assert(kMaxBlocks <= kFanIn * kFanIn);

// What both directions know of a token; null where absent.
template <typename scalar_t>
struct Rows {
  using compute_t = compute_type<scalar_t>;
  const scalar_t* logits;
  int64_t row_stride;
  bool aligned;
  const bool* token_mask;
  const compute_t* token_weights;
  int64_t tokens;
  int experts, top_k;
  bool norm_topk_prob;
  compute_t scaling_factor;

  __device__ const scalar_t* row(int64_t token) const { return logits + token * row_stride; }

  // 0 for a masked token. A negative or NaN weight masks too, and is reported.
  __device__ compute_t weight(int64_t token, bool* invalid) const {
    if (token_mask != nullptr) return token_mask[token] ? 1 : 0;
    if (token_weights == nullptr) return 1;
    const compute_t weight = token_weights[token];
    *invalid = !(weight >= 0);
    return *invalid ? 0 : weight;
  }
};

// A block's sums, and their total: this tail, then prob_sum [E], then, if tokens have weights, load
// [E].
enum Tail { kWeight, kLseSquared, kEntropy, kNanRows, kInvalid, kTailSize };
static_assert(kTailSize == RoutingSums::kTail && kWeight == RoutingSums::weight(0) &&
              kLseSquared == RoutingSums::lse_squared(0) && kEntropy == RoutingSums::entropy(0) &&
              kNanRows == RoutingSums::nan_rows(0) && kInvalid == RoutingSums::invalid(0));

template <typename scalar_t>
struct Forward : Rows<scalar_t> {
  using compute_t = compute_type<scalar_t>;
  const compute_t* expert_bias;
  compute_t* topk_weights;
  int64_t* topk_indices;
  int64_t* tokens_per_expert;
  compute_t* lse;              // null without stats, as are the three parts of `sums`
  compute_t* prob_sum;         // [E]
  compute_t* load;             // [E]
  compute_t* sums_tail;        // [kTailSize]
  unsigned* tickets;           // [kTickets], zero if there are several blocks
  unsigned long long* counts;  // [E], likewise
  compute_t* block_sums;       // [blocks, sums_width()]

  __host__ __device__ int64_t sums_width() const {
    return sums_tail == nullptr
               ? 0
               : kTailSize + this->experts * (this->token_weights == nullptr ? 1 : 2);
  }
};

template <typename scalar_t>
struct Backward : Rows<scalar_t> {
  using compute_t = compute_type<scalar_t>;
  const int64_t* topk_indices;
  const compute_t* lse;
  const compute_t* grad_weights;
  const compute_t* grad_lse;
  const compute_t* grad_prob_sum;   // [E]; null without gradients of the sums, as is the tail
  const compute_t* grad_sums_tail;  // [kTailSize]
  scalar_t* grad_logits;
  int64_t grad_stride;
  bool grad_aligned;

  // Whether every p of a row is needed; a renormalised gate needs those of the chosen experts
  // alone.
  __device__ bool is_dense() const {
    return grad_lse != nullptr || grad_prob_sum != nullptr ||
           (grad_weights != nullptr && !this->norm_topk_prob);
  }
};

// A NaN is an absent expert, as -inf is; +inf becomes 1e18, whose square is finite.
template <typename compute_t>
__device__ compute_t clean(compute_t x) {
  if (x != x) return -INFINITY;
  return x == INFINITY ? compute_t(1e18) : x;
}

// What to subtract from logits of maximum `peak` before exp: absent ones (-inf) give 0 even if
// there is no other.
template <typename compute_t>
__device__ compute_t finite_shift(compute_t peak) {
  return peak > -INFINITY ? peak : compute_t(0);
}

template <typename compute_t>
__device__ compute_t reciprocal_or_zero(compute_t x) {
  return x > 0 ? 1 / x : compute_t(0);
}

// After the last row: the last block to arrive writes what belongs to no single token.
template <typename scalar_t>
__device__ void write_totals(const Forward<scalar_t>& f) {
  if (!sum_block_rows(f.block_sums, f.sums_width(), f.tickets)) return;
  const auto* total = f.block_sums;
  for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
    f.tokens_per_expert[e] = static_cast<int64_t>(f.counts[e]);
    if (f.sums_tail == nullptr) continue;
    f.prob_sum[e] = total[kTailSize + e];
    f.load[e] = f.token_weights == nullptr ? f.counts[e] : total[kTailSize + f.experts + e];
  }
  if (f.sums_tail != nullptr && threadIdx.x < kTailSize) {
    f.sums_tail[threadIdx.x] = total[threadIdx.x];
  }
}

// ---- up to 512 experts: a team of lanes per row ------------------------------------------------

// A team of kLanes lanes; each has kItems neighbouring experts.
template <int kLanes_, int kItems_>
struct Team {
  static constexpr int kLanes = kLanes_, kItems = kItems_, kExperts = kLanes * kItems;
  static constexpr int kTeams = kThreads / kLanes;  // per block
  static __device__ int number() { return threadIdx.x / kLanes; }
  static __device__ int lane() { return threadIdx.x % kLanes; }
  static __device__ int first_expert() { return lane() * kItems; }
};

struct Chosen {
  float logit;
  int expert;
};

template <int kItems, typename scalar_t>
__device__ void load_logits(const Rows<scalar_t>& r, int64_t token, int first_expert,
                            float (&x)[kItems]) {
  using Piece = Vector<scalar_t>;
  constexpr int kSize = 16 / sizeof(scalar_t);
  const scalar_t* from = r.row(token) + first_expert;
  const int count = r.experts - first_expert;
#pragma unroll
  for (int i = 0; i < kItems; i += kSize) {
    Piece piece;
    if (r.aligned && i + kSize <= count) {
      piece = *reinterpret_cast<const Piece*>(from + i);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        piece.values[j] = i + j < count ? from[i + j] : scalar_t(-INFINITY);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[i + j] = piece.values[j];
  }
}

// K rounds: the greatest key of the team, at its lowest expert, is written to `chosen` and becomes
// absent. Without a bias the key is the logit; with one it is (score, logit). Bit i of the result:
// this lane's item i was chosen.
template <typename Team, bool kBiased, int kItems = Team::kItems>
__device__ unsigned select(int top_k, float (&logit)[kItems], float (&score)[kItems],
                           Chosen* chosen) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned team_mask = (kFullMask >> (kWarpSize - Team::kLanes)) << (lane - Team::lane());
  unsigned mine = 0;
  for (int k = 0; k < top_k; ++k) {
    float best_score = -INFINITY, best_logit = -INFINITY;
    int best = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool better =
          kBiased ? score[i] > best_score || (score[i] == best_score && logit[i] > best_logit)
                  : logit[i] > best_logit;
      if (better) {
        best = i;
        best_logit = logit[i];
        if constexpr (kBiased) best_score = score[i];
      }
    }
    bool holds = true;
    if constexpr (kBiased) holds = best_score == team_reduce<Team::kLanes>(best_score, Max{});
    const float top = team_reduce<Team::kLanes>(holds ? best_logit : -INFINITY, Max{});
    holds = holds && best_logit == top;
    const unsigned holders = __ballot_sync(kFullMask, holds) & team_mask;
    const bool wins = holds && (holders & lanes_below(lane)) == 0;
    if (wins) chosen[k] = {top, top > -INFINITY ? Team::first_expert() + best : -1};
    if (wins && top > -INFINITY) mine |= 1u << best;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (wins && i == best) {
        logit[i] = -INFINITY;
        if constexpr (kBiased) score[i] = -INFINITY;
      }
    }
  }
  return mine;
}

// kStats: lse and sums. kGeneral: an expert bias and float token weights are allowed for (and stats
// may be absent).
template <typename scalar_t, typename Team, bool kStats, bool kGeneral>
__global__ void __launch_bounds__(kThreads) team_forward_kernel(const Forward<scalar_t> f) {
  constexpr int kLanes = Team::kLanes, kItems = Team::kItems;
  auto* counts = reinterpret_cast<unsigned*>(shared_memory);  // [kExperts]
  auto* after_counts = counts + Team::kExperts;
  auto* chosen = reinterpret_cast<Chosen*>(after_counts) + Team::number() * f.top_k;
  for (int e = threadIdx.x; e < Team::kExperts; e += kThreads) counts[e] = 0;
  __syncthreads();

  float prob_sum[kItems] = {}, load[kItems] = {}, tail[kTailSize] = {};
  const bool needs_softmax = kStats || !f.norm_topk_prob;
  for (int64_t first = blockIdx.x * int64_t{Team::kTeams}; first < f.tokens;
       first += gridDim.x * int64_t{Team::kTeams}) {
    // Every lane takes part in the shuffles: a token that is masked or past the end is a row of
    // absent experts.
    const int64_t token = first + Team::number();
    const bool exists = token < f.tokens;
    bool invalid = false, has_nan = false;
    const float token_weight = exists ? f.weight(token, &invalid) : 0.f;
    float x[kItems];
    float peak = -INFINITY;
    if (token_weight > 0) {
      load_logits(f, token, Team::first_expert(), x);
    } else {
#pragma unroll
      for (float& value : x) value = -INFINITY;
    }
#pragma unroll
    for (float& value : x) {
      has_nan |= value != value;
      value = clean(value);
      peak = fmaxf(peak, value);
    }
    peak = team_reduce<kLanes>(peak, Max{});
    const bool active = peak > -INFINITY;
    peak = finite_shift(peak);

    float inverse_sum = 0, score[kItems];
    if (needs_softmax) {
      float sum = 0, descent = 0;  // sum of exp(x - peak), and of that times (peak - x)
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        score[i] = std::exp(x[i] - peak);
        sum += score[i];
        if (kStats && score[i] > 0) descent += score[i] * (peak - x[i]);
      }
      sum = team_reduce<kLanes>(sum, Sum{});
      inverse_sum = reciprocal_or_zero(sum);
      if constexpr (kStats) {
        const float log_sum = active ? std::log(sum) : 0.f;
        const float lse = active ? peak + log_sum : 0.f;
        const float scale = active ? token_weight * inverse_sum : 0.f;
#pragma unroll
        for (int i = 0; i < kItems; ++i) prob_sum[i] += scale * score[i];
        tail[kEntropy] += scale * descent;
        // Once per row. The ballot is over the warp, the row's part of it is the team's.
        const unsigned nan_lanes = __ballot_sync(kFullMask, has_nan);
        const int team_begin = threadIdx.x % kWarpSize - Team::lane();
        if (Team::lane() == 0) {
          if (active) {
            tail[kWeight] += token_weight;
            tail[kLseSquared] += token_weight * lse * lse;
            tail[kEntropy] += token_weight * log_sum;
          }
          tail[kNanRows] += (nan_lanes >> team_begin & (kFullMask >> (kWarpSize - kLanes))) != 0;
          tail[kInvalid] += invalid;
          if (exists && f.lse != nullptr) f.lse[token] = lse;
        }
      }
    }
    unsigned mine;
    if (kGeneral && f.expert_bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int e = Team::first_expert() + i;
        const bool present = x[i] > -INFINITY;
        score[i] = present ? std::fma(score[i], inverse_sum, f.expert_bias[e]) : -INFINITY;
        if (score[i] != score[i]) score[i] = -INFINITY;
      }
      mine = select<Team, true>(f.top_k, x, score, chosen);
    } else {
      mine = select<Team, false>(f.top_k, x, score, chosen);
    }
    if constexpr (kGeneral) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) load[i] += mine >> i & 1 ? token_weight : 0.f;
    }
    __syncwarp();

    float offset = peak, scale = inverse_sum * f.scaling_factor;
    if (f.norm_topk_prob) {
      float sum = 0;
      offset = -INFINITY;
      for (int k = Team::lane(); k < f.top_k; k += kLanes) offset = fmaxf(offset, chosen[k].logit);
      offset = finite_shift(team_reduce<kLanes>(offset, Max{}));
      for (int k = Team::lane(); k < f.top_k; k += kLanes)
        sum += std::exp(chosen[k].logit - offset);
      sum = team_reduce<kLanes>(sum, Sum{});
      scale = reciprocal_or_zero(sum) * f.scaling_factor;
    }
    if (exists) {
      for (int k = Team::lane(); k < f.top_k; k += kLanes) {
        const Chosen c = chosen[k];
        f.topk_weights[token * f.top_k + k] = std::exp(c.logit - offset) * scale;
        f.topk_indices[token * f.top_k + k] = c.expert;
        if (c.expert >= 0) atomicAdd(&counts[c.expert], 1u);
      }
    }
    __syncwarp();  // `chosen` may be written again
  }

  __syncthreads();  // `chosen` is done with, the counts are complete
  for (int e = threadIdx.x; e < f.experts; e += kThreads) {
    if (gridDim.x == 1) {
      f.counts[e] = counts[e];
    } else if (counts[e] > 0) {
      atomicAdd(&f.counts[e], counts[e]);
    }
  }
  if (kStats && f.sums_tail != nullptr) {
    // One row of sums per warp in shared memory, then one per block.
    const int width = f.sums_width();
    const int lane = threadIdx.x % kWarpSize;
    auto* warp_sums = reinterpret_cast<float*>(after_counts);  // [kWarps, width]
    auto* own = warp_sums + threadIdx.x / kWarpSize * width;
#pragma unroll
    for (int i = 0; i < kTailSize; ++i) {
      tail[i] = team_reduce<kWarpSize>(tail[i], Sum{});
      if (lane == 0) own[i] = tail[i];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = Team::first_expert() + i;
      const bool writes = lane < kLanes && e < f.experts;
      prob_sum[i] = sum_over_teams<kLanes>(prob_sum[i]);
      if (writes) own[kTailSize + e] = prob_sum[i];
      if constexpr (kGeneral) {
        load[i] = sum_over_teams<kLanes>(load[i]);
        if (writes && f.token_weights != nullptr) own[kTailSize + f.experts + e] = load[i];
      }
    }
    __syncthreads();
    for (int column = threadIdx.x; column < width; column += kThreads) {
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp * width + column];
      f.block_sums[int64_t{blockIdx.x} * width + column] = sum;
    }
  }
  write_totals(f);
}

template <typename scalar_t, typename Team>
__global__ void __launch_bounds__(kThreads) team_backward_kernel(const Backward<scalar_t> b) {
  constexpr int kLanes = Team::kLanes, kItems = Team::kItems;
  using Piece = Vector<scalar_t>;
  constexpr int kSize = 16 / sizeof(scalar_t);
  // The gate gradient goes from the lane that has slot k to the lane that has its expert through a
  // row per team, which is zero wherever no slot of the current token writes.
  auto* gate_row = reinterpret_cast<float*>(shared_memory) + Team::number() * Team::kExperts;
  auto* gate_items = reinterpret_cast<Vector<float, 4>*>(gate_row + Team::first_expert());
#pragma unroll
  for (int i = 0; i < kItems / 4; ++i) gate_items[i] = {};
  __syncwarp();

  const bool dense = b.is_dense();
  float grad_prob[kItems] = {}, grad_lse_squared = 0, grad_entropy = 0;
  if (b.grad_prob_sum != nullptr) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = Team::first_expert() + i;
      if (e < b.experts) grad_prob[i] = b.grad_prob_sum[e];
    }
    grad_lse_squared = b.grad_sums_tail[kLseSquared];
    grad_entropy = b.grad_sums_tail[kEntropy];
  }
  for (int64_t first = blockIdx.x * int64_t{Team::kTeams}; first < b.tokens;
       first += gridDim.x * int64_t{Team::kTeams}) {
    const int64_t token = first + Team::number();
    const bool exists = token < b.tokens;
    bool invalid = false;
    const float token_weight = exists ? b.weight(token, &invalid) : 0.f;
    const bool active = token_weight > 0;
    float x[kItems];
    if (dense && active) {
      load_logits(b, token, Team::first_expert(), x);
    } else {
#pragma unroll
      for (float& value : x) value = -INFINITY;
    }
#pragma unroll
    for (float& value : x) value = clean(value);

    float lse = 0;
    if (dense && b.lse != nullptr) {
      lse = active ? b.lse[token] : 0.f;
    } else if (dense) {
      float peak = -INFINITY, sum = 0;
#pragma unroll
      for (const float value : x) peak = fmaxf(peak, value);
      peak = finite_shift(team_reduce<kLanes>(peak, Max{}));
#pragma unroll
      for (const float value : x) sum += std::exp(value - peak);
      sum = team_reduce<kLanes>(sum, Sum{});
      lse = sum > 0 ? peak + std::log(sum) : 0.f;
    }

    float gate[kItems] = {};
    if (b.grad_weights != nullptr) {
      const int64_t* experts = b.topk_indices + token * b.top_k;
      const float* grad = b.grad_weights + token * b.top_k;
      const int top_k = active ? b.top_k : 0;
      const auto is_chosen = [&](int k) { return experts[k] >= 0 && experts[k] < b.experts; };
      if (b.norm_topk_prob) {
        // The weights are c r with r the softmax of the chosen logits; dx = c r (g - sum g r).
        const auto logit = [&](int k) {
          return is_chosen(k) ? clean(static_cast<float>(b.row(token)[experts[k]])) : -INFINITY;
        };
        float peak = -INFINITY, sum = 0, dot = 0;
        for (int k = Team::lane(); k < top_k; k += kLanes) peak = fmaxf(peak, logit(k));
        peak = finite_shift(team_reduce<kLanes>(peak, Max{}));
        for (int k = Team::lane(); k < top_k; k += kLanes) {
          const float numerator = std::exp(logit(k) - peak);
          sum += numerator;
          dot += numerator * grad[k];
        }
        sum = team_reduce<kLanes>(sum, Sum{});
        dot = team_reduce<kLanes>(dot, Sum{});
        const float inverse_sum = reciprocal_or_zero(sum);
        for (int k = Team::lane(); k < top_k; k += kLanes) {
          const float r = std::exp(logit(k) - peak) * inverse_sum;
          if (is_chosen(k))
            gate_row[experts[k]] = b.scaling_factor * r * (grad[k] - dot * inverse_sum);
        }
      } else {
        // The weights are c p: a gradient of c g for p.
        for (int k = Team::lane(); k < top_k; k += kLanes) {
          if (is_chosen(k)) gate_row[experts[k]] = b.scaling_factor * grad[k];
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kItems / 4; ++i) {
        const auto items = gate_items[i];
        gate_items[i] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) gate[i * 4 + j] = items.values[j];
      }
      __syncwarp();
    }

    if (dense) {
      // dx = p (a - sum a p) + ... with a the gradient for p, of the sums and (without
      // renormalisation) of the gate.
      // A large lse was rounded: the exponentials of x - lse are divided by their sum, which is 1
      // but for that.
      float p[kItems], sum = 0, dot = 0, descent = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        p[i] = std::exp(x[i] - lse);
        sum += p[i];
        dot += p[i] * (token_weight * grad_prob[i] + (b.norm_topk_prob ? 0.f : gate[i]));
        if (p[i] > 0) descent += p[i] * (lse - x[i]);
      }
      sum = team_reduce<kLanes>(sum, Sum{});
      const float inverse_sum = reciprocal_or_zero(sum);
      const float log_sum = sum > 0 ? std::log(sum) : 0.f;
      dot = team_reduce<kLanes>(dot, Sum{}) * inverse_sum;
      const float entropy = team_reduce<kLanes>(descent, Sum{}) * inverse_sum + log_sum;
      const float grad_lse = b.grad_lse != nullptr && active ? b.grad_lse[token] : 0.f;
      const float common =
          grad_lse - dot + token_weight * (2 * grad_lse_squared * lse - grad_entropy * entropy);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float log_p = x[i] - lse - log_sum;
        const float for_p = token_weight * (grad_prob[i] - grad_entropy * log_p) + common;
        const float dx =
            p[i] > 0 ? p[i] * inverse_sum * (for_p + (b.norm_topk_prob ? 0.f : gate[i])) : 0.f;
        gate[i] = b.norm_topk_prob ? gate[i] + dx : dx;
      }
    }

    if (!exists) continue;
    scalar_t* to = b.grad_logits + token * b.grad_stride + Team::first_expert();
    const int count = b.experts - Team::first_expert();
#pragma unroll
    for (int i = 0; i < kItems; i += kSize) {
      Piece piece;
#pragma unroll
      for (int j = 0; j < kSize; ++j) piece.values[j] = static_cast<scalar_t>(gate[i + j]);
      if (b.grad_aligned && i + kSize <= count) {
        *reinterpret_cast<Piece*>(to + i) = piece;
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          if (i + j < count) to[i + j] = piece.values[j];
        }
      }
    }
  }
}

// ---- more experts, or float64: a block per row -------------------------------------------------

// Experts in the order of selection: by score, then logit, then the lowest.
template <typename compute_t>
struct Candidate {
  compute_t score, logit;
  int expert;

  __device__ static Candidate none() { return {-INFINITY, -INFINITY, -1}; }
  __device__ bool is_before(const Candidate& other) const {
    if (score != other.score) return score > other.score;
    if (logit != other.logit) return logit > other.logit;
    return expert < other.expert;
  }
};

struct First {
  template <typename compute_t>
  __device__ Candidate<compute_t> operator()(const Candidate<compute_t>& a,
                                             const Candidate<compute_t>& b) const {
    return b.is_before(a) ? b : a;
  }
};

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) block_forward_kernel(const Forward<scalar_t> f) {
  using compute_t = compute_type<scalar_t>;
  const int64_t width = f.sums_width();
  compute_t* block_sums = f.block_sums + blockIdx.x * width;  // unused without stats
  compute_t* prob_sum = block_sums + kTailSize;
  compute_t* load = prob_sum + f.experts;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) block_sums[i] = 0;
  if (gridDim.x == 1) {
    for (int e = threadIdx.x; e < f.experts; e += blockDim.x) f.counts[e] = 0;
  }
  __syncthreads();

  compute_t tail[kTailSize] = {};  // the same in every thread
  const bool stats = f.sums_tail != nullptr;
  const bool needs_softmax = stats || !f.norm_topk_prob || f.expert_bias != nullptr;
  for (int64_t token = blockIdx.x; token < f.tokens; token += gridDim.x) {
    const scalar_t* row = f.row(token);
    int64_t* indices = f.topk_indices + token * f.top_k;
    compute_t* weights = f.topk_weights + token * f.top_k;
    const auto logit = [&](int e) { return clean(static_cast<compute_t>(row[e])); };

    bool invalid = false, has_nan = false;
    const compute_t token_weight = f.weight(token, &invalid);
    compute_t peak = -INFINITY;
    if (token_weight > 0) {
      for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
        const auto x = static_cast<compute_t>(row[e]);
        has_nan |= x != x;
        peak = Max{}(peak, clean(x));
      }
    }
    peak = block_reduce(peak, Max{});
    tail[kNanRows] += __syncthreads_or(has_nan) != 0;
    tail[kInvalid] += invalid;
    const bool active = peak > -INFINITY;

    compute_t inverse_sum = 0, log_sum = 0;
    if (active && needs_softmax) {
      compute_t sum = 0, descent = 0;  // sum of exp(x - peak), and of that times (peak - x)
      for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
        const compute_t x = logit(e), numerator = std::exp(x - peak);
        sum += numerator;
        if (numerator > 0) descent += numerator * (peak - x);
      }
      sum = block_reduce(sum, Sum{});
      inverse_sum = 1 / sum;
      log_sum = std::log(sum);
      if (stats) {
        for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
          prob_sum[e] += token_weight * std::exp(logit(e) - peak) * inverse_sum;
        }
        descent = block_reduce(descent, Sum{});
        tail[kWeight] += token_weight;
        tail[kLseSquared] += token_weight * (peak + log_sum) * (peak + log_sum);
        tail[kEntropy] += token_weight * (log_sum + descent * inverse_sum);
      }
    }
    if (f.lse != nullptr && threadIdx.x == 0) f.lse[token] = active ? peak + log_sum : 0;

    // Each thread offers the first of its experts that comes after the last one chosen.
    const auto first_after = [&](const Candidate<compute_t>& last) {
      auto first = Candidate<compute_t>::none();
      for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
        Candidate<compute_t> candidate{0, logit(e), e};
        if (candidate.logit == -INFINITY) continue;
        candidate.score = candidate.logit;
        if (f.expert_bias != nullptr) {
          candidate.score =
              std::fma(std::exp(candidate.logit - peak), inverse_sum, f.expert_bias[e]);
          if (candidate.score != candidate.score) candidate.score = -INFINITY;
        }
        if (last.is_before(candidate) && (first.expert < 0 || candidate.is_before(first)))
          first = candidate;
      }
      return first;
    };
    int num_chosen = 0;
    compute_t chosen_peak = -INFINITY;
    if (active) {
      auto offered = first_after({INFINITY, INFINITY, -1});
      for (; num_chosen < f.top_k; ++num_chosen) {
        const auto winner = block_reduce(offered, First{});
        if (winner.logit == -INFINITY) break;
        chosen_peak = Max{}(chosen_peak, winner.logit);
        if (threadIdx.x == 0) {
          indices[num_chosen] = winner.expert;
          weights[num_chosen] = winner.logit;  // the weight once all are known
        }
        if (offered.expert == winner.expert) offered = first_after(winner);
      }
    }
    __syncthreads();

    compute_t offset = peak, scale = inverse_sum * f.scaling_factor;
    if (f.norm_topk_prob) {
      compute_t sum = 0;
      offset = chosen_peak;
      for (int k = threadIdx.x; k < num_chosen; k += blockDim.x)
        sum += std::exp(weights[k] - offset);
      scale = reciprocal_or_zero(block_reduce(sum, Sum{})) * f.scaling_factor;
    }
    for (int k = threadIdx.x; k < f.top_k; k += blockDim.x) {
      if (k < num_chosen) {
        weights[k] = std::exp(weights[k] - offset) * scale;
        atomicAdd(&f.counts[indices[k]], 1ull);
        if (stats && f.token_weights != nullptr)
          load[indices[k]] += token_weight;  // no other slot of this row
      } else {
        weights[k] = 0;
        indices[k] = -1;
      }
    }
    __syncthreads();  // before another thread adds to the same load
  }
  if (stats && threadIdx.x == 0) {
    for (int i = 0; i < kTailSize; ++i) block_sums[i] = tail[i];
  }
  write_totals(f);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) block_backward_kernel(const Backward<scalar_t> b) {
  using compute_t = compute_type<scalar_t>;
  const bool dense = b.is_dense();
  const bool has_grad_sums = b.grad_prob_sum != nullptr;
  const compute_t grad_lse_squared = has_grad_sums ? b.grad_sums_tail[kLseSquared] : 0;
  const compute_t grad_entropy = has_grad_sums ? b.grad_sums_tail[kEntropy] : 0;
  for (int64_t token = blockIdx.x; token < b.tokens; token += gridDim.x) {
    const scalar_t* row = b.row(token);
    scalar_t* to = b.grad_logits + token * b.grad_stride;
    const int64_t* experts = b.topk_indices + token * b.top_k;
    const compute_t* grad = b.grad_weights == nullptr ? nullptr : b.grad_weights + token * b.top_k;
    const int top_k = grad == nullptr ? 0 : b.top_k;
    const auto is_chosen = [&](int k) { return experts[k] >= 0 && experts[k] < b.experts; };
    const auto logit = [&](int64_t e) { return clean(static_cast<compute_t>(row[e])); };

    bool invalid = false;
    const compute_t token_weight = b.weight(token, &invalid);
    if (token_weight <= 0) {
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) to[e] = scalar_t(0);
      continue;
    }

    compute_t lse = 0;
    if (dense && b.lse != nullptr) {
      lse = b.lse[token];
    } else if (dense) {
      compute_t peak = -INFINITY, sum = 0;
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) peak = Max{}(peak, logit(e));
      peak = finite_shift(block_reduce(peak, Max{}));
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) sum += std::exp(logit(e) - peak);
      sum = block_reduce(sum, Sum{});
      lse = sum > 0 ? peak + std::log(sum) : compute_t(0);
    }

    // p is exp(x - lse) divided by its sum, as in team_backward_kernel.
    compute_t sum = 0, dot = 0, descent = 0;
    if (dense) {
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) {
        const compute_t x = logit(e), numerator = std::exp(x - lse);
        sum += numerator;
        if (has_grad_sums) dot += numerator * token_weight * b.grad_prob_sum[e];
        if (numerator > 0) descent += numerator * (lse - x);
      }
    }
    compute_t chosen_peak = -INFINITY, chosen_sum = 0, chosen_dot = 0;
    if (b.norm_topk_prob) {
      for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        if (is_chosen(k)) chosen_peak = Max{}(chosen_peak, logit(experts[k]));
      }
      chosen_peak = finite_shift(block_reduce(chosen_peak, Max{}));
      for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        if (!is_chosen(k)) continue;
        const compute_t numerator = std::exp(logit(experts[k]) - chosen_peak);
        chosen_sum += numerator;
        chosen_dot += numerator * grad[k];
      }
      chosen_sum = block_reduce(chosen_sum, Sum{});
      chosen_dot = block_reduce(chosen_dot, Sum{}) * reciprocal_or_zero(chosen_sum);
    } else {
      for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        if (is_chosen(k)) dot += b.scaling_factor * grad[k] * std::exp(logit(experts[k]) - lse);
      }
    }
    sum = block_reduce(sum, Sum{});
    const compute_t inverse_sum = reciprocal_or_zero(sum);
    const compute_t log_sum = sum > 0 ? std::log(sum) : compute_t(0);
    dot = block_reduce(dot, Sum{}) * inverse_sum;
    const compute_t entropy = block_reduce(descent, Sum{}) * inverse_sum + log_sum;
    const compute_t grad_lse = b.grad_lse == nullptr ? compute_t(0) : b.grad_lse[token];
    const compute_t common =
        grad_lse - dot + token_weight * (2 * grad_lse_squared * lse - grad_entropy * entropy);
    // What an expert gets whether it was chosen or not.
    const auto dense_gradient = [&](int64_t e) {
      if (!dense) return compute_t(0);
      const compute_t log_p = logit(e) - lse - log_sum, p = std::exp(logit(e) - lse) * inverse_sum;
      const compute_t a = has_grad_sums ? b.grad_prob_sum[e] : 0;
      return p > 0 ? p * (common + token_weight * (a - grad_entropy * log_p)) : compute_t(0);
    };

    for (int e = threadIdx.x; e < b.experts; e += blockDim.x) {
      to[e] = static_cast<scalar_t>(dense_gradient(e));
    }
    __syncthreads();  // the chosen ones are written again
    for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
      if (!is_chosen(k)) continue;
      const compute_t x = logit(experts[k]);
      const compute_t gate =
          b.norm_topk_prob
              ? std::exp(x - chosen_peak) * reciprocal_or_zero(chosen_sum) * (grad[k] - chosen_dot)
              : std::exp(x - lse) * inverse_sum * grad[k];
      to[experts[k]] = static_cast<scalar_t>(dense_gradient(experts[k]) + b.scaling_factor * gate);
    }
  }
}

// ---- host --------------------------------------------------------------------------------------

template <typename T>
const T* pointer_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

template <typename scalar_t, typename Arguments>
Rows<scalar_t> make_rows(const Arguments& arguments, int64_t top_k) {
  using compute_t = compute_type<scalar_t>;
  const auto& mask = arguments.token_mask;
  const bool is_bool = mask.has_value() && mask->scalar_type() == at::kBool;
  Rows<scalar_t> rows;
  rows.logits = arguments.logits.template const_data_ptr<scalar_t>();
  rows.row_stride = arguments.logits.stride(0);
  rows.aligned = has_aligned_rows(arguments.logits);
  rows.token_mask = is_bool ? mask->template const_data_ptr<bool>() : nullptr;
  rows.token_weights = is_bool ? nullptr : pointer_or_null<compute_t>(mask);
  rows.tokens = arguments.logits.size(0);
  rows.experts = static_cast<int>(arguments.logits.size(1));
  rows.top_k = static_cast<int>(top_k);
  rows.norm_topk_prob = arguments.norm_topk_prob;
  rows.scaling_factor = static_cast<compute_t>(arguments.scaling_factor);
  return rows;
}

// float64 is there for gradient checks and does not get kernels of its own for few experts.
template <typename scalar_t>
bool fits_team(const Rows<scalar_t>& rows) {
  return !std::is_same_v<scalar_t, double> && rows.experts <= kMaxTeamExperts;
}

template <typename Function>
void with_team(int experts, const Function& function) {
  if (experts <= 8) {
    function(Team<1, 8>{});
  } else if (experts <= 32) {
    function(Team<4, 8>{});
  } else if (experts <= 64) {
    function(Team<8, 8>{});
  } else if (experts <= 128) {
    function(Team<16, 8>{});
  } else if (experts <= 256) {
    function(Team<32, 8>{});
  } else {
    function(Team<32, 16>{});
  }
}

int block_threads(int experts) {
  return std::clamp(experts / kWarpSize / 4 * kWarpSize, kWarpSize, kThreads);
}

template <typename scalar_t>
void forward(const TopKGatingArguments& arguments, const TopKGatingOutputs& outputs) {
  using compute_t = compute_type<scalar_t>;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  Forward<scalar_t> f{make_rows<scalar_t>(arguments, arguments.top_k)};
  f.expert_bias = pointer_or_null<compute_t>(arguments.expert_bias);
  f.topk_weights = outputs.topk_weights.mutable_data_ptr<compute_t>();
  f.topk_indices = outputs.topk_indices.mutable_data_ptr<int64_t>();
  f.tokens_per_expert = outputs.tokens_per_expert.mutable_data_ptr<int64_t>();
  if (arguments.stats) {
    auto* sums = outputs.sums.mutable_data_ptr<compute_t>();
    f.lse = outputs.lse.mutable_data_ptr<compute_t>();
    f.prob_sum = sums + RoutingSums::prob;
    f.load = sums + RoutingSums::load(f.experts);
    f.sums_tail = sums + RoutingSums::weight(f.experts);
  }

  // The grid is a function of the shape alone. In a block per row the sums of a block are read and
  // written in memory: they are kept below kMaxSums numbers together.
  constexpr int64_t kMaxSums = 1 << 21;
  int64_t blocks = std::clamp<int64_t>(kMaxSums / f.experts, 64, kMaxBlocks);
  blocks = std::min(blocks, f.tokens);
  if (fits_team(f)) {
    with_team(f.experts,
              [&](auto team) { blocks = std::min(ceil_div(f.tokens, team.kTeams), kMaxBlocks); });
  }

  const int64_t tickets_bytes = 16 * ceil_div(kTickets * sizeof(unsigned), 16);
  const int64_t counts_bytes = f.experts * sizeof(unsigned long long);
  const int64_t sums_bytes = blocks * f.sums_width() * sizeof(compute_t);
  const auto workspace = at::empty({tickets_bytes + counts_bytes + sums_bytes},
                                   arguments.logits.options().dtype(at::kByte));
  auto* memory = workspace.mutable_data_ptr<uint8_t>();
  f.tickets = reinterpret_cast<unsigned*>(memory);
  f.counts = reinterpret_cast<unsigned long long*>(memory + tickets_bytes);
  f.block_sums = reinterpret_cast<compute_t*>(memory + tickets_bytes + counts_bytes);
  if (blocks > 1) C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, tickets_bytes + counts_bytes, stream));

  if constexpr (!std::is_same_v<scalar_t, double>) {
    if (fits_team(f)) {
      with_team(f.experts, [&](auto team) {
        using Team = decltype(team);
        const int64_t chosen_bytes = Team::kTeams * f.top_k * sizeof(Chosen);
        const int64_t warp_sums_bytes = kWarps * f.sums_width() * sizeof(float);
        const int64_t shared_bytes =
            Team::kExperts * sizeof(unsigned) + std::max(chosen_bytes, warp_sums_bytes);
        const bool general = f.expert_bias != nullptr || f.token_weights != nullptr;
        const auto kernel = general           ? team_forward_kernel<scalar_t, Team, true, true>
                            : arguments.stats ? team_forward_kernel<scalar_t, Team, true, false>
                                              : team_forward_kernel<scalar_t, Team, false, false>;
        launch(kernel, blocks, kThreads, shared_bytes, stream, f);
      });
      return;
    }
  }
  launch(block_forward_kernel<scalar_t>, blocks, block_threads(f.experts), 0, stream, f);
}

template <typename scalar_t>
void backward(const TopKGatingBackwardArguments& arguments, const at::Tensor& grad_logits) {
  using compute_t = compute_type<scalar_t>;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  Backward<scalar_t> b{make_rows<scalar_t>(arguments, arguments.topk_indices.size(1))};
  b.topk_indices = arguments.topk_indices.const_data_ptr<int64_t>();
  b.lse = pointer_or_null<compute_t>(arguments.lse);
  b.grad_weights = pointer_or_null<compute_t>(arguments.grad_weights);
  b.grad_lse = pointer_or_null<compute_t>(arguments.grad_lse);
  if (arguments.grad_sums.has_value()) {
    const auto* sums = arguments.grad_sums->const_data_ptr<compute_t>();
    b.grad_prob_sum = sums + RoutingSums::prob;
    b.grad_sums_tail = sums + RoutingSums::weight(b.experts);
  }
  b.grad_logits = grad_logits.mutable_data_ptr<scalar_t>();
  b.grad_stride = grad_logits.stride(0);
  b.grad_aligned = has_aligned_rows(grad_logits);

  constexpr int64_t kMaxBackwardBlocks = 2048;
  if constexpr (!std::is_same_v<scalar_t, double>) {
    if (fits_team(b)) {
      with_team(b.experts, [&](auto team) {
        using Team = decltype(team);
        const int64_t blocks = std::min(ceil_div(b.tokens, Team::kTeams), kMaxBackwardBlocks);
        const int64_t gate_bytes = Team::kTeams * Team::kExperts * sizeof(float);
        launch(team_backward_kernel<scalar_t, Team>, blocks, kThreads, gate_bytes, stream, b);
      });
      return;
    }
  }
  const int64_t blocks = std::min(b.tokens, kMaxBackwardBlocks);
  launch(block_backward_kernel<scalar_t>, blocks, block_threads(b.experts), 0, stream, b);
}

}  // namespace

void topk_gating_cuda(const TopKGatingArguments& arguments, const TopKGatingOutputs& outputs) {
  const c10::cuda::CUDAGuard guard(arguments.logits.device());
  if (arguments.logits.size(0) == 0) {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    for (const auto& totals : {outputs.tokens_per_expert, outputs.sums}) {
      C10_CUDA_CHECK(cudaMemsetAsync(totals.mutable_data_ptr(), 0, totals.nbytes(), stream));
    }
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, arguments.logits.scalar_type(),
                                  "topk_gating_cuda",
                                  [&] { forward<scalar_t>(arguments, outputs); });
}

void topk_gating_backward_cuda(const TopKGatingBackwardArguments& arguments,
                               const at::Tensor& grad_logits) {
  if (grad_logits.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(grad_logits.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad_logits.scalar_type(),
                                  "topk_gating_backward_cuda",
                                  [&] { backward<scalar_t>(arguments, grad_logits); });
}

}  // namespace equipoise
