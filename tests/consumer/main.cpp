// SPDX-License-Identifier: Apache-2.0
// An application that links the installed package: one training step of a MoELayer with its balance
// loss. Succeeds if the step lowers the loss. The lines of train_step() are the example of
// README.md.
#include <equipoise/equipoise.h>
#include <torch/torch.h>

#include <iostream>

namespace {

double loss_of(equipoise::nn::MoELayer& layer, const torch::Tensor& x,
               const torch::Tensor& target) {
  torch::NoGradGuard no_grad;
  return torch::mse_loss(std::get<0>(layer->forward(x)), target).item<double>();
}

void train_step(equipoise::nn::MoELayer& layer, const torch::Tensor& x,
                const torch::Tensor& target) {
  equipoise::nn::SwitchBalanceLoss balance(1e-2);
  torch::optim::SGD optimizer(layer->parameters(), /*lr=*/0.5);

  auto [y, routing] = layer->forward(x);
  auto loss = torch::mse_loss(y, target) + balance->forward(routing);
  loss.backward();
  optimizer.step();
  std::cout << "tokens per expert: " << routing.tokens_per_expert << "\n";
}

}  // namespace

int main() {
  torch::manual_seed(0);
  equipoise::nn::MoELayer layer(equipoise::nn::MoELayerOptions(/*d_model=*/64, /*d_hidden=*/128,
                                                               /*num_experts=*/8, /*top_k=*/2));
  const auto x = torch::randn({512, 64});
  const auto target = torch::tanh(x);
  const double before = loss_of(layer, x, target);
  train_step(layer, x, target);
  const double after = loss_of(layer, x, target);
  std::cout << "equipoise " << equipoise::version() << " consumer: loss " << before
            << " before the step, " << after << " after\n";
  return after < before ? 0 : 1;
}
