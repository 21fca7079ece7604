// SPDX-License-Identifier: Apache-2.0
// balance_loss: a weighted set of balance losses from the sums of topk_gating; never touches [T,
// E].
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../export.h"
#include "topk_gating.h"

namespace equipoise {

/// Value of a set of losses.
struct EQUIPOISE_API LossReport {
  at::Tensor total;                ///< scalar: sum of coefficient times value; differentiable
  at::Tensor values;               ///< [L], unscaled, in the order asked for; differentiable
  std::vector<std::string> names;  ///< [L]
};

/// Options for `balance_loss`.
///
/// Example:
/// ```
/// balance_loss(routing, {{"switch", 1e-2}, {"device", 1e-3}},
///              BalanceLossOptions().num_devices(8));
/// ```
struct BalanceLossOptions {
  /// "batch": the segments are added up first. "sequence": the mean over the segments that have
  /// tokens of the loss of each (DeepSeek-V3, arXiv:2412.19437). z and token_entropy are means over
  /// all tokens either way. Default: "batch"
  TORCH_ARG(std::string, scope) = "batch";
  /// D, how many devices share the experts in equal contiguous runs, for device. Default: 1
  TORCH_ARG(int64_t, num_devices) = 1;
  /// Of what importance is taken: "gates", the sums of the weights of the chosen experts, or
  /// "probs", those of all probabilities. Default: "gates"
  TORCH_ARG(std::string, importance_of) = "gates";
  /// importance divides by E - 1 in place of E. Default: false
  TORCH_ARG(bool, unbiased) = false;
  /// [E] float32 weights of the experts in switch: 1 / (E t_e) for shares t_e of the load other
  /// than equal ones. Default: all 1
  TORCH_ARG(std::optional<at::Tensor>, expert_weights) = std::nullopt;
  /// [...] floating weights of the tokens in the importance of gates, where topk_gating had any.
  /// Default: all 1
  TORCH_ARG(std::optional<at::Tensor>, token_weights) = std::nullopt;
  /// "hf" multiplies switch and device by K, as Hugging Face's load_balancing_loss_func does, whose
  /// value at balance is K. Default: "none"
  TORCH_ARG(std::string, normalize) = "none";
};

/// With f_e = load_e / (K W), P_e = prob_sum_e / W, W = num_tokens and v_e = expert_weights:
///
///   switch              E sum_e v_e f_e P_e (1 at balance; Fedus 2021, arXiv:2101.03961)
///   device              sum_i f'_i P'_i (1), f'_i the mean of E f_e over the experts of device i,
///                       P'_i the sum of their P_e (DeepSeek-V2, arXiv:2405.04434)
///   importance          Var(G) / mean(G)^2 (0), G_e the sum of the weights of the tokens that
///                       chose e, or prob_sum (Shazeer 2017, arXiv:1701.06538)
///   z                   (1/W) sum_t w_t lse_t^2 (ST-MoE, arXiv:2202.08906)
///   uniform_kl          -(1/E) sum_e log(E P_e), the divergence from uniform to P (0)
///   entropy             sum_e P_e log(E P_e) = log E - H(P) (0)
///   variance            sum_e (P_e - mean P)^2 / (E - 1) (0)
///   mutual_information  (1/W) sum_t w_t H_t - H(P), from 0 down to -log E (RAILS,
///   arXiv:2407.15462) token_entropy       (1/W) sum_t w_t H_t
///
/// f and W are constants for the gradient. W = 0 and an empty segment give 0 with zero gradient; so
/// does E = 1 for all but z and token_entropy. With K = E every expert gets every token: all but
/// these two are left out (value 0), with one warning.
///
/// @param routing  of topk_gating with stats.
/// @param losses   (name, coefficient) pairs; a coefficient is >= 0, except for token_entropy,
///                 where a negative one rewards undecided tokens.
/// @return         float32, float64 for float64 logits. Gradients reach the logits through
///                 routing.sums and, for importance of gates, routing.topk_weights.
EQUIPOISE_API LossReport balance_loss(const RoutingResult& routing,
                                      const std::vector<std::pair<std::string, double>>& losses,
                                      const BalanceLossOptions& options = {});

/// @name The losses one by one, unscaled scalars; computed even where K = E.
/// @{
EQUIPOISE_API at::Tensor switch_loss(const RoutingResult& routing,
                                     const std::string& scope = "batch");
EQUIPOISE_API at::Tensor device_loss(const RoutingResult& routing, int64_t num_devices);
EQUIPOISE_API at::Tensor importance_loss(const RoutingResult& routing,
                                         const std::string& of = "gates", bool unbiased = false);
EQUIPOISE_API at::Tensor z_loss(const RoutingResult& routing);
EQUIPOISE_API at::Tensor uniform_kl_loss(const RoutingResult& routing);
EQUIPOISE_API at::Tensor entropy_loss(const RoutingResult& routing);
EQUIPOISE_API at::Tensor variance_loss(const RoutingResult& routing);
EQUIPOISE_API at::Tensor mutual_information_loss(const RoutingResult& routing);
EQUIPOISE_API at::Tensor token_entropy_loss(const RoutingResult& routing);
/// @}

}  // namespace equipoise
