// SPDX-License-Identifier: Apache-2.0
// What the backends of topk_gating are given: checked, flattened to [T, E], on one device.
// Internal.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace equipoise {

/// Compute type: float64 for float64 logits, else float32.
struct TopKGatingArguments {
  at::Tensor logits;  ///< [T, E], inner stride 1, any row stride
  int64_t top_k;
  bool norm_topk_prob;
  double scaling_factor;
  std::optional<at::Tensor> expert_bias;  ///< [E], compute type, contiguous
  std::optional<at::Tensor> token_mask;   ///< [T], bool or compute type, contiguous
  bool stats;
};

/// Allocated and not filled, except that T = 0 never reaches a backend.
struct TopKGatingOutputs {
  at::Tensor topk_weights;       ///< [T, K] compute type
  at::Tensor topk_indices;       ///< [T, K] int64
  at::Tensor tokens_per_expert;  ///< [E] int64
  at::Tensor lse;                ///< [T] compute type, or [0] without stats
  at::Tensor sums;               ///< [2 E + 5] compute type, or [0] without stats
};

/// Gradients are contiguous and of compute type; an absent one costs nothing.
struct TopKGatingBackwardArguments {
  std::optional<at::Tensor> grad_weights;  ///< [T, K]
  std::optional<at::Tensor> grad_lse;      ///< [T]
  std::optional<at::Tensor>
      grad_sums;            ///< [2 E + 5]; only prob_sum, sum w lse^2 and sum w H carry a gradient
  at::Tensor logits;        ///< [T, E], inner stride 1
  at::Tensor topk_indices;  ///< [T, K] int64, contiguous
  std::optional<at::Tensor>
      lse;  ///< [T] as the forward gave it; absent without stats: then recomputed
  std::optional<at::Tensor> token_mask;  ///< [T], bool or compute type, contiguous
  bool norm_topk_prob;
  double scaling_factor;
};

}  // namespace equipoise
