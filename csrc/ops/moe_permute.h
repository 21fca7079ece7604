// SPDX-License-Identifier: Apache-2.0
// moe_permute: brings the rows of each expert together.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <optional>
#include <string>

#include "../export.h"

namespace equipoise {

/// What `moe_permute` returns. N = T K rows; the rows after expert_offsets[E] are zero.
struct EQUIPOISE_API PermuteResult {
  at::Tensor permuted;          ///< [N, H], dtype of x; differentiable
  at::Tensor permuted_weights;  ///< [N], dtype of topk_weights; empty where none were given;
                                ///< differentiable
  at::Tensor row_id_map;  ///< [T, K] int64: the row that holds slot (t, k), -1 if there is none
  at::Tensor tokens_per_expert;  ///< [E] int64
  at::Tensor expert_offsets;     ///< [E + 1] int64: expert e has rows expert_offsets[e] ..
                                 ///< expert_offsets[e + 1]
  at::Tensor kept_per_expert;    ///< [E] int64: tokens_per_expert after any drop
  at::Tensor overflow;  ///< scalar int64: rows that did not fit (CUDA; an error on the CPU)
};

struct MoEPermuteOptions {
  TORCH_ARG(std::optional<at::Tensor>, topk_weights) = std::nullopt;  ///< [T, K]
  TORCH_ARG(std::optional<at::Tensor>,
            tokens_per_expert) = std::nullopt;  ///< [E] int64, from topk_gating
  TORCH_ARG(std::optional<at::Tensor>, routing_map) = std::nullopt;
  TORCH_ARG(std::optional<int64_t>, capacity) = std::nullopt;
  TORCH_ARG(std::string, drop_policy) = "position";
  TORCH_ARG(bool, pad_to_capacity) = false;
  TORCH_ARG(int64_t, align) = 1;
  TORCH_ARG(std::optional<int64_t>, seed) = std::nullopt;
  TORCH_ARG(std::optional<int64_t>, output_rows) = std::nullopt;
};

/// Stable counting sort of the (token, slot) pairs by expert, and a copy of the rows in that order.
/// The size of the result depends on shapes alone, so nothing waits for the device.
///
/// @param x             [T, H], any dtype of float64, float32, bfloat16, float16.
/// @param topk_indices  [T, K] int64 in [-1, E); -1 is left out.
/// @param num_experts   E >= 1.
/// Differentiable (twice) in x and topk_weights. Deterministic.
EQUIPOISE_API PermuteResult moe_permute(const at::Tensor& x,
                                        const std::optional<at::Tensor>& topk_indices,
                                        int64_t num_experts, const MoEPermuteOptions& options = {});

}  // namespace equipoise
