// SPDX-License-Identifier: Apache-2.0
// Rows of at most 16 experts, softmax without bias, groups or noise (Mixtral's router): 16 tokens
// at a time, each in a lane of its own, so that no step crosses lanes. For topk_gating.cpp.
#pragma once

#include <cstdint>

#include "../ops/routing_sums.h"
#include "row_chunks.h"
#include "scores.h"
#include "topk_gating.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kNarrow = 16;
constexpr int64_t kLanes = 16;

/// One number of each of 16 tokens.
template <typename T>
struct alignas(64) Lanes {
  T of[kLanes];

  Vectorized<T> load(int64_t lane) const { return Vectorized<T>::loadu(of + lane); }
  void store(int64_t lane, Vectorized<T> value) { value.store(of + lane); }
  T sum() const {
    T sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += of[lane];
    return sum;
  }
};

/// What 16 tokens add up to: of all lanes, in the end.
template <typename T>
struct NarrowSums {
  Lanes<T> prob[kNarrow], weight, lse_squared, entropy, nan_rows;
};

/// The best top_k of each lane of the vector at `lane`, best first: logits and experts (as numbers
/// of type T).
template <typename T>
void choose_in_lanes(const Lanes<T>* x, int64_t lane, int64_t num_experts, int64_t top_k,
                     Lanes<T>* best, Lanes<T>* experts) {
  using Vec = Vectorized<T>;
  for (int64_t k = 0; k < top_k; ++k) {
    best[k].store(lane, Vec(kNegativeInfinity<T>));
    experts[k].store(lane, Vec(T(-1)));
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    Vec value = x[e].load(lane), expert(static_cast<T>(e));
    Vec before(0);  // all bits set where the list is already shifted
    for (int64_t k = 0; k < top_k; ++k) {
      const Vec other = best[k].load(lane), other_expert = experts[k].load(lane);
      before = before | (value > other);
      best[k].store(lane, at::vec::maximum(value, other));
      experts[k].store(lane, Vec::blendv(other_expert, expert, before));
      expert = Vec::blendv(expert, other_expert, before);
      value = at::vec::minimum(value, other);
    }
  }
}

/// Tokens [begin, end), as topk_gating_rows.
template <typename scalar_t>
void narrow_rows(const TopKGatingRows<scalar_t>& rows, int64_t begin, int64_t end,
                 const TopKGatingTotals<compute_t<scalar_t>>& totals) {
  using T = compute_t<scalar_t>;
  using Vec = Vectorized<T>;
  const int64_t num_experts = rows.num_experts, top_k = rows.top_k;
  const bool stats = rows.lse != nullptr, need_exps = stats || !rows.norm_topk_prob;
  Lanes<T> x[kNarrow], exps[kNarrow], best[kNarrow], experts[kNarrow], token_weights, lse;
  NarrowSums<T> sums{};
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t size = end - first < kLanes ? end - first : kLanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const bool exists = lane < size;
      const bool weighted = exists && rows.token_weights != nullptr;
      token_weights.of[lane] = weighted ? rows.token_weights[first + lane] : T(exists);
      const scalar_t* const row = rows.logits + (first + (exists ? lane : 0)) * rows.row_stride;
      for (int64_t e = 0; e < num_experts; ++e) x[e].of[lane] = static_cast<T>(row[e]);
    }
    for (int64_t lane = 0; lane < kLanes; lane += Vec::size()) {
      const Vec weight = token_weights.load(lane), absent(kNegativeInfinity<T>);
      const Vec masked = weight <= Vec(0);
      Vec peak = absent, is_nan(0);
      for (int64_t e = 0; e < num_experts; ++e) {
        const Vec logit = Vec::blendv(x[e].load(lane), absent, masked);
        const Vec nan = logit.isnan();
        is_nan = is_nan | nan;
        const Vec value = at::vec::clamp_max(Vec::blendv(logit, absent, nan),
                                             Vec(static_cast<T>(kInfinityCounts)));
        x[e].store(lane, value);
        peak = at::vec::maximum(peak, value);
      }
      // A token without a present expert takes no part: weight 0, and a peak that -inf can be
      // subtracted from.
      const Vec idle = peak == absent;
      const Vec active_weight = Vec::blendv(weight, Vec(0), idle);
      peak = Vec::blendv(peak, Vec(0), idle);
      token_weights.store(lane, active_weight);
      Vec total(1);
      if (need_exps) {
        Vec spread(0);
        total = Vec(0);
        for (int64_t e = 0; e < num_experts; ++e) {
          const Vec distance = at::vec::clamp_min(x[e].load(lane) - peak, Vec(T(-1000)));
          const Vec value = exponential(distance);
          exps[e].store(lane, value);
          total = total + value;
          spread = spread - value * distance;
        }
        total = Vec::blendv(total, Vec(1), idle);
        if (stats) {
          const Vec share = active_weight / total, log_total = total.log();
          const Vec row_lse = Vec::blendv(peak + log_total, Vec(0), idle);
          const auto add = [&](Lanes<T>& to, Vec value) { to.store(lane, to.load(lane) + value); };
          lse.store(lane, row_lse);
          for (int64_t e = 0; e < num_experts; ++e) add(sums.prob[e], share * exps[e].load(lane));
          add(sums.weight, active_weight);
          add(sums.lse_squared, active_weight * row_lse * row_lse);
          add(sums.entropy, active_weight * (log_total + spread / total));
          add(sums.nan_rows, Vec::blendv(Vec(0), Vec(1), is_nan));
        }
      }
      choose_in_lanes(x, lane, num_experts, top_k, best, experts);
      Vec chosen_total(0);
      for (int64_t k = 0; k < top_k; ++k) {
        const Vec distance = at::vec::clamp_min(best[k].load(lane) - peak, Vec(T(-1000)));
        const Vec value = exponential(distance);
        best[k].store(lane, value);
        chosen_total = chosen_total + value;
      }
      const Vec divisor = rows.norm_topk_prob ? Vec::blendv(chosen_total, Vec(1), idle) : total;
      const Vec scale = Vec::blendv(Vec(rows.scaling_factor) / divisor, Vec(0), idle);
      for (int64_t k = 0; k < top_k; ++k) best[k].store(lane, best[k].load(lane) * scale);
    }

    for (int64_t lane = 0; lane < size; ++lane) {
      int64_t* const indices = rows.topk_indices + (first + lane) * top_k;
      T* const weights = rows.topk_weights + (first + lane) * top_k;
      for (int64_t k = 0; k < top_k; ++k) {
        const auto expert = static_cast<int64_t>(experts[k].of[lane]);
        indices[k] = expert;
        weights[k] = expert >= 0 ? best[k].of[lane] : T(0);
        if (expert < 0) continue;
        totals.counts[expert] += 1;
        if (stats && rows.token_weights != nullptr)
          totals.sums[RoutingSums::load(num_experts) + expert] += token_weights.of[lane];
      }
      if (stats) rows.lse[first + lane] = lse.of[lane];
    }
  }
  if (!stats) return;
  for (int64_t e = 0; e < num_experts; ++e) {
    totals.sums[RoutingSums::prob + e] += sums.prob[e].sum();
    if (rows.token_weights == nullptr)
      totals.sums[RoutingSums::load(num_experts) + e] = static_cast<T>(totals.counts[e]);
  }
  totals.sums[RoutingSums::weight(num_experts)] += sums.weight.sum();
  totals.sums[RoutingSums::lse_squared(num_experts)] += sums.lse_squared.sum();
  totals.sums[RoutingSums::entropy(num_experts)] += sums.entropy.sum();
  totals.sums[RoutingSums::nan_rows(num_experts)] += sums.nan_rows.sum();
}

}  // namespace
}  // namespace equipoise::cpu::CPU_CAPABILITY
