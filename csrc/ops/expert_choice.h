// SPDX-License-Identifier: Apache-2.0
// expert_choice: every expert chooses its tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../export.h"

namespace equipoise {

/// What `expert_choice` returns; C is the capacity, or T where that is smaller.
struct EQUIPOISE_API ExpertChoiceResult {
  at::Tensor token_indices;  ///< [E, C] int64 in [0, T), by descending p; -1 where no token is left
  at::Tensor token_weights;  ///< [E, C] p of these tokens, 0 beside -1; differentiable
};

/// Every expert takes the `capacity` tokens with the largest p = softmax(logits) over the experts;
/// ties go to the lower token. All experts work on the same number of tokens, and a token is used
/// by none, one or several of them.
///
/// NaN and -inf logits are absent experts: such an expert never takes the token. +inf counts as
/// 1e18.
///
/// @param logits      [..., E], whose leading dimensions are T tokens; float64, float32, bfloat16
/// or
///                    float16.
/// @param capacity    >= 0.
/// @param token_mask  [...], bool (true = real token) or floating weights, of which only > 0
/// counts.
///                    A masked token is never taken.
/// The weights are float32, or float64 for float64 logits. Differentiable (to any order) in logits.
/// Deterministic. Nothing waits for the device. Source: Zhou 2022 (arXiv:2202.09368).
EQUIPOISE_API ExpertChoiceResult
expert_choice(const at::Tensor& logits, int64_t capacity,
              const std::optional<at::Tensor>& token_mask = std::nullopt);

}  // namespace equipoise
