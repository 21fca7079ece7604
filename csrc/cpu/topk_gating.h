// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of topk_gating over raw pointers; ../ops/topk_gating.cpp splits the tokens among
// threads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../ops/score_function.h"

namespace equipoise::cpu {

/// The type all arithmetic on `scalar_t` logits is done in.
template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

/// Rows are padded to this many elements in scratch memory, so that vector loops have no tail.
inline constexpr int64_t kRowPadding = 32;
inline constexpr int64_t padded_experts(int64_t num_experts) {
  return (num_experts + kRowPadding - 1) / kRowPadding * kRowPadding;
}
/// Tokens that are worked on together, at most.
inline constexpr int64_t kChunkRows = 16;
/// Scratch that one call needs, in elements of the compute type; it is aligned as a vector.
inline constexpr int64_t topk_gating_scratch(int64_t num_experts, int64_t top_k) {
  return 9 * (padded_experts(num_experts) + kRowPadding) + 3 * kChunkRows * top_k;
}

/// What both directions know of the tokens. A row is logits + noise.
template <typename scalar_t>
struct TopKGatingInput {
  const scalar_t* logits;  // [T, E]
  int64_t row_stride;
  const scalar_t* noise;  // [T, E] or null
  int64_t noise_stride;
  int64_t num_experts;
  int64_t top_k;
  ScoreFunction score_function;
  bool norm_topk_prob;
  compute_t<scalar_t> scaling_factor;
  const compute_t<scalar_t>* token_weights;  // [T] or null: all 1
  const int64_t* segment_ids;                // [T] or null: all 0
};

template <typename scalar_t>
struct TopKGatingRows : TopKGatingInput<scalar_t> {
  const compute_t<scalar_t>* expert_bias;  // [E] or null
  int64_t num_groups, group_topk;          // 1 and 1: any group
  GroupScore group_score;
  const int64_t* forced_indices;      // [T, K] or null; checked
  compute_t<scalar_t>* topk_weights;  // [T, K]
  int64_t* topk_indices;              // [T, K]
  compute_t<scalar_t>* lse;           // [T] or null: no statistics
};

/// Where some tokens are added up: zeroed, one row per segment from `first_segment` on.
template <typename T>
struct TopKGatingTotals {
  int64_t* counts;  // [num_segments, E]
  T* sums;          // [num_segments, 2 E + 5]; unused without statistics
  int64_t first_segment, num_segments;
};

template <typename scalar_t>
struct TopKGatingBackwardRows : TopKGatingInput<scalar_t> {
  const compute_t<scalar_t>* grad_weights;  // [T, K] or null
  const compute_t<scalar_t>* grad_lse;      // [T] or null
  const compute_t<scalar_t>* grad_sums;     // [S, 2 E + 5] or null
  const int64_t* topk_indices;              // [T, K]; what is not in [0, E) chose no expert
  scalar_t* grad_logits;                    // [T, E], contiguous
};

}  // namespace equipoise::cpu
