// SPDX-License-Identifier: Apache-2.0
// nn::LossFreeBalancer and nn::EMABalancer: their rules, and when they count.
#include "nn/balancers.h"

#include <limits>
#include <sstream>

#include "nn/router.h"
#include "test_util.h"

namespace equipoise {
namespace {

using nn::EMABalancer;
using nn::EMABalancerOptions;
using nn::LossFreeBalancer;
using nn::LossFreeBalancerImpl;
using nn::LossFreeBalancerOptions;
using test::close;
using test::fails;
using test::same;

at::Tensor counts(std::vector<int64_t> values) { return torch::tensor(values, at::kLong); }

at::Tensor bias(std::vector<float> values) { return torch::tensor(values, at::kFloat); }

TEST(LossFreeBalancer, StepsAgainstTheLoad) {
  LossFreeBalancer balancer(LossFreeBalancerOptions(4).bias_update_rate(0.25));
  const auto address = balancer->expert_bias.data_ptr();
  balancer->record(counts({7, 0, 2, 3}));
  balancer->record(
      counts({0, 0, 0, 1, 0, 0, 1, 2}).view({2, 4}));  // segments: 7, 0, 3, 6 of mean 4
  EXPECT_TRUE(same(balancer->tokens_per_expert, counts({7, 0, 3, 6})));
  balancer->update();
  EXPECT_TRUE(same(balancer->expert_bias, bias({-0.25, 0.25, 0.25, -0.25})));
  EXPECT_EQ(balancer->expert_bias.data_ptr(), address);
  EXPECT_TRUE(same(balancer->tokens_per_expert, counts({0, 0, 0, 0})));
  balancer->update();  // nothing recorded: nothing to do
  EXPECT_TRUE(same(balancer->expert_bias, bias({-0.25, 0.25, 0.25, -0.25})));
}

TEST(LossFreeBalancer, ComparesTheMeanExactly) {  // in float32 it would round to the first count
  LossFreeBalancer balancer(LossFreeBalancerOptions(2).bias_update_rate(1));
  balancer->record(counts({1 << 24, (1 << 24) + 1}));
  balancer->update();
  EXPECT_TRUE(same(balancer->expert_bias, bias({1, -1})));
}

TEST(LossFreeBalancer, StepsInProportionAndCenters) {
  LossFreeBalancer balancer(LossFreeBalancerOptions(4).bias_update_rate(0.5).mode("proportional"));
  balancer->record(counts({8, 4, 4, 0}));
  balancer->update();
  EXPECT_TRUE(close(balancer->expert_bias, bias({-0.5, 0, 0, 0.5}), 1e-7));
  balancer->update();
  EXPECT_TRUE(close(balancer->expert_bias, bias({-0.5, 0, 0, 0.5}), 1e-7));

  LossFreeBalancer centered(LossFreeBalancerOptions(4).bias_update_rate(1).center(true));
  for (int step = 0; step < 5; ++step) {
    centered->record(counts({97, 1, 1, 1}));
    centered->update();
  }
  EXPECT_TRUE(close(centered->expert_bias, bias({-7.5, 2.5, 2.5, 2.5}), 1e-6));
}

TEST(EMABalancer, FollowsTheAverageLoad) {
  EMABalancer balancer(EMABalancerOptions(4).balancing_strength(0.5).beta(0.75));
  auto average = at::full({4}, 0.25, at::kDouble);
  for (const auto& recorded : {counts({9, 5, 5, 1}), counts({2, 2, 4, 0}), counts({0, 0, 3, 0})}) {
    balancer->record(recorded);
    balancer->update();
    average = 0.75 * average + 0.25 * recorded / recorded.sum().to(at::kDouble);
    EXPECT_TRUE(close(balancer->expert_bias, (-0.5 * (4 * average - 1)).to(at::kFloat), 1e-6));
  }
  const auto before = balancer->expert_bias.clone();
  balancer->update();
  EXPECT_TRUE(same(balancer->expert_bias, before));
}

TEST(Balancers, CountOnlyTokensThatAreLearntFrom) {
  LossFreeBalancer balancer(2);
  balancer->eval();
  balancer->record(counts({3, 1}));
  balancer->train();
  {
    const at::NoGradGuard no_grad;
    balancer->record(counts({3, 1}));
  }
  EXPECT_TRUE(same(balancer->tokens_per_expert, counts({0, 0})));
  EXPECT_TRUE(fails([&] { balancer->update(); }, {"LossFreeBalancer", "before any recorded"}));
  balancer->record(counts({3, 1}));
  EXPECT_TRUE(same(balancer->tokens_per_expert, counts({3, 1})));
}

TEST(Balancers, StayFloat32) {
  struct ModelImpl : torch::nn::Module {
    ModelImpl() {
      router = register_module("router", nn::TopKRouter(6, 4, 2));
      balancer = register_module("balancer", LossFreeBalancer(4));
    }
    nn::TopKRouter router{nullptr};
    LossFreeBalancer balancer{nullptr};
  } model;
  const auto values = bias({1.001, -0.3, 1e-7, 0.0});
  model.balancer->expert_bias.copy_(values);
  for (const auto type : {at::kBFloat16, at::kHalf, at::kDouble}) {
    model.to(type);
    EXPECT_EQ(model.router->weight.scalar_type(), type);
    EXPECT_TRUE(same(model.balancer->expert_bias, values));
    model.to(at::Device(at::kCPU), type);
    EXPECT_TRUE(same(model.balancer->expert_bias, values));
  }
  EXPECT_EQ(model.named_buffers().size(), 1);
}

TEST(Balancers, SaveAndClone) {
  LossFreeBalancer balancer(LossFreeBalancerOptions(4).bias_update_rate(0.25));
  balancer->record(counts({9, 5, 5, 1}));
  balancer->update();
  balancer->record(counts({9, 5, 5, 1}));
  std::stringstream stream;
  torch::save(balancer, stream);
  LossFreeBalancer loaded(4);
  torch::load(loaded, stream);
  EXPECT_TRUE(same(loaded->expert_bias, balancer->expert_bias));

  const auto copy = std::dynamic_pointer_cast<LossFreeBalancerImpl>(balancer->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_TRUE(same(copy->expert_bias, balancer->expert_bias));
  EXPECT_TRUE(same(copy->tokens_per_expert, counts({0, 0, 0, 0})));
  copy->record(counts({1, 0, 0, 0}));
  copy->update();
  EXPECT_TRUE(same(balancer->tokens_per_expert, counts({9, 5, 5, 1})));
  EXPECT_TRUE(same(balancer->expert_bias, bias({-0.25, 0, 0, 0.25})));

  balancer->reset_parameters();
  EXPECT_TRUE(same(balancer->expert_bias, bias({0, 0, 0, 0})));
  EXPECT_TRUE(fails([&] { balancer->update(); }, {"before any recorded"}));
}

TEST(Balancers, EvenOutASkewedRouter) {
  const auto spread = [](const at::Tensor& load) {  // MaxVio
    return (load.max().item<double>() / load.to(at::kDouble).mean().item<double>()) - 1;
  };
  const auto train = [&](auto balancer) {
    at::manual_seed(0);
    const at::Tensor skew = 3 * at::arange(8, 0, -1).to(at::kFloat) / 8;
    double first = -1, last = -1;
    for (int step = 0; step < 300; ++step) {
      const auto routing = topk_gating(at::randn({256, 8}) * 0.5 + skew, 1,
                                       TopKGatingOptions().expert_bias(balancer->expert_bias));
      balancer->record(routing.tokens_per_expert);
      last = spread(routing.tokens_per_expert);
      if (first < 0) first = last;
      balancer->update();
    }
    return std::pair(first, last);
  };
  const auto loss_free = train(LossFreeBalancer(LossFreeBalancerOptions(8).bias_update_rate(2e-3)));
  EXPECT_GT(loss_free.first, 3);
  EXPECT_LT(loss_free.second, 0.5);
  const auto ema = train(EMABalancer(EMABalancerOptions(8).balancing_strength(1).beta(.95)));
  EXPECT_GT(ema.first, 3);
  EXPECT_LT(ema.second, 1);
}

TEST(Balancers, PrintAndNameTheWrongArgument) {
  std::ostringstream stream;
  stream << LossFreeBalancer(4) << EMABalancer(4);
  EXPECT_EQ(stream.str(),
            "equipoise::nn::LossFreeBalancer(num_experts=4, bias_update_rate=0.001, mode=sign, "
            "center=false)equipoise::nn::EMABalancer(num_experts=4, balancing_strength=0.05, "
            "beta=0.9)");
  EXPECT_TRUE(fails([] { LossFreeBalancer(0); }, {"LossFreeBalancer", "num_experts", "0"}));
  EXPECT_TRUE(fails([] { LossFreeBalancer(LossFreeBalancerOptions(4).bias_update_rate(-1)); },
                    {"LossFreeBalancer", "bias_update_rate", "-1"}));
  EXPECT_TRUE(fails([] { LossFreeBalancer(LossFreeBalancerOptions(4).mode("quantile")); },
                    {"LossFreeBalancer", "mode", "proportional", "quantile"}));
  EXPECT_TRUE(fails([] { EMABalancer(EMABalancerOptions(4).balancing_strength(-1)); },
                    {"EMABalancer", "balancing_strength", "-1"}));
  EXPECT_TRUE(fails([] { EMABalancer(EMABalancerOptions(4).beta(1)); },
                    {"EMABalancer", "beta", "[0, 1)", "1"}));
  EMABalancer balancer(4);
  EXPECT_TRUE(fails(
      [&] {
        balancer->record(counts({1, 2}));
      },
      {"EMABalancer", "tokens_per_expert", "4", "[2]"}));
  EXPECT_TRUE(fails([&] { balancer->record(at::ones({4})); },
                    {"EMABalancer", "tokens_per_expert", "Long", "Float"}));
}

}  // namespace
}  // namespace equipoise
