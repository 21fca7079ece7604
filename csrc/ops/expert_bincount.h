// SPDX-License-Identifier: Apache-2.0
// expert_bincount: how many tokens (or how much weight) each expert got.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../export.h"

namespace equipoise {

/// Counts of each expert in O(E) memory, without the [T, K, E] one-hot tensor and without a host
/// sync.
///
///   tokens_per_expert[e] = sum over slots of [indices = e]          (int64)
///                        = sum over slots of weights [indices = e]  (float32; float64 for float64
///                        weights)
///
/// @param indices      [..., K] int64; -1 is skipped. Anything else outside [0, E) is an error on
/// the CPU and is
///                     skipped on CUDA, where reading it back would stall the device.
/// @param num_experts  E >= 1.
/// @param weights      [..., K]; the result is then differentiable (twice) in them.
/// @param token_mask   [...] bool, true = real token.
/// Deterministic: the same bits for any number of threads.
EQUIPOISE_API at::Tensor expert_bincount(
    const at::Tensor& indices, int64_t num_experts,
    const std::optional<at::Tensor>& weights = std::nullopt,
    const std::optional<at::Tensor>& token_mask = std::nullopt);

}  // namespace equipoise
