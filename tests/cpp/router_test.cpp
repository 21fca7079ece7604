// SPDX-License-Identifier: Apache-2.0
// nn::TopKRouter, nn::NoisyTopKRouter and nn::DenseRouter: a linear map in float32, then
// topk_gating.
#include "nn/router.h"

#include <sstream>

#include "test_util.h"

namespace equipoise {
namespace {

using nn::DenseRouter;
using nn::DenseRouterOptions;
using nn::NoisyTopKRouter;
using nn::NoisyTopKRouterImpl;
using nn::NoisyTopKRouterOptions;
using nn::TopKRouter;
using nn::TopKRouterImpl;
using nn::TopKRouterOptions;
using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

class RouterTest : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

TEST_F(RouterTest, IsALinearMapAndTopKGating) {
  auto options = TopKRouterOptions(6, 5, 2).norm_topk_prob(true).scaling_factor(2.0);
  TopKRouter router(options);
  router->to(at::kDouble);
  const auto x = random_leaf({4, 3, 6});
  const auto mask = at::rand({4, 3}) > 0.3;
  const auto bias = at::randn({5}, at::kDouble);
  const auto got = router(x, mask, bias);
  const auto want = topk_gating(
      x.matmul(router->weight.t()), 2,
      TopKGatingOptions().norm_topk_prob(true).scaling_factor(2.0).token_mask(mask).expert_bias(
          bias));
  EXPECT_TRUE(same(got.topk_indices, want.topk_indices));
  EXPECT_TRUE(close(got.topk_weights, want.topk_weights));
  EXPECT_TRUE(close(got.sums, want.sums));
  EXPECT_EQ(got.lse.sizes(), at::IntArrayRef({4, 3}));
  const auto got_gradients = gradients(got.lse, {x, router->weight});
  const auto want_gradients = gradients(want.lse, {x, router->weight});
  EXPECT_TRUE(close(got_gradients[0], want_gradients[0]));
  EXPECT_TRUE(close(got_gradients[1], want_gradients[1]));
}

TEST_F(RouterTest, ComputesInFloatAndLeavesAutocast) {
  TopKRouter router(64, 16, 4);
  const auto x = at::randn({50, 64});
  const auto plain = router(x);
  {
    const test::CpuAutocast cpu_autocast;
    EXPECT_TRUE(same(router(x).topk_weights, plain.topk_weights));
  }

  router->to(at::kBFloat16);
  const auto half = router(x.to(at::kBFloat16));
  const auto logits = x.to(at::kBFloat16).to(at::kFloat).matmul(router->weight.to(at::kFloat).t());
  EXPECT_TRUE(close(half.topk_weights, topk_gating(logits, 4).topk_weights, 1e-6));
}

TEST_F(RouterTest, AddsABiasAndKeepsToGroups) {
  TopKRouter router(
      TopKRouterOptions(6, 8, 2).bias(true).num_groups(4).group_topk(1).group_score("max"));
  EXPECT_TRUE(same(router->bias, at::zeros({8})));
  torch::NoGradGuard no_grad;
  router->bias.normal_();
  const auto x = at::randn({50, 6});
  const auto routing = router(x);
  const auto want = topk_gating(at::linear(x, router->weight, router->bias), 2,
                                TopKGatingOptions().num_groups(4).group_topk(1).group_score("max"));
  EXPECT_TRUE(same(routing.topk_indices, want.topk_indices));
  EXPECT_TRUE(same(routing.topk_weights, want.topk_weights));
  EXPECT_TRUE(routing.topk_indices.div(2, "floor").diff().eq(0).all().item<bool>());
  router->reset_parameters();
  EXPECT_TRUE(same(router->bias, at::zeros({8})));
}

TEST_F(RouterTest, JittersInTraining) {
  TopKRouter router(TopKRouterOptions(1, 4, 2).jitter_eps(0.25));
  const auto x = at::ones({2000, 1});
  const auto jitter = (router(x).lse - 0).detach();
  EXPECT_FALSE(jitter.equal(jitter[0].expand_as(jitter)));
  router->eval();
  const auto plain = router(x).lse.detach();
  EXPECT_TRUE(same(plain, plain[0].expand_as(plain)));

  // With one expert the logit is the weight times the jitter.
  TopKRouter scale(TopKRouterOptions(1, 1, 1).jitter_eps(0.25).init_std(1));
  const auto factor = (scale(x).lse / scale->weight.squeeze()).detach();
  EXPECT_NEAR(factor.min().item<double>(), 0.75, 1e-3);
  EXPECT_NEAR(factor.max().item<double>(), 1.25, 1e-3);
  EXPECT_NEAR(factor.mean().item<double>(), 1, 1e-2);
}

TEST_F(RouterTest, DropsExpertsButKeepsTopK) {
  TopKRouter router(TopKRouterOptions(6, 8, 3).expert_dropout(0.5));
  const auto x = at::randn({400, 6});
  double present = 0;
  for (int step = 0; step < 200; ++step) {
    const auto routing = router(x);
    EXPECT_TRUE((routing.topk_indices >= 0).all().item<bool>());
    const auto used = (routing.prob_sum() > 0).sum().item<double>();
    EXPECT_GE(used, 3);
    present += used / 200;
  }
  EXPECT_NEAR(present, 4.2, 0.4);  // E max(3, Binomial(8, 1/2)) = 4.19
  TopKRouter most(TopKRouterOptions(6, 8, 3).expert_dropout(0.999));
  EXPECT_EQ((most(x).prob_sum() > 0).sum().item<int64_t>(), 3);
  router->eval();
  EXPECT_EQ((router(x).prob_sum() > 0).sum().item<int64_t>(), 8);
}

TEST_F(RouterTest, NoiseIsShazeers) {
  NoisyTopKRouter router(NoisyTopKRouterOptions(6, 5, 2).noise_epsilon(0.5));
  router->to(at::kDouble);
  EXPECT_TRUE(same(router->noise_weight, at::zeros({5, 6}, at::kDouble)));
  EXPECT_FALSE(router->clean_logits.defined());
  {
    torch::NoGradGuard no_grad;
    router->noise_weight.normal_();
  }
  const auto x = random_leaf({7, 6});
  const auto mask = at::rand({7}) > 0.3;
  const auto routing = router(x, mask);
  const auto stddev = at::log1p(at::exp(x.matmul(router->noise_weight.t()))) + 0.5;
  EXPECT_TRUE(close(router->clean_logits, x.matmul(router->weight.t())));
  EXPECT_TRUE(close(router->noise_stddev, stddev));
  const auto want = topk_gating(router->noisy_logits, 2, TopKGatingOptions().token_mask(mask));
  EXPECT_TRUE(same(routing.topk_indices, want.topk_indices));
  EXPECT_TRUE(close(routing.topk_weights, want.topk_weights));
  EXPECT_TRUE(close(routing.sums, want.sums));

  // d noisy_logits / d noise_weight is e times that of the standard deviation.
  const auto draws =
      ((router->noisy_logits - router->clean_logits) / router->noise_stddev).detach();
  EXPECT_TRUE(close(gradients(router->noisy_logits, {router->noise_weight})[0],
                    gradients(draws * stddev, {router->noise_weight})[0]));
  EXPECT_GT(gradients(routing.topk_weights, {router->noise_weight})[0].abs().sum().item<double>(),
            0);

  const auto wide = at::zeros({20000, 6}, at::kDouble);
  router(wide);  // logits 0, standard deviation log 2 + 1/2
  EXPECT_NEAR(router->noisy_logits.std().item<double>(), std::log(2.0) + 0.5, 1e-2);
  EXPECT_NEAR(router->noisy_logits.mean().item<double>(), 0, 2e-2);
}

TEST_F(RouterTest, NoiseIsSeededAndOffInEval) {
  NoisyTopKRouter router(6, 5, 2);
  const auto x = at::randn({50, 6});
  at::manual_seed(3);
  const auto first = router(x);
  at::manual_seed(3);
  EXPECT_TRUE(same(router(x).topk_weights, first.topk_weights));
  EXPECT_FALSE(router(x).topk_weights.equal(first.topk_weights));
  const auto noisy_logits = router->noisy_logits;
  router->eval();
  const auto routing = router(x, std::nullopt, at::linspace(0, .2, 5));
  EXPECT_TRUE(same(routing.topk_indices,
                   topk_gating(at::linear(x, router->weight), 2,
                               TopKGatingOptions().expert_bias(at::linspace(0, .2, 5)))
                       .topk_indices));
  EXPECT_TRUE(same(router->noisy_logits, noisy_logits));  // of the last forward in training

  router->train();
  {
    const test::CpuAutocast cpu_autocast;
    router(x);
  }
  EXPECT_EQ(router->noise_stddev.scalar_type(), at::kFloat);
  const auto copy = std::dynamic_pointer_cast<NoisyTopKRouterImpl>(router->clone());
  EXPECT_NE(copy->noise_weight.data_ptr(), router->noise_weight.data_ptr());
  EXPECT_FALSE(copy->noisy_logits.defined());
  EXPECT_TRUE(router->noisy_logits.defined());
  std::ostringstream stream;
  stream << router;
  EXPECT_EQ(stream.str(),
            "equipoise::nn::NoisyTopKRouter(d_model=6, num_experts=5, top_k=2, "
            "score_function=softmax, norm_topk_prob=false, scaling_factor=1, noise_epsilon=0.01)");
}

TEST_F(RouterTest, DenseUsesEveryExpert) {
  DenseRouter router(DenseRouterOptions(6, 5).score_function("sigmoid"));
  const auto x = at::randn({7, 6});
  const auto routing = router(x);
  EXPECT_TRUE(same(routing.tokens_per_expert, at::full({5}, 7, at::kLong)));
  EXPECT_TRUE(close(routing.topk_weights,
                    at::sigmoid(at::linear(x, router->weight)).gather(1, routing.topk_indices),
                    1e-6));
  EXPECT_EQ(router(x, at::zeros({7}, at::kBool)).tokens_per_expert.sum().item<int64_t>(), 0);
}

TEST_F(RouterTest, TakesOneTokenAndNone) {
  TopKRouter router(6, 5, 2);
  EXPECT_EQ(router(at::randn({6})).topk_indices.sizes(), at::IntArrayRef({2}));
  EXPECT_EQ(router(at::randn({0, 6})).topk_indices.sizes(), at::IntArrayRef({0, 2}));
}

TEST_F(RouterTest, StartsSmall) {
  TopKRouter router(512, 64, 2);
  EXPECT_NEAR(router->weight.std().item<double>(), 0.02, 1e-3);
  EXPECT_NEAR(router->weight.mean().item<double>(), 0.0, 1e-3);
  const auto before = router->weight.clone();
  router->reset_parameters();
  EXPECT_FALSE(before.equal(router->weight));
}

TEST_F(RouterTest, ClonesAndPrints) {
  TopKRouter router(TopKRouterOptions(6, 5, 2).norm_topk_prob(true).scaling_factor(2.5));
  const auto copy = std::dynamic_pointer_cast<TopKRouterImpl>(router->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_NE(copy->weight.data_ptr(), router->weight.data_ptr());
  const auto x = at::randn({7, 6});
  EXPECT_TRUE(same(copy->forward(x).topk_weights, router(x).topk_weights));

  std::ostringstream stream;
  stream << router;
  EXPECT_EQ(stream.str(),
            "equipoise::nn::TopKRouter(d_model=6, num_experts=5, top_k=2, score_function=softmax, "
            "norm_topk_prob=true, scaling_factor=2.5)");
}

TEST_F(RouterTest, NamesTheWrongArgument) {
  EXPECT_TRUE(fails([] { TopKRouter(0, 5, 2); }, {"TopKRouter", "d_model", "0"}));
  EXPECT_TRUE(fails([] { TopKRouter(6, 0, 2); }, {"TopKRouter", "num_experts", "0"}));
  EXPECT_TRUE(fails([] { TopKRouter(6, 5, 6); }, {"TopKRouter", "top_k", "5", "6"}));
  EXPECT_TRUE(fails([] { TopKRouter(6, 5, 0); }, {"TopKRouter", "top_k", "0"}));
  using Options = TopKRouterOptions;
  const auto refused = [](Options options, const std::vector<std::string>& words) {
    return fails([&] { TopKRouter router(options); }, words);
  };
  EXPECT_TRUE(refused(Options(6, 5, 2).jitter_eps(1), {"TopKRouter", "jitter_eps", "1"}));
  EXPECT_TRUE(refused(Options(6, 5, 2).expert_dropout(-0.5), {"expert_dropout", "-0.5"}));
  EXPECT_TRUE(refused(Options(6, 5, 2).init_std(-1), {"TopKRouter", "init_std", "-1"}));
  EXPECT_TRUE(refused(Options(6, 5, 2).num_groups(2), {"num_groups", "5", "2"}));
  EXPECT_TRUE(refused(Options(6, 6, 2).num_groups(2), {"group_topk"}));
  EXPECT_TRUE(refused(Options(6, 6, 2).num_groups(2).group_topk(1).group_score("min"),
                      {"group_score", "min"}));
  EXPECT_TRUE(refused(Options(6, 5, 2).score_function("tanh"), {"score_function", "tanh"}));
  EXPECT_TRUE(fails([] { NoisyTopKRouter(NoisyTopKRouterOptions(6, 5, 2).noise_epsilon(0)); },
                    {"NoisyTopKRouter", "noise_epsilon", "0"}));
  EXPECT_TRUE(fails([] { DenseRouter(0, 5); }, {"DenseRouter", "d_model", "0"}));
  TopKRouter router(6, 5, 2);
  EXPECT_TRUE(fails([&] { router(at::randn({3, 7})); }, {"TopKRouter", "x", "6", "[3, 7]"}));
  EXPECT_TRUE(fails([&] { router(at::randn({})); }, {"TopKRouter", "x", "[]"}));
  EXPECT_TRUE(fails([&] { router(at::ones({3, 6}, at::kLong)); }, {"TopKRouter", "x", "Long"}));
  EXPECT_TRUE(fails([&] { router(at::randn({3, 6}, at::kMeta)); }, {"TopKRouter", "x", "meta"}));
  EXPECT_TRUE(fails(
      [&] {
        router(at::randn({3, 6}), at::ones({4}, at::kBool));
      },
      {"token_mask", "[4]"}));
}

}  // namespace
}  // namespace equipoise
