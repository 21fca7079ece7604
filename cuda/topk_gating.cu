// SPDX-License-Identifier: Apache-2.0
// topk_gating on CUDA, forward; formulas and conventions in ../csrc/ops/topk_gating.h.
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

#include "../csrc/ops/routing_sums.h"
#include "block.cuh"
#include "host.h"
#include "launch.cuh"
#include "rows.cuh"
#include "topk_gating.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

using namespace gating;

constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxBlocks = 512;
static_assert(kMaxBlocks <= kFanIn * kFanIn);

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

struct Chosen {
  float logit;
  int expert;
};

// K rounds: the greatest key of the team, at its lowest expert, is written to `chosen` and becomes
// absent. Without a bias the key is the logit; with one it is (score, logit). Bit i of the result:
// this lane's item i was chosen.
template <typename Team, bool kBiased, int kItems = Team::kItems>
__device__ unsigned select_experts(int top_k, float (&logit)[kItems], float (&score)[kItems],
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

// The weights of the chosen experts of a row whose softmax is exp(x - peak) * inverse_sum.
// A lane seldom has more than one of them, so unrolling would only lengthen the code.
template <typename Team, typename scalar_t>
__device__ void write_chosen(const Forward<scalar_t>& f, int64_t token, const Chosen* chosen,
                             float peak, float inverse_sum, unsigned* counts) {
  if (f.norm_topk_prob) {  // softmax of the chosen logits alone, which never underflows as a whole
    peak = -INFINITY;
#pragma unroll 1
    for (int k = Team::lane(); k < f.top_k; k += Team::kLanes) peak = fmaxf(peak, chosen[k].logit);
    peak = finite_shift(team_reduce<Team::kLanes>(peak, Max{}));
    float sum = 0;
#pragma unroll 1
    for (int k = Team::lane(); k < f.top_k; k += Team::kLanes) {
      sum += std::exp(chosen[k].logit - peak);
    }
    inverse_sum = reciprocal_or_zero(team_reduce<Team::kLanes>(sum, Sum{}));
  }
  if (token >= f.tokens) return;
  const float scale = f.scaling_factor * inverse_sum;
#pragma unroll 1
  for (int k = Team::lane(); k < f.top_k; k += Team::kLanes) {
    const Chosen c = chosen[k];
    f.topk_weights[token * f.top_k + k] = std::exp(c.logit - peak) * scale;
    f.topk_indices[token * f.top_k + k] = c.expert;
    if (c.expert >= 0) atomicAdd(&counts[c.expert], 1u);
  }
}

// One row of sums per warp into `warp_sums` [kWarps, width] in shared memory, then one per block.
template <typename Team, typename scalar_t, int kItems = Team::kItems>
__device__ void write_block_sums(const Forward<scalar_t>& f, const float (&prob_sum)[kItems],
                                 const float (&load)[kItems], const float (&tail)[kTailSize],
                                 float* warp_sums) {
  const int width = f.sums_width();
  const int lane = threadIdx.x % kWarpSize;
  float* own = warp_sums + threadIdx.x / kWarpSize * width;
#pragma unroll
  for (int i = 0; i < kTailSize; ++i) {
    const float sum = team_reduce<kWarpSize>(tail[i], Sum{});
    if (lane == 0) own[i] = sum;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int e = Team::first_expert() + i;
    const bool writes = lane < Team::kLanes && e < f.experts;
    const float prob = sum_over_teams<Team::kLanes>(prob_sum[i]);
    if (writes) own[kTailSize + e] = prob;
    if (f.token_weights != nullptr) {
      const float weight = sum_over_teams<Team::kLanes>(load[i]);
      if (writes) own[kTailSize + f.experts + e] = weight;
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < width; column += kThreads) {
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp * width + column];
    f.block_sums[int64_t{blockIdx.x} * width + column] = sum;
  }
}

// kStats: lse and sums. kGeneral: an expert bias and float token weights are allowed for (and stats
// may be absent). Asking for 4 blocks per multiprocessor, which is 64 registers, keeps ptxas from
// spilling to fit a fifth; without statistics it needs fewer, and 512 experts take more.
template <typename scalar_t, typename Team, bool kStats, bool kGeneral>
__global__ void __launch_bounds__(kThreads, Team::kItems <= 8 && kStats ? 4 : 0)
    topk_gating_team_kernel(const Forward<scalar_t> f) {
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
      mine = select_experts<Team, true>(f.top_k, x, score, chosen);
    } else {
      mine = select_experts<Team, false>(f.top_k, x, score, chosen);
    }
    if constexpr (kGeneral) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) load[i] += mine >> i & 1 ? token_weight : 0.f;
    }
    __syncwarp();

    write_chosen<Team>(f, token, chosen, peak, inverse_sum, counts);
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
    write_block_sums<Team>(f, prob_sum, load, tail, reinterpret_cast<float*>(after_counts));
  }
  write_totals(f);
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

// The 4 in the launch bounds keeps ptxas from spilling here, too.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 4) topk_gating_block_kernel(const Forward<scalar_t> f) {
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

// ---- host --------------------------------------------------------------------------------------

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
        const auto kernel = general ? topk_gating_team_kernel<scalar_t, Team, true, true>
                            : arguments.stats
                                ? topk_gating_team_kernel<scalar_t, Team, true, false>
                                : topk_gating_team_kernel<scalar_t, Team, false, false>;
        launch(kernel, blocks, kThreads, shared_bytes, stream, f);
      });
      return;
    }
  }
  launch(topk_gating_block_kernel<scalar_t>, blocks, block_threads(f.experts), 0, stream, f);
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

}  // namespace equipoise
