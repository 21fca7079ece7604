// SPDX-License-Identifier: Apache-2.0
// The losses that are functions of the sums of topk_gating: the value of each and its slope, once
// for the CPU and for CUDA. Formulas and sources are in balance_loss.h. All arithmetic is float64:
// there are few experts, and what is almost balanced cancels.
//
// `sum(n, f)` adds up f(0) to f(n - 1) in a fixed order, `each(n, f)` calls them and returns when
// all are done: serially on the CPU, by the threads of a block on CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "routing_sums.h"

#ifdef __CUDACC__
#define EQUIPOISE_DEVICE __device__
#else
#define EQUIPOISE_DEVICE
#endif

namespace equipoise {

/// The losses by number, as the kernels see them. A negative one gives 0 with zero gradient.
enum class BalanceLossKind : int64_t {
  kSwitch,
  kZ,
  kDevice,
  kImportance,
  kImportanceOfProbs,
  kUniformKl,
  kEntropy,
  kVariance,
  kMutualInformation,
  kTokenEntropy,
};

/// The sums of one segment. `scalar_t` is their type, float or double.
template <typename scalar_t>
struct SegmentSums {
  const scalar_t* sums;            // [2 E + 5], see RoutingSums
  const scalar_t* gate_sums;       // [E] of all segments, or null without an importance of gates
  const scalar_t* expert_weights;  // [E], or null: all 1
  int64_t experts;
  int64_t devices;
  double top_k;
  bool unbiased;

  EQUIPOISE_DEVICE double num_tokens() const { return sums[RoutingSums::weight(experts)]; }
  /// P_e.
  EQUIPOISE_DEVICE double prob(int64_t e) const {
    return sums[RoutingSums::prob + e] / num_tokens();
  }
  /// log(E P_e), finite for an expert that has no probability at all: its gradient must live.
  EQUIPOISE_DEVICE double log_prob(int64_t e) const {
    constexpr double smallest = std::numeric_limits<scalar_t>::min();
    const double p = prob(e);
    return std::log(experts * (p > smallest ? p : smallest));
  }
  /// d log(E P_e) / d P_e.
  EQUIPOISE_DEVICE double log_prob_slope(int64_t e) const {
    constexpr double smallest = std::numeric_limits<scalar_t>::min();
    const double p = prob(e);
    return 1 / (p > smallest ? p : smallest);
  }
  /// E f_e, times the weight of the expert.
  EQUIPOISE_DEVICE double share(int64_t e) const {
    const double weight = expert_weights == nullptr ? 1.0 : expert_weights[e];
    return weight * experts * sums[RoutingSums::load(experts) + e] / (top_k * num_tokens());
  }
  EQUIPOISE_DEVICE int64_t experts_per_device() const { return experts / devices; }
  /// f'_i: the mean over the experts of device i of E f_e.
  EQUIPOISE_DEVICE double device_share(int64_t device) const {
    const int64_t count = experts_per_device(), first = device * count;
    double load = 0;
    for (int64_t e = first; e < first + count; ++e) load += sums[RoutingSums::load(experts) + e];
    return devices * load / (top_k * num_tokens());
  }
};

/// Mean and variance of E numbers.
struct Spread {
  double mean;
  double variance;
  double degrees;  // E, or E - 1: what the sum of squares was divided by
};

template <typename scalar_t, typename Sum>
EQUIPOISE_DEVICE Spread spread_of(const scalar_t* values, int64_t count, bool unbiased,
                                  const Sum& sum) {
  const double mean = sum(count, [&](int64_t e) -> double { return values[e]; }) / count;
  const double degrees = static_cast<double>(unbiased ? count - 1 : count);
  const double squares =
      sum(count, [&](int64_t e) -> double { return (values[e] - mean) * (values[e] - mean); });
  return {mean, squares / degrees, degrees};
}

/// Means over all tokens, which say nothing of the balance between the experts.
EQUIPOISE_DEVICE inline bool is_token_mean(BalanceLossKind kind) {
  return kind == BalanceLossKind::kZ || kind == BalanceLossKind::kTokenEntropy;
}

/// Over all segments.
struct SegmentTotals {
  double used;  // segments that have tokens
  double num_tokens;
};

/// `first` is the sums of the first of `segments`, which lie one after the other.
template <typename scalar_t, typename Sum>
EQUIPOISE_DEVICE SegmentTotals segment_totals(const SegmentSums<scalar_t>& first, int64_t segments,
                                              const Sum& sum) {
  const scalar_t* num_tokens = first.sums + RoutingSums::weight(first.experts);
  const int64_t width = RoutingSums::width(first.experts);
  return {sum(segments, [&](int64_t s) { return num_tokens[s * width] > 0 ? 1.0 : 0.0; }),
          sum(segments, [&](int64_t s) -> double { return num_tokens[s * width]; })};
}

/// What part of the loss is the value on segment `index`: the mean over the segments that have
/// tokens, over all tokens for a mean over tokens. Gates are not kept by segment.
template <typename scalar_t>
EQUIPOISE_DEVICE double part_of_loss(BalanceLossKind kind, int64_t index,
                                     const SegmentSums<scalar_t>& s, const SegmentTotals& totals) {
  if (kind == BalanceLossKind::kImportance) return index == 0 ? 1 : 0;
  if (!(s.num_tokens() > 0)) return 0;
  return is_token_mean(kind) ? s.num_tokens() / totals.num_tokens : 1 / totals.used;
}

/// Whether the loss is 0 whatever the sums say: without tokens, and where it compares the experts
/// and there is but one.
template <typename scalar_t>
EQUIPOISE_DEVICE bool is_zero(BalanceLossKind kind, const SegmentSums<scalar_t>& s) {
  if (static_cast<int64_t>(kind) < 0 || (s.experts == 1 && !is_token_mean(kind))) return true;
  return kind != BalanceLossKind::kImportance && !(s.num_tokens() > 0);
}

/// The value of a loss on one segment.
template <typename scalar_t, typename Sum>
EQUIPOISE_DEVICE double loss_value(BalanceLossKind kind, const SegmentSums<scalar_t>& s,
                                   const Sum& sum) {
  if (is_zero(kind, s)) return 0;
  const int64_t experts = s.experts;
  switch (kind) {
    case BalanceLossKind::kSwitch:
      return sum(experts, [&](int64_t e) { return s.share(e) * s.prob(e); });
    case BalanceLossKind::kZ:
      return s.sums[RoutingSums::lse_squared(experts)] / s.num_tokens();
    case BalanceLossKind::kDevice:
      return sum(s.devices, [&](int64_t device) {
        const int64_t count = s.experts_per_device(), first = device * count;
        double prob = 0;
        for (int64_t e = first; e < first + count; ++e) prob += s.prob(e);
        return s.device_share(device) * prob;
      });
    case BalanceLossKind::kImportance:
    case BalanceLossKind::kImportanceOfProbs: {
      const bool of_gates = kind == BalanceLossKind::kImportance;
      const Spread spread =
          spread_of(of_gates ? s.gate_sums : s.sums + RoutingSums::prob, experts, s.unbiased, sum);
      return spread.mean == 0 ? 0.0 : spread.variance / (spread.mean * spread.mean);
    }
    case BalanceLossKind::kUniformKl:
      return -sum(experts, [&](int64_t e) { return s.log_prob(e); }) / experts;
    case BalanceLossKind::kEntropy:
    case BalanceLossKind::kMutualInformation: {
      const double entropy = sum(experts, [&](int64_t e) { return s.prob(e) * s.log_prob(e); });
      if (kind == BalanceLossKind::kEntropy) return entropy;
      return entropy - std::log(static_cast<double>(experts)) +
             s.sums[RoutingSums::entropy(experts)] / s.num_tokens();
    }
    case BalanceLossKind::kVariance:
      return spread_of(s.sums + RoutingSums::prob, experts, true, sum).variance /
             (s.num_tokens() * s.num_tokens());
    case BalanceLossKind::kTokenEntropy:
      return s.sums[RoutingSums::entropy(experts)] / s.num_tokens();
  }
  return 0;
}

/// Adds `grad` times the slope of a loss on one segment to grad_sums [2 E + 5] and, for the
/// importance of gates, to grad_gate_sums [E]. The load and the number of tokens are constants.
template <typename scalar_t, typename Sum, typename Each>
EQUIPOISE_DEVICE void add_loss_gradient(BalanceLossKind kind, const SegmentSums<scalar_t>& s,
                                        double grad, const Sum& sum, const Each& each,
                                        scalar_t* grad_sums, scalar_t* grad_gate_sums) {
  if (is_zero(kind, s)) return;
  const int64_t experts = s.experts;
  const double per_token = grad / s.num_tokens();
  const auto add = [&](scalar_t* to, double value) { *to += static_cast<scalar_t>(value); };
  switch (kind) {
    case BalanceLossKind::kSwitch:
      each(experts, [&](int64_t e) { add(&grad_sums[e], per_token * s.share(e)); });
      break;
    case BalanceLossKind::kZ:
      each(1, [&](int64_t) { add(&grad_sums[RoutingSums::lse_squared(experts)], per_token); });
      break;
    case BalanceLossKind::kDevice:
      each(s.devices, [&](int64_t device) {
        const int64_t count = s.experts_per_device(), first = device * count;
        const double slope = per_token * s.device_share(device);
        for (int64_t e = first; e < first + count; ++e) add(&grad_sums[e], slope);
      });
      break;
    case BalanceLossKind::kImportance:
    case BalanceLossKind::kImportanceOfProbs: {
      const bool of_gates = kind == BalanceLossKind::kImportance;
      const scalar_t* values = of_gates ? s.gate_sums : s.sums + RoutingSums::prob;
      scalar_t* to = of_gates ? grad_gate_sums : grad_sums;
      const Spread spread = spread_of(values, experts, s.unbiased, sum);
      const double mean = spread.mean;
      if (mean == 0) break;
      const double slope = 2 * grad / (spread.degrees * mean * mean);
      const double of_mean = 2 * grad * spread.variance / (experts * mean * mean * mean);
      each(experts, [&](int64_t e) { add(&to[e], slope * (values[e] - mean) - of_mean); });
      break;
    }
    case BalanceLossKind::kUniformKl:
      each(experts,
           [&](int64_t e) { add(&grad_sums[e], -per_token * s.log_prob_slope(e) / experts); });
      break;
    case BalanceLossKind::kMutualInformation:
      each(1, [&](int64_t) { add(&grad_sums[RoutingSums::entropy(experts)], per_token); });
      [[fallthrough]];
    case BalanceLossKind::kEntropy:
      each(experts, [&](int64_t e) { add(&grad_sums[e], per_token * (s.log_prob(e) + 1)); });
      break;
    case BalanceLossKind::kVariance: {
      const double mean = sum(experts, [&](int64_t e) { return s.prob(e); }) / experts;
      each(experts, [&](int64_t e) {
        add(&grad_sums[e], per_token * 2 * (s.prob(e) - mean) / (experts - 1));
      });
      break;
    }
    case BalanceLossKind::kTokenEntropy:
      each(1, [&](int64_t) { add(&grad_sums[RoutingSums::entropy(experts)], per_token); });
      break;
  }
}

}  // namespace equipoise
