// SPDX-License-Identifier: Apache-2.0
#include "router.h"

#include <ATen/ops/randn_like.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/zeros.h>

#include "router_base.h"

namespace equipoise::nn {

template class RouterImplBase<TopKRouterImpl>;
template class RouterImplBase<NoisyTopKRouterImpl>;
template class RouterImplBase<DenseRouterImpl>;
template class TopKRouterImplBase<TopKRouterImpl>;
template class TopKRouterImplBase<NoisyTopKRouterImpl>;
template class TopKRouterImplBase<DenseRouterImpl>;

TopKRouterImpl::TopKRouterImpl(TopKRouterOptions options) : options(std::move(options)) { reset(); }

void TopKRouterImpl::pretty_print(std::ostream& stream) const {
  print_options(stream);
  stream << ")";
}

RoutingResult TopKRouterImpl::forward(const at::Tensor& x,
                                      const std::optional<at::Tensor>& token_mask,
                                      const std::optional<at::Tensor>& expert_bias) {
  return topk_gating(drop_experts(logits_of(tokens_of(x))), options.top_k(),
                     gating_options().token_mask(token_mask).expert_bias(expert_bias));
}

NoisyTopKRouterImpl::NoisyTopKRouterImpl(NoisyTopKRouterOptions options)
    : options(std::move(options)) {
  reset();
}

void NoisyTopKRouterImpl::reset() {
  TopKRouterImplBase::reset();
  TORCH_CHECK(std::isfinite(options.noise_epsilon()) && options.noise_epsilon() > 0,
              "NoisyTopKRouter: noise_epsilon must be finite and > 0, got ",
              options.noise_epsilon());
  noise_weight = register_parameter("noise_weight", at::zeros(weight.sizes()));
  forget();
}

void NoisyTopKRouterImpl::reset_parameters() {
  RouterImplBase::reset_parameters();
  torch::nn::init::zeros_(noise_weight);
  forget();
}

void NoisyTopKRouterImpl::forget() { clean_logits = noisy_logits = noise_stddev = at::Tensor(); }

void NoisyTopKRouterImpl::pretty_print(std::ostream& stream) const {
  print_options(stream);
  stream << ", noise_epsilon=" << options.noise_epsilon() << ")";
}

RoutingResult NoisyTopKRouterImpl::forward(const at::Tensor& x,
                                           const std::optional<at::Tensor>& token_mask,
                                           const std::optional<at::Tensor>& expert_bias) {
  const auto tokens = tokens_of(x);
  const auto logits = drop_experts(logits_of(tokens));
  auto gating = gating_options().token_mask(token_mask).expert_bias(expert_bias);
  if (is_training()) {
    const LeaveAutocast leave_autocast;
    clean_logits = logits;
    noise_stddev = at::softplus(at::linear(tokens, noise_weight.to(tokens.scalar_type()))) +
                   options.noise_epsilon();
    const auto noise = noise_stddev * at::randn_like(logits);
    noisy_logits = logits + noise;
    gating.noise(noise);
  }
  return topk_gating(logits, options.top_k(), gating);
}

DenseRouterImpl::DenseRouterImpl(DenseRouterOptions options) : options(std::move(options)) {
  reset();
}

void DenseRouterImpl::pretty_print(std::ostream& stream) const {
  print_options(stream);
  stream << ")";
}

RoutingResult DenseRouterImpl::forward(const at::Tensor& x,
                                       const std::optional<at::Tensor>& token_mask) {
  return topk_gating(drop_experts(logits_of(tokens_of(x))), options.top_k(),
                     gating_options().token_mask(token_mask));
}

}  // namespace equipoise::nn
