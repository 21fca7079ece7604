// SPDX-License-Identifier: Apache-2.0
// balance_loss: a weighted set of balance losses from the sums of topk_gating; never touches [T,
// E].
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <string>
#include <utility>
#include <vector>

#include "../export.h"
#include "topk_gating.h"

namespace equipoise {

/// The losses that are functions of the sums, in the order in which the kernels number them.
enum class BalanceLossKind : int64_t { kSwitch = 0, kZ = 1 };

/// Value of a set of losses.
struct EQUIPOISE_API LossReport {
  at::Tensor total;                ///< scalar: sum of coefficient times value; differentiable
  at::Tensor values;               ///< [L], unscaled, in the order asked for; differentiable
  std::vector<std::string> names;  ///< [L]
};

/// With f_e = load_e / (K W), P_e = prob_sum_e / W and W = num_tokens:
///
///   switch  E sum_e f_e P_e  (1 at balance; f is a constant for the gradient; Fedus 2021,
///   arXiv:2101.03961) z       (1/W) sum_t w_t lse_t^2 (ST-MoE, arXiv:2202.08906)
///
/// W = 0 and E = 1 give 0 with zero gradient for switch. With K = E every expert gets every token,
/// so switch is left out (value 0) with one warning.
///
/// @param routing       of topk_gating with stats.
/// @param losses        (name, coefficient >= 0) pairs.
/// @return              float32, float64 for float64 logits. Gradients reach the logits through
/// routing.sums.
EQUIPOISE_API LossReport balance_loss(const RoutingResult& routing,
                                      const std::vector<std::pair<std::string, double>>& losses);

/// The Switch loss alone, unscaled; computed even where K = E.
EQUIPOISE_API at::Tensor switch_loss(const RoutingResult& routing);

/// The router z-loss alone, unscaled.
EQUIPOISE_API at::Tensor z_loss(const RoutingResult& routing);

}  // namespace equipoise
