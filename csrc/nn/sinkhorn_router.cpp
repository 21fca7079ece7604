// SPDX-License-Identifier: Apache-2.0
#include "sinkhorn_router.h"

#include <utility>

#include "../ops/sinkhorn.h"
#include "router_base.h"

namespace equipoise::nn {

template class RouterImplBase<SinkhornRouterImpl>;
template class TopKRouterImplBase<SinkhornRouterImpl>;

SinkhornRouterImpl::SinkhornRouterImpl(SinkhornRouterOptions options)
    : options(std::move(options)) {
  reset();
}

void SinkhornRouterImpl::reset() {
  TORCH_CHECK(options.num_iters() >= 1, "SinkhornRouter: num_iters must be >= 1, got ",
              options.num_iters());
  TORCH_CHECK(options.num_groups() == 1,
              "SinkhornRouter: num_groups must be 1: the plan has none, got ",
              options.num_groups());
  TopKRouterImplBase::reset();
}

void SinkhornRouterImpl::pretty_print(std::ostream& stream) const {
  print_options(stream);
  stream << ", num_iters=" << options.num_iters() << ")";
}

RoutingResult SinkhornRouterImpl::forward(const at::Tensor& x,
                                          const std::optional<at::Tensor>& token_mask) {
  const auto logits = drop_experts(logits_of(tokens_of(x)));
  auto gating = gating_options().token_mask(token_mask);
  if (is_training()) {
    auto plan = sinkhorn(logits, options.num_iters(), token_mask);
    const auto absent = -std::numeric_limits<double>::infinity();
    plan = plan.masked_fill((logits > absent).logical_not(), absent);  // not just 0, by underflow
    const auto choice =
        TopKGatingOptions().score_function("identity").token_mask(token_mask).stats(false);
    gating.forced_indices(topk_gating(plan, options.top_k(), choice).topk_indices);
  }
  return topk_gating(logits, options.top_k(), gating);
}

}  // namespace equipoise::nn
