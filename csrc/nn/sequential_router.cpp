// SPDX-License-Identifier: Apache-2.0
#include "sequential_router.h"

#include <ATen/ops/gru.h>
#include <ATen/ops/gru_cell.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <utility>
#include <vector>

#include "router_base.h"

namespace equipoise::nn {

template class RouterImplBase<SequentialRouterImpl>;
template class TopKRouterImplBase<SequentialRouterImpl>;

SequentialRouterImpl::SequentialRouterImpl(SequentialRouterOptions options)
    : options(std::move(options)) {
  reset();
}

void SequentialRouterImpl::reset() {
  TORCH_CHECK(options.hidden_size() >= 0,
              "SequentialRouter: hidden_size must be >= 1, or 0 for d_model, got ",
              options.hidden_size());
  TORCH_CHECK(options.damping() > 0 && options.damping() <= 1,
              "SequentialRouter: damping must be in (0, 1], got ", options.damping());
  TORCH_CHECK(options.influence() >= 0 && options.influence() <= 1,
              "SequentialRouter: influence must be in [0, 1], got ", options.influence());
  TopKRouterImplBase::reset();
  const auto hidden_size = options.hidden_size() == 0 ? options.d_model() : options.hidden_size();
  gru = register_module(
      "gru",
      torch::nn::GRU(torch::nn::GRUOptions(options.d_model(), hidden_size).batch_first(true)));
  sequence_weight =
      register_parameter("sequence_weight", at::empty({options.num_experts(), hidden_size}));
  torch::nn::init::normal_(sequence_weight, 0.0, options.init_std());
}

void SequentialRouterImpl::reset_parameters() {
  RouterImplBase::reset_parameters();
  gru->reset_parameters();
  torch::nn::init::normal_(sequence_weight, 0.0, options.init_std());
}

void SequentialRouterImpl::pretty_print(std::ostream& stream) const {
  print_options(stream);
  stream << ", hidden_size=" << sequence_weight.size(1) << ", damping=" << options.damping()
         << ", influence=" << options.influence() << ")";
}

at::Tensor SequentialRouterImpl::states_of(at::Tensor tokens,
                                           const std::optional<at::Tensor>& token_mask,
                                           const std::optional<at::Tensor>& reset) {
  const auto batch = tokens.size(0), length = tokens.size(1), hidden = sequence_weight.size(1);
  if (batch == 0 || length == 0) return at::zeros({batch, length, hidden}, tokens.options());
  std::vector<at::Tensor> weights;  // w_ih, w_hh, b_ih, b_hh
  for (const auto& weight : gru->parameters()) weights.push_back(weight.to(tokens.scalar_type()));
  auto state = at::zeros({batch, hidden}, tokens.options());
  if (options.damping() == 1 && !token_mask && !reset) {
    return std::get<0>(at::gru(tokens, state.unsqueeze(0), weights, /*has_biases=*/true,
                               /*num_layers=*/1, /*dropout=*/0.0, is_training(),
                               /*bidirectional=*/false, /*batch_first=*/true));
  }
  at::Tensor real;
  if (token_mask) {
    real = (*token_mask > 0).unsqueeze(-1);
    tokens = tokens.masked_fill(real.logical_not(), 0);  // NaN there would reach the gradients
  }
  std::vector<at::Tensor> states;
  for (int64_t s = 0; s < length; ++s) {
    if (reset) state = state.masked_fill(reset->select(1, s).unsqueeze(1), 0);
    const auto next = at::gru_cell(tokens.select(1, s), options.damping() * state, weights[0],
                                   weights[1], weights[2], weights[3]);
    state = token_mask ? at::where(real.select(1, s), next, state) : next;
    states.push_back(state);
  }
  return at::stack(states, 1);
}

RoutingResult SequentialRouterImpl::forward(const at::Tensor& x,
                                            const std::optional<at::Tensor>& token_mask,
                                            const std::optional<at::Tensor>& expert_bias,
                                            const std::optional<at::Tensor>& reset) {
  TORCH_CHECK(x.dim() == 3, "SequentialRouter: x must have shape [B, S, d_model], got ", x.sizes());
  const auto tokens = tokens_of(x);
  if (token_mask) check_per_token(kName, "token_mask", *token_mask, "x", x);
  if (reset) {
    check_dtype(kName, "reset", *reset, at::kBool);
    check_per_token(kName, "reset", *reset, "x", x);
  }
  const LeaveAutocast leave_autocast;
  auto logits =
      at::linear(states_of(tokens, token_mask, reset), sequence_weight.to(tokens.scalar_type()));
  logits = options.influence() * logits + (1 - options.influence()) * logits_of(tokens);
  return topk_gating(drop_experts(logits), options.top_k(),
                     gating_options().token_mask(token_mask).expert_bias(expert_bias));
}

}  // namespace equipoise::nn
