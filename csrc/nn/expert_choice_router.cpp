// SPDX-License-Identifier: Apache-2.0
#include "expert_choice_router.h"

#include <utility>

#include "router_base.h"

namespace equipoise::nn {

template class RouterImplBase<ExpertChoiceRouterImpl>;

ExpertChoiceRouterImpl::ExpertChoiceRouterImpl(ExpertChoiceRouterOptions options)
    : options(std::move(options)) {
  reset();
}

void ExpertChoiceRouterImpl::pretty_print(std::ostream& stream) const {
  print_options(stream);
  stream << ")";
}

ExpertChoiceResult ExpertChoiceRouterImpl::forward(const at::Tensor& x,
                                                   const std::optional<at::Tensor>& token_mask) {
  const auto logits = logits_of(tokens_of(x));
  const auto num_experts = options.num_experts();
  const auto num_tokens = logits.numel() / num_experts;
  const auto capacity = (options.top_k() * num_tokens + num_experts - 1) / num_experts;
  return expert_choice(logits, capacity, token_mask);
}

}  // namespace equipoise::nn
