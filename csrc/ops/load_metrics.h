// SPDX-License-Identifier: Apache-2.0
// load_metrics: how evenly the experts are loaded, from the counts alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/ordered_dict.h>

#include <array>
#include <string>

#include "../export.h"

namespace equipoise {

/// The metrics of `load_metrics`, in the order of its rows.
inline constexpr std::array kLoadMetricNames = {
    "cv",
    "imbalance_ratio",
    "max_vio",
    "max_vio_tokens",
    "min_vio",
    "gini",
    "entropy",
    "perplexity",
    "kl_to_uniform",
    "expert_utilization_rate",
    "expert_usage_rate",
    "dead_experts",
    "top1_share",
};

/// Load figures of one layer, or of several side by side (never of their sum). With counts C_e,
/// mean m and shares f_e = C_e / sum C:
///
///     cv = std(C) / m                    imbalance_ratio = max(C) / m
///     max_vio = (max(C) - m) / m         min_vio = (m - min(C)) / m
///     max_vio_tokens = max(C) - m        top1_share = max(C) / sum C
///     entropy = -sum f log f (nats)      perplexity = exp(entropy), experts in effect
///     kl_to_uniform = log E - entropy    gini = sum_{i<j} |C_i - C_j| / (E sum C)
///     expert_utilization_rate: share of the experts with at least 10 % of a fair share
///     expert_usage_rate: share of those with any token; dead_experts: how many have none
///
/// MaxVio is Wang 2024's (arXiv:2408.15664): relative, not in tokens. Without a single token there
/// is no load to speak of, and the ratios are NaN.
///
/// @param tokens_per_expert  [E] or [..., E] int64 counts >= 0, E >= 1. A negative one is an error
///                           on the CPU; on CUDA, where that cannot be known without waiting, all
///                           metrics of its row are NaN.
/// @param unbiased           divide the variance in cv by E - 1 instead of E.
/// @return name -> [...] float64, in the order of kLoadMetricNames. One kernel, no wait for the
///         device. Not differentiable: counts are integers.
///
///     auto load = equipoise::load_metrics(torch::tensor({0, 0, 0, 8}, torch::kLong));
///     load["max_vio"].item<double>();  // 3
EQUIPOISE_API torch::OrderedDict<std::string, at::Tensor> load_metrics(
    const at::Tensor& tokens_per_expert, bool unbiased = false);

}  // namespace equipoise
