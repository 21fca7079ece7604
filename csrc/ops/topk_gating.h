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

/// What `topk_gating` returns. T are the leading dimensions of the logits, E experts, K = top_k,
/// S segments (the dimension is absent without segment_ids). Floating results are float32, or
/// float64 for float64 logits.
struct EQUIPOISE_API RoutingResult {
  at::Tensor topk_weights;  ///< [T, K]; differentiable
  at::Tensor topk_indices;  ///< [T, K] int64, by descending score; -1 where no expert was chosen
  at::Tensor tokens_per_expert;  ///< [S, E] int64
  at::Tensor lse;   ///< [T] logsumexp of each row, 0 for a masked one; differentiable; undefined
                    ///< without stats
  at::Tensor sums;  ///< [S, 2 E + 5], see RoutingSums; differentiable; undefined without stats

  at::Tensor prob_sum() const;      ///< [S, E] sum of w p over the tokens
  at::Tensor load() const;          ///< [S, E] sum of w over the tokens that chose e
  at::Tensor num_tokens() const;    ///< [S] sum of the token weights w
  at::Tensor num_nan_rows() const;  ///< scalar, rows in which a logit was NaN
  at::Tensor num_invalid() const;   ///< scalar, bad values met on CUDA, where they cannot raise
  int64_t num_experts() const;      ///< E
  int64_t top_k() const;            ///< K
};

/// The defaults choose by softmax, without bias, groups, mask, segments or noise.
struct TopKGatingOptions {
  /// "softmax", "sigmoid", "sqrtsoftplus" or "identity", see `topk_gating`.
  TORCH_ARG(std::string, score_function) = "softmax";
  /// Divide the K weights by their sum: softmax -> top-k -> renormalise, which equals top-k ->
  /// softmax. Not for identity.
  TORCH_ARG(bool, norm_topk_prob) = false;
  /// Multiplies the K weights.
  TORCH_ARG(double, scaling_factor) = 1.0;
  /// [E], float32 (float64 is allowed for float64 logits): added to the scores for the selection
  /// only.
  TORCH_ARG(std::optional<at::Tensor>, expert_bias) = std::nullopt;
  /// Groups of E / num_groups neighbouring experts.
  TORCH_ARG(int64_t, num_groups) = 1;
  /// How many groups of each token are kept; needed with num_groups > 1.
  TORCH_ARG(std::optional<int64_t>, group_topk) = std::nullopt;
  /// Of a group, from the biased scores of its experts: "max", or the sum of the best two.
  TORCH_ARG(std::string, group_score) = "top2_sum";
  /// [T], bool (true = real token) or floating weights >= 0.
  TORCH_ARG(std::optional<at::Tensor>, token_mask) = std::nullopt;
  /// [T] int64 in [0, num_segments): counts and sums for each segment by itself.
  TORCH_ARG(std::optional<at::Tensor>, segment_ids) = std::nullopt;
  /// S; needed with segment_ids.
  TORCH_ARG(std::optional<int64_t>, num_segments) = std::nullopt;
  /// [T, E], dtype of the logits: added to them in every respect; differentiable.
  TORCH_ARG(std::optional<at::Tensor>, noise) = std::nullopt;
  /// [T, K] int64 in [-1, E): taken in place of the selection (router replay).
  TORCH_ARG(std::optional<at::Tensor>, forced_indices) = std::nullopt;
  /// Compute lse and sums too (training).
  TORCH_ARG(bool, stats) = true;
};

/// Scores, selection, weights, counts and the sums that every balance loss needs, in one pass.
///
///   x = logits + noise
///   s = softmax(x) | 1 / (1 + exp(-x)) | sqrt(log(1 + exp(x))) | x       (by score_function)
///   p = s / sum s                                                        (identity: softmax(x))
///   chosen = the top_k experts by s + expert_bias in the best group_topk groups
///   weight_k = scaling_factor s_k, divided by the sum of the chosen s with norm_topk_prob
///
/// Ties go to the larger logit, then to the lowest index. NaN and -inf logits are absent experts:
/// never chosen, p = 0; a slot without a present expert, and every slot of a masked token, holds
/// index -1 and weight 0. With top_k = 1 and norm_topk_prob the weight is scaling_factor and its
/// gradient is zero.
///
/// @param logits  [..., E]; float64, float32, bfloat16 or float16. Half types are widened in
/// registers.
/// @param top_k   K, from 1 to E.
/// Differentiable (twice) in logits and noise through topk_weights, lse, prob_sum and the sums of
/// lse^2 and H. Deterministic: the same bits for any number of threads. Sources: Shazeer 2017
/// (arXiv:1701.06538), Fedus 2021 (arXiv:2101.03961), loss-free bias: Wang 2024 (arXiv:2408.15664),
/// groups: DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437).
EQUIPOISE_API RoutingResult topk_gating(const at::Tensor& logits, int64_t top_k,
                                        const TopKGatingOptions& options = {});

/// The segment of each token of packed sequences, for TopKGatingOptions::segment_ids.
///   cu_seqlens {0, 3, 3, 5}, num_tokens 5  ->  {0, 0, 0, 2, 2}
/// @param cu_seqlens  [S + 1] int, where each sequence begins: ascending from 0 to num_tokens.
EQUIPOISE_API at::Tensor segment_ids_from_cu_seqlens(const at::Tensor& cu_seqlens,
                                                     int64_t num_tokens);

}  // namespace equipoise
