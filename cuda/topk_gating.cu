// SPDX-License-Identifier: Apache-2.0
// topk_gating on CUDA, forward; formulas and conventions in ../csrc/ops/topk_gating.h.
//
// Up to 512 experts a *team* of 1 to 32 neighbouring lanes takes a row: 16-byte loads, the row
// stays in registers as float32, softmax and the K rounds of arg-max are shuffles. A lane meets the
// same experts in every row, so it adds up their p in registers; a block writes one row of sums and
// the last blocks to arrive add those (sum_block_rows). More experts, and float64, take a block per
// row, which reads the row again for each step and keeps nothing of size E. The grid depends on the
// shape alone and floats are added in a fixed order: the same bits on every GPU.
//
// With segments a block takes neighbouring rows instead of rows a grid apart, and one row of sums
// per segment that it meets (Passes). What else is optional stands behind kGeneral.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>

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
constexpr int64_t kSectorBytes = 32;  // of memory, which is moved as a whole
constexpr int64_t kMaxBlocks = 512;
static_assert(kMaxBlocks <= kFanIn * kFanIn);

// NaN, too, becomes the lowest number.
template <typename compute_t>
__device__ compute_t at_least_lowest(compute_t x) {
  constexpr compute_t kLowest = std::numeric_limits<compute_t>::lowest();
  return x >= kLowest ? x : kLowest;
}

template <typename scalar_t>
struct Forward : Rows<scalar_t> {
  using compute_t = compute_type<scalar_t>;
  const compute_t* expert_bias;
  int num_groups, group_size, group_topk;
  GroupScore group_score;
  const int64_t* forced_indices;
  compute_t* topk_weights;
  int64_t* topk_indices;
  int64_t* tokens_per_expert;
  compute_t* lse;              // null without stats, as are the sums
  compute_t* sums;             // [S, RoutingSums::width(E)]
  unsigned* tickets;           // [kTickets], zero if there are several blocks or segments
  unsigned long long* counts;  // [S, E], likewise
  compute_t* block_sums;       // [blocks, S, sums_width()]
  bool* written;               // [S, blocks], zero: which of them there are; null without segments
  compute_t* groups;           // [blocks, 2, num_groups], for a block per row
  int64_t block_rows;          // of a block, neighbours; 0: a grid apart
  int chosen_stride;           // of a team, in `chosen`

  // A row of block_sums has the columns of RoutingSums, without the load if that is the count, and
  // then zeros up to a whole sector.
  __host__ __device__ int64_t tail_column() const {
    return this->experts * (this->token_weights == nullptr ? 1 : 2);
  }
  __host__ __device__ int64_t sums_width() const {
    constexpr int64_t kSector = kSectorBytes / sizeof(compute_t);
    return sums == nullptr ? 0 : (tail_column() + kTailSize + kSector - 1) / kSector * kSector;
  }

  // Of this block and a segment, in `written`.
  __device__ bool& written_here(int64_t segment) const {
    return written[segment * gridDim.x + blockIdx.x];
  }
  __device__ bool was_written(int64_t segment) const {
    return written != nullptr && written_here(segment);
  }

  // Whether experts are selected by key(), else by their logits.
  __host__ __device__ bool has_keys() const { return expert_bias != nullptr || num_groups > 1; }

  // What a present expert is selected by, never -inf. The score of the softmax is p = numerator *
  // inverse_sum; others do not read these.
  __device__ compute_t key(int expert, compute_t x, compute_t numerator,
                           compute_t inverse_sum) const {
    const compute_t bias = expert_bias == nullptr ? 0 : expert_bias[expert];
    const compute_t key = this->score_function == ScoreFunction::kSoftmax
                              ? std::fma(numerator, inverse_sum, bias)
                              : score(this->score_function, x) + bias;
    return at_least_lowest(key);
  }

  // The weight of a chosen expert, but for a factor of the row.
  __device__ compute_t weight_of(compute_t x, compute_t shift) const {
    if (this->norm_topk_prob) return std::exp(log_score(this->score_function, x) - shift);
    if (this->score_function == ScoreFunction::kSoftmax) return std::exp(x - shift);
    return score(this->score_function, x);
  }

  // The expert that is forced into a slot and its logit; none (and a bad one is reported) where it
  // is no expert, is absent, or stands in an earlier slot too.
  struct Forced {
    compute_t logit;
    int expert;
    bool invalid;
  };
  __device__ Forced forced(int64_t token, int slot, bool active) const {
    const int64_t* experts = forced_indices + token * this->top_k;
    const int64_t expert = experts[slot];
    bool invalid = expert < -1 || expert >= this->experts;
    for (int k = 0; k < slot; ++k) invalid |= expert >= 0 && experts[k] == expert;
    if (!active || invalid || expert < 0) return {-INFINITY, -1, invalid};
    const auto x = clean(this->template logit<true>(token, expert));
    return {x, x > -INFINITY ? static_cast<int>(expert) : -1, false};
  }
};

// After the last row: the last block to arrive writes what belongs to no single token. What an
// instance of the kernel never has is left out of its code, which would need more registers.
template <bool kStats, bool kSegments, typename scalar_t>
__device__ void write_totals(const Forward<scalar_t>& f) {
  const auto sums_of = [&](int64_t segment) {
    return f.sums + segment * RoutingSums::width(f.experts);
  };
  const int64_t tail = f.tail_column();
  const auto finish = [&](int64_t segment, int64_t column, auto sum) {
    if (column >= tail + kTailSize) return;
    const int64_t left_out = column < tail ? 0 : RoutingSums::weight(f.experts) - tail;
    sums_of(segment)[column + left_out] = sum;
  };
  if (!sum_block_rows(f.block_sums, kStats ? f.sums_width() : 0, f.tickets, finish,
                      kSegments ? f.written : nullptr, f.segments)) {
    return;
  }
  for (int64_t i = threadIdx.x; i < f.segments * f.experts; i += blockDim.x) {
    const auto count = f.counts[i];
    f.tokens_per_expert[i] = static_cast<int64_t>(count);
    if (!kStats || f.sums == nullptr || f.token_weights != nullptr) continue;
    const int64_t segment = f.segment_ids == nullptr ? 0 : i / f.experts;
    const int64_t e = i - segment * f.experts;
    sums_of(segment)[RoutingSums::load(f.experts) + e] = count;
  }
}

// ---- segments ----------------------------------------------------------------------------------

struct Min {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// The passes of a block over its rows, of which it takes kAtOnce at once. Without segments there is
// one; with them each is over rows of one segment: the block looks at the ids of kThreads rows at a
// time and makes a pass for each id that it finds, from the lowest to the highest. So if ids never
// decrease, the rows of a segment are met one after the other.
template <typename scalar_t, int64_t kAtOnce>
struct Passes {
  static constexpr int kNone = INT_MAX;  // no row
  const Forward<scalar_t>& f;
  int* ids;  // [kThreads], shared
  int64_t begin;
  int segment = -1;  // of this pass

  __device__ Passes(const Forward<scalar_t>& forward, int* shared) : f(forward), ids(shared) {
    begin = blockIdx.x * (has_segments() ? f.block_rows : kAtOnce);
    if (!has_segments()) return;
    begin -= kThreads;
    ids[threadIdx.x] = kNone;
  }

  __device__ bool has_segments() const { return f.segment_ids != nullptr; }
  __device__ int64_t last() const {
    return Min{}((int64_t{blockIdx.x} + 1) * f.block_rows, f.tokens);
  }
  __device__ int64_t end() const {
    return has_segments() ? Min{}(begin + kThreads, last()) : f.tokens;
  }
  __device__ int64_t step() const { return has_segments() ? kAtOnce : gridDim.x * kAtOnce; }

  // Whether there is another pass; for all threads of the block.
  __device__ bool next() {
    if (!has_segments()) return ++segment == 0;
    for (;;) {
      const int own = ids[threadIdx.x];
      const int above = block_reduce(own > segment ? own : kNone, Min{});
      if (above != kNone) {
        segment = above;
        return true;
      }
      begin += kThreads;
      if (begin >= last()) return false;
      const int64_t token = begin + threadIdx.x;
      ids[threadIdx.x] = token < end() ? static_cast<int>(f.segment(token)) : kNone;
      segment = -1;
    }
  }

  __device__ bool has(int64_t token) const {
    return token < end() && (!has_segments() || ids[token - begin] == segment);
  }
};

// ---- groups of experts -------------------------------------------------------------------------

// The two greatest keys of some experts, and what they make the group's score.
template <typename compute_t>
struct BestTwo {
  compute_t first, second;

  static __device__ BestTwo none() { return {-INFINITY, -INFINITY}; }
  __device__ void add(compute_t key) {
    if (key > first) {
      second = first;
      first = key;
    } else if (key > second) {
      second = key;
    }
  }
  __device__ compute_t score(GroupScore kind) const {
    if (kind == GroupScore::kMax || second == -INFINITY) return first;
    return at_least_lowest(first + second);
  }
};

struct MergeBestTwo {
  template <typename compute_t>
  __device__ BestTwo<compute_t> operator()(BestTwo<compute_t> a,
                                           const BestTwo<compute_t>& b) const {
    a.add(b.first);
    a.add(b.second);
    return a;
  }
};

// Whether the group is among the best, ties to the lower; never without a present expert.
template <typename compute_t>
__device__ bool is_kept(const compute_t* scores, int group, int num_groups, int group_topk) {
  const compute_t own = scores[group];
  int better = 0;
#pragma unroll 1
  for (int g = 0; g < num_groups; ++g) {
    better += scores[g] > own || (scores[g] == own && g < group);
  }
  return own > -INFINITY && better < group_topk;
}

// ---- up to 512 experts: a team of lanes per row ------------------------------------------------

struct Chosen {
  float logit;
  int expert;
};

// Makes the experts of all groups but the best absent. A lane scores the groups that begin among
// its experts; of a group that began before it hands its two best to the lane that has the begin.
// `memory` is for kLanes BestTwo and a score per group, shared by the team.
template <typename Team, typename scalar_t, int kItems = Team::kItems>
__device__ void keep_best_groups(const Forward<scalar_t>& f, float (&logit)[kItems],
                                 float (&key)[kItems], Chosen* memory) {
  auto* continued = reinterpret_cast<BestTwo<float>*>(memory);
  auto* scores = reinterpret_cast<float*>(continued + Team::kLanes);
  const int first = Team::first_expert();
  int group = first / f.group_size, place = first % f.group_size;  // of the next expert
  bool begins = place == 0;  // whether that group begins among this lane's experts
  auto best = BestTwo<float>::none();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    best.add(key[i]);
    if (++place < f.group_size) continue;
    if (!begins) {
      continued[Team::lane()] = best;
    } else if (group < f.num_groups) {
      scores[group] = best.score(f.group_score);
    }
    best = BestTwo<float>::none();
    begins = true;
    place = 0;
    ++group;
  }
  if (place > 0 && !begins) continued[Team::lane()] = best;
  __syncwarp();
  if (place > 0 && begins && group < f.num_groups) {
    int lane = Team::lane();
#pragma unroll 1
    for (; place < f.group_size; place += kItems) best = MergeBestTwo{}(best, continued[++lane]);
    scores[group] = best.score(f.group_score);
  }
  __syncwarp();

  unsigned kept = 0;  // bit i: item i
#pragma unroll 1
  for (int i = 0; i < kItems && first + i < f.experts;) {
    group = (first + i) / f.group_size;
    const int end = min((group + 1) * f.group_size - first, kItems);
    if (is_kept(scores, group, f.num_groups, f.group_topk))
      kept |= lanes_below(end) - lanes_below(i);
    i = end;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!(kept >> i & 1)) logit[i] = key[i] = -INFINITY;
  }
  __syncwarp();  // `memory` may be written again
}

// Takes the experts that are given; returns how many of this lane's slots were bad.
template <typename Team, typename scalar_t>
__device__ int force_experts(const Forward<scalar_t>& f, int64_t token, bool exists, bool active,
                             Chosen* chosen) {
  int invalid = 0;
#pragma unroll 1
  for (int k = Team::lane(); k < f.top_k; k += Team::kLanes) {
    chosen[k] = {-INFINITY, -1};
    if (!exists) continue;
    const auto forced = f.forced(token, k, active);
    chosen[k] = {forced.logit, forced.expert};
    invalid += forced.invalid;
  }
  return invalid;
}

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
template <typename Team, bool kGeneral, typename scalar_t>
__device__ void write_chosen(const Forward<scalar_t>& f, int64_t token, bool exists,
                             const Chosen* chosen, float peak, float inverse_sum,
                             unsigned* counts) {
  const auto weight = [&](float logit) {
    return kGeneral ? f.weight_of(logit, peak) : std::exp(logit - peak);
  };
  if (f.norm_topk_prob) {  // softmax of the chosen y alone, which never underflows as a whole
    peak = -INFINITY;
#pragma unroll 1
    for (int k = Team::lane(); k < f.top_k; k += Team::kLanes) peak = fmaxf(peak, chosen[k].logit);
    peak = finite_shift(team_reduce<Team::kLanes>(peak, Max{}));
    if constexpr (kGeneral) peak = log_score(f.score_function, peak);
    float sum = 0;
#pragma unroll 1
    for (int k = Team::lane(); k < f.top_k; k += Team::kLanes) sum += weight(chosen[k].logit);
    inverse_sum = reciprocal_or_zero(team_reduce<Team::kLanes>(sum, Sum{}));
  } else if (kGeneral && f.score_function != ScoreFunction::kSoftmax) {
    inverse_sum = 1;
  }
  if (!exists) return;
  const float scale = f.scaling_factor * inverse_sum;
#pragma unroll 1
  for (int k = Team::lane(); k < f.top_k; k += Team::kLanes) {
    const Chosen c = chosen[k];
    const bool is_chosen = !kGeneral || c.expert >= 0;  // identity: -inf is no weight
    f.topk_weights[token * f.top_k + k] = is_chosen ? weight(c.logit) * scale : 0.f;
    f.topk_indices[token * f.top_k + k] = c.expert;
    if (c.expert >= 0) atomicAdd(&counts[c.expert], 1u);
  }
}

// One row of sums per warp into `warp_sums` [kWarps, width] in shared memory, then one per block
// and segment, to which later passes over the segment add.
template <typename Team, bool kGeneral, typename scalar_t, int kItems = Team::kItems>
__device__ void write_block_sums(const Forward<scalar_t>& f, int64_t segment,
                                 const float (&prob_sum)[kItems], const float (&load)[kItems],
                                 const float (&tail)[kTailSize], float* warp_sums) {
  const int width = f.sums_width(), tail_column = f.tail_column();
  const int lane = threadIdx.x % kWarpSize;
  float* own = warp_sums + threadIdx.x / kWarpSize * width;
#pragma unroll
  for (int i = 0; i < kTailSize; ++i) {
    const float sum = team_reduce<kWarpSize>(tail[i], Sum{});
    if (lane == 0) own[tail_column + i] = sum;
  }
  const int after_tail = tail_column + kTailSize;
  if (lane < width - after_tail) own[after_tail + lane] = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int e = Team::first_expert() + i;
    const bool writes = lane < Team::kLanes && e < f.experts;
    const float prob = sum_over_teams<Team::kLanes>(prob_sum[i]);
    if (writes) own[RoutingSums::prob + e] = prob;
    if (f.token_weights != nullptr) {
      const float weight = sum_over_teams<Team::kLanes>(load[i]);
      if (writes) own[RoutingSums::load(f.experts) + e] = weight;
    }
  }
  bool adds = false;
  int64_t part = blockIdx.x;
  if constexpr (kGeneral) {
    part = part * f.segments + segment;
    adds = __syncthreads_or(threadIdx.x == 0 && f.was_written(segment));
  } else {
    __syncthreads();
  }
  for (int column = threadIdx.x; column < width; column += kThreads) {
    float* to = f.block_sums + part * width + column;
    float sum = adds ? *to : 0.f;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp * width + column];
    *to = sum;
  }
  if (kGeneral && f.written != nullptr && threadIdx.x == 0) f.written_here(segment) = true;
}

// Blocks per multiprocessor to ask for; 0: as ptxas likes. It would spill to fit one more than
// these 4 (64 registers) and 2 (128 registers).
constexpr int team_blocks(int items, bool stats, bool general) {
  if (general || (items > 8 && stats)) return 2;
  return items > 8 || stats ? 4 : 0;
}

// kStats: lse and sums. kGeneral: all that is optional is allowed for (and stats may be absent).
template <typename scalar_t, typename Team, bool kStats, bool kGeneral>
__global__ void __launch_bounds__(kThreads, team_blocks(Team::kItems, kStats, kGeneral))
    topk_gating_team_kernel(const Forward<scalar_t> f) {
  constexpr int kLanes = Team::kLanes, kItems = Team::kItems;
  auto* counts = reinterpret_cast<unsigned*>(shared_memory);  // [kExperts]
  auto* after_counts = counts + Team::kExperts;
  auto* chosen = reinterpret_cast<Chosen*>(after_counts) + Team::number() * f.chosen_stride;
  for (int e = threadIdx.x; e < Team::kExperts; e += kThreads) counts[e] = 0;
  __syncthreads();

  float prob_sum[kItems] = {}, load[kItems] = {}, tail[kTailSize] = {};
  const bool stats = kGeneral ? f.sums != nullptr : kStats;
  const bool has_keys = kGeneral && f.has_keys();
  const bool has_plain_scores = !kGeneral || f.has_plain_scores();
  const bool needs_softmax = stats || (kGeneral ? f.score_function == ScoreFunction::kSoftmax &&
                                                      (!f.norm_topk_prob || has_keys)
                                                : !f.norm_topk_prob);

  // The row of this lane's team. Every lane takes part in the shuffles: a token that is masked or
  // does not exist is a row of absent experts.
  const auto take_row = [&](int64_t token, bool exists) {
    bool invalid = false, has_nan = false;
    const float token_weight = exists ? f.template weight<kGeneral>(token, &invalid) : 0.f;
    float x[kItems];
    float peak = -INFINITY;
    if (token_weight > 0) {
      load_logits<kGeneral>(f, token, Team::first_expert(), x);
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

    float inverse_sum = 0, numerator[kItems];
    if (needs_softmax) {
      const float shift = has_plain_scores ? peak : log_score(f.score_function, peak);
      float sum = 0, descent = 0;  // sum of exp(y - shift), and of that times (shift - y)
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float y = has_plain_scores ? x[i] : log_score(f.score_function, x[i]);
        numerator[i] = std::exp(y - shift);
        sum += numerator[i];
        if (kStats && numerator[i] > 0) descent += numerator[i] * (shift - y);
      }
      sum = team_reduce<kLanes>(sum, Sum{});
      inverse_sum = reciprocal_or_zero(sum);
      if (kStats && stats) {
        const float log_sum = active ? std::log(sum) : 0.f;
        const float scale = active ? token_weight * inverse_sum : 0.f;
        float lse = peak + log_sum;
        if (!has_plain_scores) {  // lse is that of x
          float sum_of_x = 0;
#pragma unroll
          for (const float value : x) sum_of_x += std::exp(value - peak);
          sum_of_x = team_reduce<kLanes>(sum_of_x, Sum{});
          lse = peak + std::log(sum_of_x);
        }
        if (!active) lse = 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) prob_sum[i] += scale * numerator[i];
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
    unsigned mine = 0;
    if (kGeneral && f.forced_indices != nullptr) {
      tail[kInvalid] += force_experts<Team>(f, token, exists, active, chosen);
    } else if (has_keys) {
      float key[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        key[i] = x[i] > -INFINITY ? f.key(Team::first_expert() + i, x[i], numerator[i], inverse_sum)
                                  : -INFINITY;
      }
      if (f.num_groups > 1) keep_best_groups<Team>(f, x, key, chosen);
      mine = select_experts<Team, true>(f.top_k, x, key, chosen);
    } else {
      mine = select_experts<Team, false>(f.top_k, x, numerator, chosen);
    }
    __syncwarp();

    if (kGeneral && f.forced_indices != nullptr && f.token_weights != nullptr) {
#pragma unroll 1
      for (int k = 0; k < f.top_k; ++k) {
        const int item = chosen[k].expert - Team::first_expert();
        if (item >= 0 && item < kItems) mine |= 1u << item;
      }
    }
    if constexpr (kGeneral) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) load[i] += mine >> i & 1 ? token_weight : 0.f;
    }
    write_chosen<Team, kGeneral>(f, token, exists, chosen, peak, inverse_sum, counts);
    __syncwarp();  // `chosen` may be written again
  };

  // What the rows since the last call have in common.
  const auto flush = [&](int64_t segment) {
    __syncthreads();  // `chosen` is done with, the counts are complete
    for (int e = threadIdx.x; e < f.experts; e += kThreads) {
      if (gridDim.x == 1 && f.block_rows == 0) {
        f.counts[e] = counts[e];
      } else if (counts[e] > 0) {
        atomicAdd(&f.counts[segment * f.experts + e], counts[e]);
      }
    }
    if (kStats && stats) {
      write_block_sums<Team, kGeneral>(f, segment, prob_sum, load, tail,
                                       reinterpret_cast<float*>(after_counts));
    }
    if constexpr (kGeneral) {  // for the next segment
      for (int e = threadIdx.x; e < f.experts; e += kThreads) counts[e] = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) prob_sum[i] = load[i] = 0;
#pragma unroll
      for (float& value : tail) value = 0;
      __syncthreads();
    }
  };

  if constexpr (kGeneral) {
    __shared__ int ids[kThreads];
    Passes<scalar_t, Team::kTeams> passes(f, ids);
    for (int segment = -1;;) {  // of the rows since the last flush
      const bool more = passes.next();
      if (segment >= 0 && !(more && passes.segment == segment)) flush(segment);
      if (!more) break;
      segment = passes.segment;
      for (int64_t first = passes.begin; first < passes.end(); first += passes.step()) {
        const int64_t token = first + Team::number();
        const bool exists = passes.has(token);
        if (__any_sync(kFullMask, exists)) take_row(token, exists);
      }
    }
  } else {
    for (int64_t first = blockIdx.x * int64_t{Team::kTeams}; first < f.tokens;
         first += gridDim.x * int64_t{Team::kTeams}) {
      const int64_t token = first + Team::number();
      take_row(token, token < f.tokens);
    }
    flush(0);
  }
  write_totals<kStats, kGeneral>(f);
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

// Marks the groups that are kept in the second half of `groups` [2, num_groups]; key(e) is the key
// of an expert. A warp takes a group.
template <typename scalar_t, typename Key, typename compute_t = compute_type<scalar_t>>
__device__ void keep_best_groups(const Forward<scalar_t>& f, const Key& key, compute_t* groups) {
  const int lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  for (int group = threadIdx.x / kWarpSize; group < f.num_groups; group += warps) {
    auto best = BestTwo<compute_t>::none();
    for (int i = lane; i < f.group_size; i += kWarpSize) best.add(key(group * f.group_size + i));
    best = team_reduce<kWarpSize>(best, MergeBestTwo{});
    if (lane == 0) groups[group] = best.score(f.group_score);
  }
  __syncthreads();
  for (int group = threadIdx.x; group < f.num_groups; group += blockDim.x) {
    groups[f.num_groups + group] = is_kept(groups, group, f.num_groups, f.group_topk);
  }
  __syncthreads();
}

// Asking for 2 blocks per multiprocessor keeps ptxas from spilling, here, too.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 2) topk_gating_block_kernel(const Forward<scalar_t> f) {
  using compute_t = compute_type<scalar_t>;
  const int64_t width = f.sums_width();
  if (gridDim.x == 1 && f.block_rows == 0) {
    for (int e = threadIdx.x; e < f.experts; e += blockDim.x) f.counts[e] = 0;
    __syncthreads();
  }

  const bool stats = f.sums != nullptr, has_keys = f.has_keys();
  const bool has_plain_scores = f.has_plain_scores();
  const bool needs_softmax =
      stats || (f.score_function == ScoreFunction::kSoftmax && (!f.norm_topk_prob || has_keys));
  compute_t* groups = f.groups + blockIdx.x * int64_t{2} * f.num_groups;

  // The sums of a segment are added up in memory, but for its tail, the same in every thread.
  compute_t tail[kTailSize] = {};
  int64_t segment = -1;
  compute_t* block_sums = nullptr;  // of this segment
  const auto write_tail = [&] {
    if (stats && segment >= 0 && threadIdx.x == 0) {
      for (int i = 0; i < kTailSize; ++i) block_sums[f.tail_column() + i] += tail[i];
    }
  };
  const auto begin_segment = [&](int64_t next) {
    write_tail();
    segment = next;
    if (!stats) return;
    for (compute_t& value : tail) value = 0;
    const int64_t part = blockIdx.x * f.segments + segment;
    block_sums = f.block_sums + part * width;
    if (__syncthreads_or(threadIdx.x == 0 && f.was_written(segment))) return;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) block_sums[i] = 0;
    if (f.written != nullptr && threadIdx.x == 0) f.written_here(segment) = true;
    __syncthreads();
  };

  const bool neighbours = f.block_rows > 0;
  const int64_t end = neighbours ? Min{}((blockIdx.x + 1) * f.block_rows, f.tokens) : f.tokens;
  for (int64_t token = neighbours ? blockIdx.x * f.block_rows : blockIdx.x; token < end;
       token += neighbours ? 1 : gridDim.x) {
    const int64_t own_segment = f.segment(token);
    if (own_segment != segment) begin_segment(own_segment);
    int64_t* indices = f.topk_indices + token * f.top_k;
    compute_t* weights = f.topk_weights + token * f.top_k;
    const auto logit = [&](int64_t e) { return clean(f.template logit<true>(token, e)); };
    const auto log_score_of = [&](int64_t e) { return log_score(f.score_function, logit(e)); };

    bool invalid = false, has_nan = false;
    const compute_t token_weight = f.template weight<true>(token, &invalid);
    compute_t peak = -INFINITY;
    if (token_weight > 0) {
      for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
        const auto x = f.template logit<true>(token, e);
        has_nan |= x != x;
        peak = Max{}(peak, clean(x));
      }
    }
    peak = block_reduce(peak, Max{});
    tail[kNanRows] += __syncthreads_or(has_nan) != 0;
    tail[kInvalid] += invalid;
    const bool active = peak > -INFINITY;

    compute_t inverse_sum = 0, lse = 0;
    if (active && needs_softmax) {
      const compute_t shift = log_score(f.score_function, peak);
      compute_t sum = 0, descent = 0;  // sum of exp(y - shift), and of that times (shift - y)
      for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
        const compute_t y = log_score_of(e), numerator = std::exp(y - shift);
        sum += numerator;
        if (numerator > 0) descent += numerator * (shift - y);
      }
      sum = block_reduce(sum, Sum{});
      inverse_sum = 1 / sum;
      if (stats) {
        const compute_t log_sum = std::log(sum);
        lse = peak + log_sum;
        if (!has_plain_scores) {  // lse is that of x
          compute_t sum_of_x = 0;
          for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
            sum_of_x += std::exp(logit(e) - peak);
          }
          lse = peak + std::log(block_reduce(sum_of_x, Sum{}));
        }
        compute_t* prob_sum = block_sums + RoutingSums::prob;
        for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
          prob_sum[e] += token_weight * std::exp(log_score_of(e) - shift) * inverse_sum;
        }
        descent = block_reduce(descent, Sum{});
        tail[kWeight] += token_weight;
        tail[kLseSquared] += token_weight * lse * lse;
        tail[kEntropy] += token_weight * (log_sum + descent * inverse_sum);
      }
    }
    if (f.lse != nullptr && threadIdx.x == 0) f.lse[token] = lse;

    const auto key = [&](int e) {
      const compute_t x = logit(e);
      if (!has_keys || x == -INFINITY) return x;
      const bool is_softmax = f.score_function == ScoreFunction::kSoftmax;
      return f.key(e, x, is_softmax ? std::exp(x - peak) : compute_t(0), inverse_sum);
    };
    if (f.forced_indices != nullptr) {
      int num_invalid = 0;
      for (int k = threadIdx.x; k < f.top_k; k += blockDim.x) {
        const auto forced = f.forced(token, k, active);
        indices[k] = forced.expert;
        weights[k] = forced.logit;  // the weight once all are known
        num_invalid += forced.invalid;
      }
      tail[kInvalid] += block_reduce(num_invalid, Sum{});
    } else {
      for (int k = threadIdx.x; k < f.top_k; k += blockDim.x) {
        indices[k] = -1;
        weights[k] = -INFINITY;
      }
      __syncthreads();  // thread 0 writes those that are chosen
      if (active && f.num_groups > 1) keep_best_groups(f, key, groups);
      // Each thread offers the first of its experts that comes after the last one chosen.
      const auto first_after = [&](const Candidate<compute_t>& last) {
        auto first = Candidate<compute_t>::none();
        for (int e = threadIdx.x; e < f.experts; e += blockDim.x) {
          if (f.num_groups > 1 && groups[f.num_groups + e / f.group_size] == 0) continue;
          const Candidate<compute_t> candidate{key(e), logit(e), e};
          if (candidate.logit == -INFINITY) continue;
          if (last.is_before(candidate) && (first.expert < 0 || candidate.is_before(first)))
            first = candidate;
        }
        return first;
      };
      auto offered = Candidate<compute_t>::none();
      if (active) offered = first_after({INFINITY, INFINITY, -1});
      for (int k = 0; k < f.top_k; ++k) {
        const auto winner = block_reduce(offered, First{});
        if (winner.logit == -INFINITY) break;
        if (threadIdx.x == 0) {
          indices[k] = winner.expert;
          weights[k] = winner.logit;
        }
        if (offered.expert == winner.expert) offered = first_after(winner);
      }
    }
    __syncthreads();

    compute_t shift = peak, scale = f.scaling_factor;
    if (f.norm_topk_prob) {
      shift = -INFINITY;
      for (int k = threadIdx.x; k < f.top_k; k += blockDim.x) shift = Max{}(shift, weights[k]);
      shift = log_score(f.score_function, finite_shift(block_reduce(shift, Max{})));
      compute_t sum = 0;
      for (int k = threadIdx.x; k < f.top_k; k += blockDim.x) sum += f.weight_of(weights[k], shift);
      scale *= reciprocal_or_zero(block_reduce(sum, Sum{}));
    } else if (f.score_function == ScoreFunction::kSoftmax) {
      scale *= inverse_sum;
    }
    for (int k = threadIdx.x; k < f.top_k; k += blockDim.x) {
      if (indices[k] < 0) {
        weights[k] = 0;
        continue;
      }
      weights[k] = f.weight_of(weights[k], shift) * scale;
      atomicAdd(&f.counts[segment * f.experts + indices[k]], 1ull);
      if (stats && f.token_weights != nullptr) {  // no other slot of this row
        block_sums[RoutingSums::load(f.experts) + indices[k]] += token_weight;
      }
    }
    __syncthreads();  // before another thread adds to the same load
  }
  write_tail();
  write_totals<true, true>(f);
}

// ---- host --------------------------------------------------------------------------------------

template <typename scalar_t>
void forward(const TopKGatingArguments& arguments, const TopKGatingOutputs& outputs) {
  using compute_t = compute_type<scalar_t>;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  Forward<scalar_t> f{make_rows<scalar_t>(arguments, arguments.top_k)};
  f.forced_indices = pointer_or_null<int64_t>(arguments.forced_indices);
  const bool selects = f.forced_indices == nullptr;
  f.expert_bias = selects ? pointer_or_null<compute_t>(arguments.expert_bias) : nullptr;
  f.num_groups = selects ? static_cast<int>(arguments.num_groups) : 1;
  f.group_size = f.experts / f.num_groups;
  f.group_topk = static_cast<int>(arguments.group_topk);
  f.group_score = arguments.group_score;
  f.topk_weights = outputs.topk_weights.mutable_data_ptr<compute_t>();
  f.topk_indices = outputs.topk_indices.mutable_data_ptr<int64_t>();
  f.tokens_per_expert = outputs.tokens_per_expert.mutable_data_ptr<int64_t>();
  if (arguments.stats) {
    f.lse = outputs.lse.mutable_data_ptr<compute_t>();
    f.sums = outputs.sums.mutable_data_ptr<compute_t>();
  }

  // The grid is a function of the shape alone. In a block per row the sums of a block are read and
  // written in memory: they are kept below kMaxSums numbers together.
  constexpr int64_t kMaxSums = 1 << 21;
  int64_t rows_at_once = 1;
  int64_t blocks = std::clamp<int64_t>(kMaxSums / f.experts, 64, kMaxBlocks);
  blocks = std::min(blocks, f.tokens);
  if (fits_team(f)) {
    with_team(f.experts, [&](auto team) { rows_at_once = team.kTeams; });
    blocks = std::min(ceil_div(f.tokens, rows_at_once), kMaxBlocks);
  }
  if (f.segment_ids != nullptr) {
    // Sums of all segments in all blocks; those that no row asks for are not touched.
    constexpr int64_t kMaxSegmentSums = 1 << 24;
    const int64_t most = kMaxSegmentSums / std::max<int64_t>(f.segments * f.sums_width(), 1);
    blocks = std::clamp<int64_t>(most, 1, blocks);
    f.block_rows = rows_at_once * ceil_div(f.tokens, blocks * rows_at_once);
    blocks = ceil_div(f.tokens, f.block_rows);
  }

  const auto whole_sectors = [](int64_t bytes) {
    return kSectorBytes * ceil_div(bytes, kSectorBytes);
  };
  const int64_t tickets_bytes = whole_sectors(kTickets * sizeof(unsigned));
  const int64_t counts_bytes = whole_sectors(f.segments * f.experts * sizeof(unsigned long long));
  const bool has_parts = f.segment_ids != nullptr && arguments.stats;
  const int64_t written_bytes = has_parts ? whole_sectors(blocks * f.segments) : 0;
  const int64_t zero_bytes = tickets_bytes + counts_bytes + written_bytes;
  const int64_t sums_bytes =
      whole_sectors(blocks * f.segments * f.sums_width() * sizeof(compute_t));
  const int64_t groups_bytes =
      fits_team(f) || f.num_groups == 1 ? 0 : blocks * 2 * f.num_groups * sizeof(compute_t);
  const auto workspace =
      arguments.logits.new_empty({zero_bytes + sums_bytes + groups_bytes}, at::kByte);
  auto* memory = workspace.mutable_data_ptr<uint8_t>();
  f.tickets = reinterpret_cast<unsigned*>(memory);
  f.counts = reinterpret_cast<unsigned long long*>(memory + tickets_bytes);
  if (has_parts) f.written = reinterpret_cast<bool*>(memory + tickets_bytes + counts_bytes);
  f.block_sums = reinterpret_cast<compute_t*>(memory + zero_bytes);
  f.groups = reinterpret_cast<compute_t*>(memory + zero_bytes + sums_bytes);
  if (blocks > 1 || f.segment_ids != nullptr) {
    C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, zero_bytes, stream));
  }

  if constexpr (!std::is_same_v<scalar_t, double>) {
    if (fits_team(f)) {
      with_team(f.experts, [&](auto team) {
        using Team = decltype(team);
        // What keep_best_groups has in the place of the chosen: kLanes BestTwo, a score per group.
        static_assert(sizeof(BestTwo<float>) == sizeof(Chosen));
        f.chosen_stride = f.top_k;
        if (f.num_groups > 1) {
          f.chosen_stride = std::max(f.top_k, Team::kLanes + (f.num_groups + 1) / 2);
        }
        const int64_t chosen_bytes = Team::kTeams * f.chosen_stride * sizeof(Chosen);
        const int64_t warp_sums_bytes = kWarps * f.sums_width() * sizeof(float);
        const int64_t shared_bytes =
            Team::kExperts * sizeof(unsigned) + std::max(chosen_bytes, warp_sums_bytes);
        const bool general = is_general(f) || f.has_keys() || f.forced_indices != nullptr ||
                             f.token_weights != nullptr;
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
  const c10::DeviceGuard guard(arguments.logits.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, arguments.logits.scalar_type(),
                                  "topk_gating_cuda",
                                  [&] { forward<scalar_t>(arguments, outputs); });
}

}  // namespace equipoise
