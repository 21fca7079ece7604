// SPDX-License-Identifier: Apache-2.0
// topk_gating: everything a router needs, in one read of the logits.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <optional>
#include <string>

#include "../export.h"
#include "routing_sums.h"

namespace equipoise {

/// What `topk_gating` returns. T are the leading dimensions of the logits, E experts, K = top_k.
/// Floating results are float32, or float64 for float64 logits.
struct EQUIPOISE_API RoutingResult {
  at::Tensor topk_weights;  ///< [T, K]; differentiable
  at::Tensor topk_indices;  ///< [T, K] int64, by descending score; -1 where no expert was chosen
  at::Tensor tokens_per_expert;  ///< [E] int64
  at::Tensor
      lse;  ///< [T] logsumexp of each row, 0 for a masked one; differentiable; empty without stats
  at::Tensor sums;  ///< [2 E + 5], see RoutingSums; differentiable; empty without stats

  at::Tensor prob_sum() const;  ///< [E] sum of p over the tokens
  at::Tensor load()
      const;  ///< [E] weighted count of the tokens that chose e (= tokens_per_expert for a mask)
  at::Tensor num_tokens() const;    ///< scalar, sum of the token weights
  at::Tensor num_nan_rows() const;  ///< scalar, rows in which a logit was NaN
  int64_t num_experts() const;      ///< E
  int64_t top_k() const;            ///< K
};

struct TopKGatingOptions {
  TORCH_ARG(std::string, score_function) = "softmax";
  /// Divide the K weights by their sum: softmax -> top-k -> renormalise, which equals top-k ->
  /// softmax.
  TORCH_ARG(bool, norm_topk_prob) = false;
  /// Multiplies the K weights.
  TORCH_ARG(double, scaling_factor) = 1.0;
  /// [E], float32 (float64 is allowed for float64 logits): added to the scores for the selection
  /// only.
  TORCH_ARG(std::optional<at::Tensor>, expert_bias) = std::nullopt;
  TORCH_ARG(int64_t, num_groups) = 1;
  TORCH_ARG(std::optional<int64_t>, group_topk) = std::nullopt;
  TORCH_ARG(std::string, group_score) = "top2_sum";
  /// [T], bool (true = real token) or floating weights >= 0.
  TORCH_ARG(std::optional<at::Tensor>, token_mask) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, segment_ids) = std::nullopt;
  TORCH_ARG(std::optional<int64_t>, num_segments) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, noise) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, forced_indices) = std::nullopt;
  /// Compute lse and sums too (training). Without it they come back empty.
  TORCH_ARG(bool, stats) = true;
};

/// Scores, selection, weights, counts and the sums that every balance loss needs, in one pass.
///
///   p = softmax(x),  chosen = the top_k experts by p (+ expert_bias),  weight_k = scaling_factor
///   p_k, divided by the sum of the chosen p with norm_topk_prob.
///
/// Ties go to the lowest index. NaN and -inf logits are absent experts: never chosen, p = 0; a slot
/// without a present expert, and every slot of a masked token, holds index -1 and weight 0. With
/// top_k = 1 and norm_topk_prob the weight is scaling_factor and its gradient is zero.
///
/// @param logits  [..., E]; float64, float32, bfloat16 or float16. Half types are widened in
/// registers.
/// @param top_k   K, from 1 to E.
/// Differentiable (twice) in the logits through topk_weights, lse, prob_sum and the sums of lse^2
/// and H. Deterministic: the same bits for any number of threads. Sources: Shazeer 2017
/// (arXiv:1701.06538), Fedus 2021 (arXiv:2101.03961), loss-free bias: Wang 2024 (arXiv:2408.15664).
EQUIPOISE_API RoutingResult topk_gating(const at::Tensor& logits, int64_t top_k,
                                        const TopKGatingOptions& options = {});

}  // namespace equipoise
