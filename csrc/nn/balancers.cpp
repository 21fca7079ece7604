// SPDX-License-Identifier: Apache-2.0
#include "balancers.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/graph_task.h>

#include <cmath>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "../checks.h"

namespace equipoise::nn {
namespace {

/// Whether this is the second forward of Python's `checkpoint(..., use_reentrant=False)`, which may
/// run these modules too: it runs inside a backward pass and catches its saved tensors with hooks.
/// The reentrant kind has none, and needs none: its first forward runs without gradients.
bool recomputing() {
  return torch::autograd::get_current_graph_task_id() != -1 &&
         !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

}  // namespace

template <typename Derived>
void BalancerImplBase<Derived>::record(const at::Tensor& counts) {
  const auto num_experts = tokens_per_expert.size(0);
  check_dtype(Derived::kName, "tokens_per_expert", counts, at::kLong);
  TORCH_CHECK(counts.dim() >= 1 && counts.size(-1) == num_experts, Derived::kName,
              ": tokens_per_expert must have shape [..., E] = [..., ", num_experts, "], got ",
              counts.sizes());
  if (!this->is_training() || !at::GradMode::is_enabled() || recomputing()) return;
  if (counts.device() != tokens_per_expert.device()) {  // the module has moved
    tokens_per_expert.set_data(tokens_per_expert.to(counts.device()));
  }
  tokens_per_expert.add_(counts.reshape({-1, num_experts}).sum(0));
  recorded_ = true;
}

template <typename Derived>
void BalancerImplBase<Derived>::update(c10d::ProcessGroup* group) {
  const at::NoGradGuard no_grad;
  if (group != nullptr) {
    std::vector<at::Tensor> counts{tokens_per_expert};
    group->allreduce(counts)->wait();
    // A rank that has recorded nothing must not raise before the others have its counts: they would
    // wait for it. Now either all ranks raise or none does; only such a rank waits for the device.
    recorded_ = recorded_ || tokens_per_expert.any().template item<bool>();
  }
  TORCH_CHECK(
      recorded_, Derived::kName,
      ": update before any recorded forward pass: record tokens_per_expert in training mode "
      "with gradients first, and update once after each optimizer step");
  const auto counts = tokens_per_expert.to(expert_bias.device());
  const auto total = counts.sum();  // 0: nothing was recorded since the last update
  const auto next = static_cast<Derived*>(this)->next_bias(counts, total);
  expert_bias.copy_(at::where(total > 0, next, expert_bias));
  tokens_per_expert.zero_();
}

template <typename Derived>
void BalancerImplBase<Derived>::reset_parameters() {
  const at::NoGradGuard no_grad;
  for (auto& buffer : this->buffers(/*recurse=*/false)) buffer.zero_();
  tokens_per_expert.zero_();
  recorded_ = false;
}

template <typename Derived>
void BalancerImplBase<Derived>::reset() {
  const auto num_experts = static_cast<Derived*>(this)->options.num_experts();
  TORCH_CHECK(num_experts >= 1, Derived::kName, ": num_experts must be >= 1, got ", num_experts);
  expert_bias = this->register_buffer("expert_bias", at::zeros({num_experts}, at::kFloat));
  tokens_per_expert = at::zeros({num_experts}, at::kLong);
  recorded_ = false;
}

template <typename Derived>
void BalancerImplBase<Derived>::to(torch::Device device, torch::Dtype, bool non_blocking) {
  to(device, non_blocking);
}

template <typename Derived>
void BalancerImplBase<Derived>::to(torch::Dtype, bool) {}

template class BalancerImplBase<LossFreeBalancerImpl>;
template class BalancerImplBase<EMABalancerImpl>;

LossFreeBalancerImpl::LossFreeBalancerImpl(LossFreeBalancerOptions options)
    : options(std::move(options)) {
  reset();
}

void LossFreeBalancerImpl::reset() {
  const auto rate = options.bias_update_rate();
  TORCH_CHECK(std::isfinite(rate) && rate >= 0,
              "LossFreeBalancer: bias_update_rate must be finite and >= 0, got ", rate);
  TORCH_CHECK(options.mode() == "sign" || options.mode() == "proportional",
              "LossFreeBalancer: mode must be sign or proportional, got ", options.mode());
  BalancerImplBase::reset();
}

void LossFreeBalancerImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha
         << "equipoise::nn::LossFreeBalancer(num_experts=" << options.num_experts()
         << ", bias_update_rate=" << options.bias_update_rate() << ", mode=" << options.mode()
         << ", center=" << options.center() << ")";
}

at::Tensor LossFreeBalancerImpl::next_bias(const at::Tensor& counts,
                                           const at::Tensor& total) const {
  // Integers subtract exactly: E (mean - C_e) without rounding the mean.
  auto shortfall = total - options.num_experts() * counts;
  if (options.mode() == "sign") {
    shortfall = shortfall.sign();
  } else {
    shortfall = shortfall.to(at::kDouble) / total;
  }
  const auto bias = expert_bias + options.bias_update_rate() * shortfall;
  return (options.center() ? bias - bias.mean() : bias).to(at::kFloat);
}

EMABalancerImpl::EMABalancerImpl(EMABalancerOptions options) : options(std::move(options)) {
  reset();
}

void EMABalancerImpl::reset() {
  const auto strength = options.balancing_strength();
  TORCH_CHECK(std::isfinite(strength) && strength >= 0,
              "EMABalancer: balancing_strength must be finite and >= 0, got ", strength);
  TORCH_CHECK(options.beta() >= 0 && options.beta() < 1,
              "EMABalancer: beta must be in [0, 1), got ", options.beta());
  BalancerImplBase::reset();
}

void EMABalancerImpl::pretty_print(std::ostream& stream) const {
  stream << "equipoise::nn::EMABalancer(num_experts=" << options.num_experts()
         << ", balancing_strength=" << options.balancing_strength() << ", beta=" << options.beta()
         << ")";
}

at::Tensor EMABalancerImpl::next_bias(const at::Tensor& counts, const at::Tensor& total) const {
  // The bias is affine in the average, so its own average is the same and m is not kept.
  const auto load = options.num_experts() * counts.to(at::kDouble) / total;
  const auto target = (-options.balancing_strength() * (load - 1)).to(at::kFloat);
  return at::lerp(expert_bias, target, 1 - options.beta());
}

}  // namespace equipoise::nn
