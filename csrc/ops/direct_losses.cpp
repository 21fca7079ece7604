// SPDX-License-Identifier: Apache-2.0
// The schemas, then each loss with its checks, then the registration.
#include "direct_losses.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/special_ndtr.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "../library.h"
#include "dispatch_layout.h"
#include "routing_sums.h"

namespace equipoise {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  const auto define = [&](const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); };
  define(
      "load_loss(Tensor clean_logits, Tensor noisy_logits, Tensor noise_stddev, int top_k, "
      "Tensor? token_mask=None) -> Tensor");
  define(
      "communication_loss(Tensor sums, Tensor topk_indices, int num_devices, int max_devices, "
      "Tensor? token_weights=None) -> Tensor");
  define("hierarchical_loss(Tensor sums, int top_k, int num_groups) -> Tensor");
  define("router_l2_loss(Tensor logits, Tensor? token_mask=None) -> Tensor");
  define("similarity_correlation(Tensor inputs, Tensor gates) -> Tensor");
  define("mixture_nll(Tensor gate_logits, Tensor log_probs) -> Tensor");
  define("infonce(Tensor scores) -> Tensor");
  define("mine(Tensor joint_scores, Tensor marginal_scores) -> Tensor");
}

/// The dtype that a loss is computed and given in.
Tensor widen(const Tensor& tensor) { return tensor.to(accumulate_type(tensor.scalar_type())); }

/// `tensor` has a last dimension, whose size the documentation calls `size`.
void check_rows(const char* op, const char* argument, const Tensor& tensor, const char* size) {
  TORCH_CHECK(tensor.dim() >= 1 && tensor.sym_size(-1) >= 1, op, ": ", argument,
              " must have shape [..., ", size, "] with ", size, " >= 1, got ", tensor.sym_sizes());
}

/// [T, 1] weights of the tokens of `logits` [T, E]; undefined without a mask.
Tensor token_weights_of(const char* op, const OptionalTensor& token_mask, const Tensor& logits,
                        at::ScalarType type) {
  if (!token_mask) return {};
  check_token_mask(op, logits, *token_mask);
  return token_mask->to(type).reshape({-1, 1});
}

/// numerator / denominator, and 0 without gradient where the denominator is 0.
Tensor ratio_or_zero(const Tensor& numerator, const Tensor& denominator) {
  const auto none = denominator == 0;
  return (numerator / denominator.masked_fill(none, 1)).masked_fill(none, 0);
}

/// The sums of topk_gating with the experts in G equal contiguous groups, segments added up.
struct GroupedSums {
  Tensor prob;        // [G, E / G] prob_sum
  Tensor load;        // [G, E / G], a constant
  Tensor num_tokens;  // scalar, a constant
};

GroupedSums grouped_sums(const char* op, const Tensor& sums, const char* argument,
                         int64_t num_groups) {
  TORCH_CHECK(sums.dim() == 1 || sums.dim() == 2, op, ": sums must have shape [2 E + 5] or ",
              "[S, 2 E + 5], got ", sums.sym_sizes());
  const auto width = sums.sym_size(-1).guard_int(__FILE__, __LINE__);
  TORCH_CHECK(width > RoutingSums::kTail && width % 2 == 1, op,
              ": sums must have shape [2 E + 5] or [S, 2 E + 5], got ", sums.sym_sizes());
  const auto num_experts = (width - RoutingSums::kTail) / 2;
  TORCH_CHECK(num_groups >= 1 && num_experts % num_groups == 0, op, ": ", argument,
              " must divide num_experts = ", num_experts, ", got ", num_groups);
  const auto total = sums.dim() == 2 ? sums.sum(0) : sums;
  const auto by_group = [&](int64_t begin) {
    return total.narrow(0, begin, num_experts)
        .unflatten(0, at::IntArrayRef{num_groups, num_experts / num_groups});
  };
  return {by_group(RoutingSums::prob), by_group(RoutingSums::load(num_experts)).detach(),
          total.select(0, RoutingSums::weight(num_experts)).detach()};
}

Tensor communication_loss_of_sums(const Tensor& sums, const Tensor& topk_indices,
                                  int64_t num_devices, int64_t max_devices,
                                  const OptionalTensor& token_weights) {
  constexpr const char* op = "communication_loss";
  const auto groups = grouped_sums(op, sums, "num_devices", num_devices);
  TORCH_CHECK(max_devices >= 1 && max_devices <= num_devices, op,
              ": max_devices must be from 1 to num_devices = ", num_devices, ", got ", max_devices);
  check_device(op, "topk_indices", topk_indices, "sums", sums);
  const auto indices = topk_indices.reshape_symint({-1, topk_indices.sym_size(-1)});
  const auto layout = dispatch_layout(indices, num_devices, groups.prob.numel());
  Tensor sent;  // [D]
  if (token_weights) {
    check_per_token(op, "token_weights", *token_weights, "topk_indices", topk_indices);
    sent =
        (layout.is_token_in_rank * token_weights->detach().to(sums.scalar_type()).reshape({-1, 1}))
            .sum(0);
  } else {
    sent = layout.num_tokens_per_rank.to(sums.scalar_type());
  }
  return ratio_or_zero((sent * groups.prob.sum(1)).sum() * num_devices / max_devices,
                       groups.num_tokens.square());
}

Tensor hierarchical_loss_of_sums(const Tensor& sums, int64_t top_k, int64_t num_groups) {
  constexpr const char* op = "hierarchical_loss";
  const auto groups = grouped_sums(op, sums, "num_groups", num_groups);
  const auto num_experts = groups.prob.numel();
  TORCH_CHECK(top_k >= 1 && top_k <= num_experts, op,
              ": top_k must be from 1 to num_experts = ", num_experts, ", got ", top_k);
  const auto prob = groups.prob.sum(1), load = groups.load.sum(1);  // [G]
  const auto between =
      ratio_or_zero((load * prob).sum() * num_groups, top_k * groups.num_tokens.square());
  const auto within = ratio_or_zero((groups.load * groups.prob).sum(1), load * prob) *
                      (num_experts / num_groups);  // [G]
  return (between + ratio_or_zero(within.sum(), (load * prob > 0).sum())) / 2;
}

}  // namespace

Tensor load_loss(const Tensor& clean_logits, const Tensor& noisy_logits, const Tensor& noise_stddev,
                 int64_t top_k, const OptionalTensor& token_mask) {
  constexpr const char* op = "load_loss";
  check_floating(op, "clean_logits", clean_logits);
  check_rows(op, "clean_logits", clean_logits, "E");
  for (const auto& [name, tensor] :
       {std::pair{"noisy_logits", &noisy_logits}, std::pair{"noise_stddev", &noise_stddev}}) {
    check_dtype(op, name, *tensor, clean_logits.scalar_type());
    check_device(op, name, *tensor, "clean_logits", clean_logits);
    check_sizes(op, name, *tensor, clean_logits.sym_sizes(), "of clean_logits");
  }
  const auto num_experts = clean_logits.sym_size(-1).guard_int(__FILE__, __LINE__);
  TORCH_CHECK(top_k >= 1 && top_k <= num_experts, op,
              ": top_k must be from 1 to num_experts = ", num_experts, ", got ", top_k);
  const auto rows = [&](const Tensor& tensor) {
    return widen(tensor).reshape_symint({-1, num_experts});
  };
  const auto clean = rows(clean_logits), noisy = rows(noisy_logits), stddev = rows(noise_stddev);
  const auto weights = token_weights_of(op, token_mask, clean_logits, clean.scalar_type());
  if (top_k == num_experts) {
    // Everybody is always chosen: the loads are equal. No value is read, it might be infinite.
    const auto zero = [](const Tensor& tensor) { return tensor.narrow(0, 0, 0).sum(); };
    return zero(clean) + zero(noisy) + zero(stddev);
  }

  const auto present = clean.isfinite() & noisy.isfinite();
  const auto lowest = -std::numeric_limits<double>::infinity();
  const auto [best, experts] =
      noisy.masked_fill(~present, lowest).topk(top_k + 1, /*dim=*/-1, true, true);
  const auto chosen =
      at::zeros_like(noisy, at::kBool).scatter(1, experts.narrow(1, 0, top_k), true);
  const auto threshold = at::where(chosen, best.narrow(1, top_k, 1), best.narrow(1, top_k - 1, 1));
  // Without an expert to pass one is chosen for certain. Infinities stay out of the arithmetic:
  // their gradient would be NaN.
  const auto unopposed = threshold == lowest;
  const auto distance = clean.masked_fill(~present, 0) - threshold.masked_fill(unopposed, 0);
  const auto smallest = stddev.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                            : std::numeric_limits<float>::epsilon();
  auto probability = at::special_ndtr(distance / stddev.clamp_min(smallest))
                         .masked_fill(unopposed, 1)
                         .masked_fill(~present, 0);
  if (weights.defined()) probability = at::where(weights > 0, probability * weights, 0);
  const auto load = probability.sum(0);
  const auto mean = load.mean();
  return ratio_or_zero((load - mean).square().mean(), mean.square());
}

Tensor communication_loss(const RoutingResult& routing, int64_t num_devices, int64_t max_devices,
                          const OptionalTensor& token_weights) {
  TORCH_CHECK(routing.sums.defined(),
              "communication_loss: routing must come from topk_gating with stats");
  return communication_loss_of_sums(routing.sums, routing.topk_indices, num_devices, max_devices,
                                    token_weights);
}

Tensor hierarchical_loss(const RoutingResult& routing, int64_t num_groups) {
  TORCH_CHECK(routing.sums.defined(),
              "hierarchical_loss: routing must come from topk_gating with stats");
  return hierarchical_loss_of_sums(routing.sums, routing.top_k(), num_groups);
}

Tensor router_l2_loss(const Tensor& logits, const OptionalTensor& token_mask) {
  constexpr const char* op = "router_l2_loss";
  check_floating(op, "logits", logits);
  check_rows(op, "logits", logits, "E");
  const auto x = widen(logits).reshape_symint({-1, logits.sym_size(-1)});
  auto squares = at::where(x.isfinite(), x, 0).square();
  const auto weights = token_weights_of(op, token_mask, logits, x.scalar_type());
  if (weights.defined()) {
    squares = squares * weights;
    return ratio_or_zero(squares.sum(), weights.sum() * x.sym_size(1));
  }
  return squares.sum() / x.sym_numel().max(1);
}

Tensor similarity_correlation(const Tensor& inputs, const Tensor& gates) {
  constexpr const char* op = "similarity_correlation";
  check_floating(op, "inputs", inputs);
  check_floating(op, "gates", gates);
  check_device(op, "gates", gates, "inputs", inputs);
  TORCH_CHECK(inputs.dim() == 2 && gates.dim() == 2 && inputs.sym_size(0) == gates.sym_size(0), op,
              ": inputs must have shape [B, D] and gates [B, N], got ", inputs.sym_sizes(), " and ",
              gates.sym_sizes());
  const auto of_length_one = [](const Tensor& rows) {
    const auto wide = widen(rows);
    // Not by norm, whose second derivative is NaN at 0.
    const auto squares = wide.square().sum(1, /*keepdim=*/true);
    const auto none = squares == 0;
    return (wide / squares.masked_fill(none, 1).sqrt()).masked_fill(none, 0);
  };
  // A row times a row is a small difference of large sums: not in a half type.
  const c10::impl::ExcludeDispatchKeyGuard leave_autocast(c10::autocast_dispatch_keyset);
  const auto u = of_length_one(inputs), v = of_length_one(gates);
  const auto type = at::promote_types(u.scalar_type(), v.scalar_type());
  const auto product = at::matmul(u.to(type).t(), v.to(type));  // [D, N]
  const auto count = inputs.sym_size(0);
  return product.square().sum() / (count * count).max(1);
}

Tensor mixture_nll(const Tensor& gate_logits, const Tensor& log_probs) {
  constexpr const char* op = "mixture_nll";
  check_floating(op, "gate_logits", gate_logits);
  check_floating(op, "log_probs", log_probs);
  check_device(op, "log_probs", log_probs, "gate_logits", gate_logits);
  check_rows(op, "gate_logits", gate_logits, "K");
  check_sizes(op, "log_probs", log_probs, gate_logits.sym_sizes(), "of gate_logits");
  const auto likelihoods =
      at::logsumexp(at::log_softmax(widen(gate_logits), -1) + widen(log_probs), {-1});
  return -likelihoods.sum() / likelihoods.sym_numel().max(1);
}

Tensor infonce(const Tensor& scores) {
  constexpr const char* op = "infonce";
  check_floating(op, "scores", scores);
  TORCH_CHECK(
      scores.dim() == 2 && scores.sym_size(0) == scores.sym_size(1) && scores.sym_size(0) >= 1, op,
      ": scores must have shape [B, B] with B >= 1, got ", scores.sym_sizes());
  const auto log_shares = at::log_softmax(widen(scores), 1);
  // As a tensor: a symbolic size has no logarithm.
  const auto count = at::ones_symint({scores.sym_size(0)}, log_shares.options()).sum();
  return log_shares.diagonal().mean() + count.log();
}

Tensor mine(const Tensor& joint_scores, const Tensor& marginal_scores) {
  constexpr const char* op = "mine";
  check_floating(op, "joint_scores", joint_scores);
  check_floating(op, "marginal_scores", marginal_scores);
  check_device(op, "marginal_scores", marginal_scores, "joint_scores", joint_scores);
  TORCH_CHECK(joint_scores.dim() == 1 && joint_scores.sym_size(0) >= 1, op,
              ": joint_scores must have shape [B] with B >= 1, got ", joint_scores.sym_sizes());
  TORCH_CHECK(marginal_scores.dim() == 1 && marginal_scores.sym_size(0) >= 1, op,
              ": marginal_scores must have shape [M] with M >= 1, got ",
              marginal_scores.sym_sizes());
  const auto marginal = widen(marginal_scores);
  const auto count = at::ones_symint({marginal.sym_size(0)}, marginal.options()).sum();
  return widen(joint_scores).mean() - (at::logsumexp(marginal, {0}) - count.log());
}

TORCH_LIBRARY_IMPL(equipoise, CompositeImplicitAutograd, m) {
  m.impl("load_loss", load_loss);
  m.impl("communication_loss", communication_loss_of_sums);
  m.impl("hierarchical_loss", hierarchical_loss_of_sums);
  m.impl("router_l2_loss", router_l2_loss);
  m.impl("similarity_correlation", similarity_correlation);
  m.impl("mixture_nll", mixture_nll);
  m.impl("infonce", infonce);
  m.impl("mine", mine);
}

}  // namespace equipoise
