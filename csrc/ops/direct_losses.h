// SPDX-License-Identifier: Apache-2.0
// Losses and bounds that are functions of their own inputs, not of the sums of topk_gating. Each is
// made of ATen calls, whose derivatives autograd knows to any order.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../export.h"
#include "topk_gating.h"

namespace equipoise {

/// Var(L) / mean(L)^2 of the expected loads L_e = sum_t w_t Phi((clean_te - threshold_te) /
/// stddev_te), the threshold being the K-th largest noisy logit among the other experts (Shazeer
/// 2017, arXiv:1701.06538, appendix A): 0 at balance, and with K = E.
/// @param clean_logits, noisy_logits  [..., E], without and with the noise; -inf and NaN: absent.
/// @param noise_stddev                [..., E] > 0.
/// @param top_k                       K, from 1 to E.
/// @param token_mask                  [...], bool (true = real token) or floating weights >= 0.
/// @return                            scalar, float32 (float64 for float64 logits).
EQUIPOISE_API at::Tensor load_loss(const at::Tensor& clean_logits, const at::Tensor& noisy_logits,
                                   const at::Tensor& noise_stddev, int64_t top_k,
                                   const std::optional<at::Tensor>& token_mask = std::nullopt);

/// sum_i f''_i P'_i, with f''_i = D / (M W) times the tokens sent to device i, each counted once,
/// and P'_i the sum of P over its experts (DeepSeek-V2, arXiv:2405.04434): 1 at balance.
/// @param num_devices    D, shares the experts in equal contiguous runs.
/// @param max_devices    M, the most devices a token may reach, from 1 to D.
/// @param token_weights  [...] floating, where topk_gating had any.
EQUIPOISE_API at::Tensor communication_loss(
    const RoutingResult& routing, int64_t num_devices, int64_t max_devices,
    const std::optional<at::Tensor>& token_weights = std::nullopt);

/// Balance between groups of experts and within them: the mean of `between`, the device loss of the
/// groups, and `within`, the mean over the used groups of the Switch loss among a group's experts,
/// (E / G) sum_e (f_e / F_i) (P_e / P_i) with F_i and P_i the sums over group i. 1 at balance.
/// @param num_groups  G, equal contiguous runs of experts.
EQUIPOISE_API at::Tensor hierarchical_loss(const RoutingResult& routing, int64_t num_groups);

/// The mean square of the logits [..., E]; absent experts (-inf, NaN) count as 0.
/// @param token_mask  [...], bool (true = real token) or floating weights >= 0.
EQUIPOISE_API at::Tensor router_l2_loss(const at::Tensor& logits,
                                        const std::optional<at::Tensor>& token_mask = std::nullopt);

/// mean_ij cos(x_i, x_j) cos(g_i, g_j) of inputs [B, D] and gates [B, N], in O(D N) memory by the
/// identity sum_ij (u_i u_j)(v_i v_j) = |U^T V|^2 for rows of length 1; 0 for B = 0.
EQUIPOISE_API at::Tensor similarity_correlation(const at::Tensor& inputs, const at::Tensor& gates);

/// -mean(logsumexp_k(log g_k + log p_k)), g = softmax(gate_logits); both [..., K]. 0 without
/// tokens.
EQUIPOISE_API at::Tensor mixture_nll(const at::Tensor& gate_logits, const at::Tensor& log_probs);

/// log B + mean_i(scores_ii - logsumexp_j(scores_ij)) of scores [B, B]: a lower bound on the
/// information between the two sides (InfoNCE, van den Oord 2018, arXiv:1807.03748).
EQUIPOISE_API at::Tensor infonce(const at::Tensor& scores);

/// mean(joint) - log(mean(exp(marginal))): the lower bound of Donsker and Varadhan (MINE, Belghazi
/// 2018, arXiv:1801.04062). Scores [B] of pairs that belong together, [M] of pairs that do not.
EQUIPOISE_API at::Tensor mine(const at::Tensor& joint_scores, const at::Tensor& marginal_scores);

}  // namespace equipoise
