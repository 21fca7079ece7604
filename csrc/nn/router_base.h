// SPDX-License-Identifier: Apache-2.0
// The definitions of RouterImplBase and TopKRouterImplBase, for the files that instantiate them.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/topk.h>
#include <torch/nn/init.h>

#include <cmath>
#include <limits>

#include "../checks.h"
#include "leave_autocast.h"
#include "router.h"

namespace equipoise::nn {

template <typename Derived>
void RouterImplBase<Derived>::reset() {
  const auto& options = static_cast<const Derived*>(this)->options;
  const auto num_experts = options.num_experts();
  TORCH_CHECK(options.d_model() >= 1, Derived::kName, ": d_model must be >= 1, got ",
              options.d_model());
  TORCH_CHECK(num_experts >= 1, Derived::kName, ": num_experts must be >= 1, got ", num_experts);
  TORCH_CHECK(options.top_k() >= 1 && options.top_k() <= num_experts, Derived::kName,
              ": top_k must be from 1 to num_experts = ", num_experts, ", got ", options.top_k());
  TORCH_CHECK(options.jitter_eps() >= 0 && options.jitter_eps() < 1, Derived::kName,
              ": jitter_eps must be in [0, 1), got ", options.jitter_eps());
  TORCH_CHECK(std::isfinite(options.init_std()) && options.init_std() >= 0, Derived::kName,
              ": init_std must be finite and >= 0, got ", options.init_std());
  weight = this->register_parameter("weight", at::empty({num_experts, options.d_model()}));
  if (options.bias()) bias = this->register_parameter("bias", at::empty({num_experts}));
  RouterImplBase::reset_parameters();
}

template <typename Derived>
void RouterImplBase<Derived>::reset_parameters() {
  torch::nn::init::normal_(weight, 0.0, static_cast<const Derived*>(this)->options.init_std());
  if (bias.defined()) torch::nn::init::zeros_(bias);
}

template <typename Derived>
at::Tensor RouterImplBase<Derived>::tokens_of(const at::Tensor& x) {
  const auto& options = static_cast<const Derived*>(this)->options;
  check_floating(Derived::kName, "x", x);
  check_device(Derived::kName, "x", x, "weight", weight);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == options.d_model(), Derived::kName,
              ": x must have shape [..., d_model] = [..., ", options.d_model(), "], got ",
              x.sizes());
  const auto tokens = x.to(accumulate_type(x.scalar_type()));
  const auto eps = options.jitter_eps();
  if (!this->is_training() || eps == 0) return tokens;
  return tokens * at::empty_like(tokens).uniform_(1 - eps, 1 + eps);
}

template <typename Derived>
at::Tensor RouterImplBase<Derived>::logits_of(const at::Tensor& tokens) {
  const LeaveAutocast leave_autocast;
  const auto type = tokens.scalar_type();
  return at::linear(tokens, weight.to(type),
                    bias.defined() ? std::optional(bias.to(type)) : std::nullopt);
}

template <typename Derived>
void RouterImplBase<Derived>::print_options(std::ostream& stream) const {
  const auto& options = static_cast<const Derived*>(this)->options;
  stream << std::boolalpha << "equipoise::nn::" << Derived::kName
         << "(d_model=" << options.d_model() << ", num_experts=" << options.num_experts()
         << ", top_k=" << options.top_k();
  if (options.bias()) stream << ", bias=true";
  if (options.jitter_eps() != 0) stream << ", jitter_eps=" << options.jitter_eps();
  if (options.init_std() != 0.02) stream << ", init_std=" << options.init_std();
}

template <typename Derived>
void TopKRouterImplBase<Derived>::reset() {
  RouterImplBase<Derived>::reset();
  const auto& options = static_cast<const Derived*>(this)->options;
  TORCH_CHECK(options.expert_dropout() >= 0 && options.expert_dropout() < 1, Derived::kName,
              ": expert_dropout must be in [0, 1), got ", options.expert_dropout());
  // Without tokens topk_gating does nothing but check its options.
  const auto no_logits = at::empty({0, options.num_experts()}, this->weight.options());
  topk_gating(no_logits, options.top_k(), gating_options().stats(false));
}

template <typename Derived>
TopKGatingOptions TopKRouterImplBase<Derived>::gating_options() const {
  const auto& options = static_cast<const Derived*>(this)->options;
  return TopKGatingOptions()
      .score_function(options.score_function())
      .norm_topk_prob(options.norm_topk_prob())
      .scaling_factor(options.scaling_factor())
      .num_groups(options.num_groups())
      .group_topk(options.group_topk())
      .group_score(options.group_score());
}

template <typename Derived>
at::Tensor TopKRouterImplBase<Derived>::drop_experts(const at::Tensor& logits) {
  const auto& options = static_cast<const Derived*>(this)->options;
  if (!this->is_training() || options.expert_dropout() == 0) return logits;
  const auto draws = at::rand({options.num_experts()}, logits.options().dtype(at::kFloat));
  const auto stay = std::get<1>(draws.topk(options.top_k()));
  const auto dropped = (draws < options.expert_dropout()).scatter(0, stay, false);
  return logits.masked_fill(dropped, -std::numeric_limits<double>::infinity());
}

template <typename Derived>
void TopKRouterImplBase<Derived>::print_options(std::ostream& stream) const {
  const auto& options = static_cast<const Derived*>(this)->options;
  RouterImplBase<Derived>::print_options(stream);
  stream << ", score_function=" << options.score_function()
         << ", norm_topk_prob=" << options.norm_topk_prob()
         << ", scaling_factor=" << options.scaling_factor();
  if (options.num_groups() != 1) {
    stream << ", num_groups=" << options.num_groups()
           << ", group_topk=" << options.group_topk().value()
           << ", group_score=" << options.group_score();
  }
  if (options.expert_dropout() != 0) stream << ", expert_dropout=" << options.expert_dropout();
}

}  // namespace equipoise::nn
