// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of topk_gating over raw pointers; ../ops/topk_gating.cpp splits the tokens among
// threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace equipoise::cpu {

/// The type all arithmetic on `scalar_t` logits is done in.
template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

/// Rows are padded to this many elements in scratch memory, so that vector loops have no tail.
inline constexpr int64_t kRowPadding = 32;
inline constexpr int64_t padded_experts(int64_t num_experts) {
  return (num_experts + kRowPadding - 1) / kRowPadding * kRowPadding;
}
/// Scratch that one call needs, in elements of the compute type.
inline constexpr int64_t topk_gating_scratch(int64_t num_experts) {
  return 6 * (padded_experts(num_experts) + kRowPadding);
}

template <typename scalar_t>
struct TopKGatingRows {
  const scalar_t* logits;  // [T, E]
  int64_t row_stride;
  int64_t num_experts;
  int64_t top_k;
  bool norm_topk_prob;
  compute_t<scalar_t> scaling_factor;
  const compute_t<scalar_t>* expert_bias;    // [E] or null
  const compute_t<scalar_t>* token_weights;  // [T] or null: all 1
  compute_t<scalar_t>* topk_weights;         // [T, K]
  int64_t* topk_indices;                     // [T, K]
  compute_t<scalar_t>* lse;                  // [T] or null: no statistics
};

template <typename scalar_t>
struct TopKGatingBackwardRows {
  const compute_t<scalar_t>* grad_weights;  // [T, K] or null
  const compute_t<scalar_t>* grad_lse;      // [T] or null
  const compute_t<scalar_t>* grad_sums;     // [2 E + 5] or null
  const scalar_t* logits;                   // [T, E]
  int64_t row_stride;
  int64_t num_experts;
  int64_t top_k;
  bool norm_topk_prob;
  compute_t<scalar_t> scaling_factor;
  const int64_t* topk_indices;               // [T, K]
  const compute_t<scalar_t>* token_weights;  // [T] or null: all 1
  scalar_t* grad_logits;                     // [T, E], contiguous
};

}  // namespace equipoise::cpu
