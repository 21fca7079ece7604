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
/// With segments [S, E]: the same sums over the tokens of each segment.
///
/// @param indices      [..., K] int64; -1 is skipped. Anything else outside [0, E) is an error on
/// the CPU and is skipped on CUDA, where reading it back would stall the device.
/// @param num_experts  E >= 1.
/// @param weights      [..., K]; the result is then differentiable (twice) in them.
/// @param token_mask   [...] bool, true = real token. What a masked token holds is not looked at.
/// @param segment_ids  [...] int64 in [0, S), the segment (sequence, document, domain) of each
/// token. A bad one is an error on the CPU; on CUDA its token is skipped.
/// @param num_segments S >= 1, given with segment_ids.
/// @param num_invalid  receives a scalar int64 tensor, unless null: how many bad indices and bad
/// segment ids were met on CUDA (0 on the CPU, where they are errors).
/// Deterministic: the same bits for any number of threads.
EQUIPOISE_API at::Tensor expert_bincount(
    const at::Tensor& indices, int64_t num_experts,
    const std::optional<at::Tensor>& weights = std::nullopt,
    const std::optional<at::Tensor>& token_mask = std::nullopt,
    const std::optional<at::Tensor>& segment_ids = std::nullopt,
    std::optional<int64_t> num_segments = std::nullopt, at::Tensor* num_invalid = nullptr);

/// The share of the selections that each expert got, float32 [E] (with segments [S, E], of the
/// selections of each segment): expert_bincount divided by its sum, so 1 / E at balance; 0 where
/// nothing was selected. Arguments as there.
EQUIPOISE_API at::Tensor expert_frequency(
    const at::Tensor& indices, int64_t num_experts,
    const std::optional<at::Tensor>& token_mask = std::nullopt,
    const std::optional<at::Tensor>& segment_ids = std::nullopt,
    std::optional<int64_t> num_segments = std::nullopt);

}  // namespace equipoise
