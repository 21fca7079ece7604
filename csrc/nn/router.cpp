// SPDX-License-Identifier: Apache-2.0
#include "router.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/nn/init.h>

#include <utility>

#include "../checks.h"

namespace equipoise::nn {

TopKRouterImpl::TopKRouterImpl(TopKRouterOptions options) : options(std::move(options)) { reset(); }

void TopKRouterImpl::reset() {
  const auto d_model = options.d_model();
  const auto num_experts = options.num_experts();
  TORCH_CHECK(d_model >= 1, "TopKRouter: d_model must be >= 1, got ", d_model);
  TORCH_CHECK(num_experts >= 1, "TopKRouter: num_experts must be >= 1, got ", num_experts);
  TORCH_CHECK(options.top_k() >= 1 && options.top_k() <= num_experts,
              "TopKRouter: top_k must be from 1 to num_experts = ", num_experts, ", got ",
              options.top_k());
  weight = register_parameter("weight", at::empty({num_experts, d_model}));
  reset_parameters();
}

void TopKRouterImpl::reset_parameters() { torch::nn::init::normal_(weight, 0.0, 0.02); }

void TopKRouterImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "equipoise::nn::TopKRouter(d_model=" << options.d_model()
         << ", num_experts=" << options.num_experts() << ", top_k=" << options.top_k()
         << ", score_function=" << options.score_function()
         << ", norm_topk_prob=" << options.norm_topk_prob()
         << ", scaling_factor=" << options.scaling_factor() << ")";
}

RoutingResult TopKRouterImpl::forward(const at::Tensor& x,
                                      const std::optional<at::Tensor>& token_mask,
                                      const std::optional<at::Tensor>& expert_bias) {
  check_floating("TopKRouter", "x", x);
  check_device("TopKRouter", "x", x, "weight", weight);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == options.d_model(),
              "TopKRouter: x must have shape [..., d_model] = [..., ", options.d_model(), "], got ",
              x.sizes());
  const auto type = accumulate_type(x.scalar_type());
  const c10::impl::ExcludeDispatchKeyGuard leave_autocast(c10::autocast_dispatch_keyset);
  const auto logits = at::linear(x.to(type), weight.to(type));
  return topk_gating(logits, options.top_k(),
                     TopKGatingOptions()
                         .score_function(options.score_function())
                         .norm_topk_prob(options.norm_topk_prob())
                         .scaling_factor(options.scaling_factor())
                         .token_mask(token_mask)
                         .expert_bias(expert_bias));
}

}  // namespace equipoise::nn
