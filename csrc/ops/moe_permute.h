// SPDX-License-Identifier: Apache-2.0
// moe_permute: brings the rows of each expert together.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <optional>
#include <string>

#include "../export.h"

namespace equipoise {

/// What `moe_permute` returns. The rows without a slot are zero: those behind expert_offsets[E],
/// and those that fill up the room of an expert.
struct EQUIPOISE_API PermuteResult {
  at::Tensor permuted;          ///< [N, H], dtype of x; differentiable
  at::Tensor permuted_weights;  ///< [N], dtype of topk_weights; empty where none were given;
                                ///< differentiable
  at::Tensor row_id_map;  ///< [T, K] ([T, E] for a routing_map) int64: the row that holds slot
                          ///< (t, k), -1 if there is none
  at::Tensor tokens_per_expert;  ///< [E] int64, before any drop
  at::Tensor expert_offsets;  ///< [E + 1] int64: expert e has rows expert_offsets[e] .. + kept, and
                              ///< room up to expert_offsets[e + 1]
  at::Tensor kept_per_expert;  ///< [E] int64: tokens_per_expert after any drop
  at::Tensor overflow;         ///< scalar int64: rows that did not fit (CUDA; an error on the CPU)
  at::Tensor num_invalid;      ///< scalar int64: bad indices (CUDA; an error on the CPU)

  /// [E] int64: the slots of each expert that have no row.
  at::Tensor dropped_per_expert() const;
};

struct MoEPermuteOptions {
  /// [T, K] ([T, E] for a routing_map): permuted along, and what drop_policy "probs" goes by.
  TORCH_ARG(std::optional<at::Tensor>, topk_weights) = std::nullopt;
  /// [E] int64 counts of the slots, from topk_gating. Compared on the CPU, where they save counting
  /// again; on CUDA the sort has them for nothing.
  TORCH_ARG(std::optional<at::Tensor>, tokens_per_expert) = std::nullopt;
  /// [T, E] bool in place of topk_indices: which experts each token goes to.
  TORCH_ARG(std::optional<at::Tensor>, routing_map) = std::nullopt;
  /// Slots that an expert keeps at most; see expert_capacity. None are dropped without it.
  TORCH_ARG(std::optional<int64_t>, capacity) = std::nullopt;
  /// Who stays: "position" (the first tokens), "probs" (the largest topk_weights, ties to the lower
  /// token) or "random" (a function of seed, token and expert alone). Rows are in token order.
  TORCH_ARG(std::string, drop_policy) = "position";
  /// The layout [E * capacity, H]: every expert has room for `capacity` rows.
  TORCH_ARG(bool, pad_to_capacity) = false;
  /// The room of each expert is a multiple of this.
  TORCH_ARG(int64_t, align) = 1;
  TORCH_ARG(std::optional<int64_t>, seed) = std::nullopt;  ///< of drop_policy "random"
  /// N. Without it N = T K, plus E (align - 1) rounded up to a multiple of align.
  TORCH_ARG(std::optional<int64_t>, output_rows) = std::nullopt;
  /// [N, H], dtype of x, contiguous: takes the rows in place of a new tensor; no gradient then.
  TORCH_ARG(std::optional<at::Tensor>, out) = std::nullopt;
};

/// Stable counting sort of the (token, slot) pairs by expert, and a copy of the rows in that order.
/// The size of the result depends on shapes and options alone, so nothing waits for the device.
///
/// @param x             [T, H]: float64, float32, bfloat16, float16, or a type of 8 bits, whose
/// rows
///                      are moved as they are and have no gradient.
/// @param topk_indices  [T, K] int64 in [-1, E); -1 is left out. Absent with a routing_map.
/// @param num_experts   E >= 1.
/// Differentiable (twice) in x and topk_weights. Deterministic.
EQUIPOISE_API PermuteResult moe_permute(const at::Tensor& x,
                                        const std::optional<at::Tensor>& topk_indices,
                                        int64_t num_experts, const MoEPermuteOptions& options = {});

/// The capacity of an expert: ceil(capacity_factor T K / E), at least min_capacity, at most T
/// (Lepikhin 2020, arXiv:2006.16668; Fedus 2021, arXiv:2101.03961).
///   T = 4096, K = 2, E = 64, capacity_factor = 1.25  ->  160
EQUIPOISE_API int64_t expert_capacity(int64_t num_tokens, int64_t top_k, int64_t num_experts,
                                      double capacity_factor, int64_t min_capacity = 0);

}  // namespace equipoise
