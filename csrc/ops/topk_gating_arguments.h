// SPDX-License-Identifier: Apache-2.0
// What the backends of topk_gating are given: checked, flattened to [T, E], on one device.
// Internal.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "score_function.h"

namespace equipoise {

/// Compute type: float64 for float64 logits, else float32. The row of a token is logits + noise,
/// added in the compute type.
struct TopKGatingArguments {
  at::Tensor logits;                ///< [T, E], inner stride 1, any row stride
  std::optional<at::Tensor> noise;  ///< [T, E], dtype of logits, inner stride 1, any row stride
  int64_t top_k;
  ScoreFunction score_function;
  bool norm_topk_prob;
  double scaling_factor;
  std::optional<at::Tensor> expert_bias;  ///< [E], compute type, contiguous
  int64_t num_groups;                     ///< 1: selection is not limited
  int64_t group_topk;                     ///< < num_groups if that is above 1
  GroupScore group_score;
  std::optional<at::Tensor> forced_indices;  ///< [T, K] int64, contiguous; on CUDA any values
  std::optional<at::Tensor> token_mask;      ///< [T], bool or compute type, contiguous
  std::optional<at::Tensor> segment_ids;     ///< [T] int64, contiguous; on CUDA any values
  int64_t num_segments;                      ///< S, 1 without segment_ids
  bool stats;
};

/// Allocated and not filled, except that T = 0 never reaches a backend.
struct TopKGatingOutputs {
  at::Tensor topk_weights;       ///< [T, K] compute type
  at::Tensor topk_indices;       ///< [T, K] int64
  at::Tensor tokens_per_expert;  ///< [S, E] int64
  at::Tensor lse;                ///< [T] compute type, undefined without stats
  at::Tensor sums;               ///< [S, 2 E + 5] compute type, undefined without stats
};

/// Gradients are contiguous and of compute type; an absent one costs nothing.
struct TopKGatingBackwardArguments {
  std::optional<at::Tensor> grad_weights;  ///< [T, K]
  std::optional<at::Tensor> grad_lse;      ///< [T]
  std::optional<at::Tensor>
      grad_sums;      ///< [S, 2 E + 5]; only prob_sum, sum w lse^2 and sum w H carry a gradient
  at::Tensor logits;  ///< [T, E], inner stride 1
  std::optional<at::Tensor> noise;  ///< [T, E], dtype of logits, inner stride 1
  at::Tensor topk_indices;          ///< [T, K] int64, contiguous; -1 in any place
  std::optional<at::Tensor>
      lse;  ///< [T] as the forward gave it; absent without stats: then recomputed
  ScoreFunction score_function;
  bool norm_topk_prob;
  double scaling_factor;
  std::optional<at::Tensor> token_mask;   ///< [T], bool or compute type, contiguous
  std::optional<at::Tensor> segment_ids;  ///< [T] int64, contiguous; on CUDA any values
  int64_t num_segments;                   ///< S, 1 without segment_ids
};

}  // namespace equipoise
