// SPDX-License-Identifier: Apache-2.0
// nn::TopKRouter: a linear map without bias in float32, then topk_gating.
#include "nn/router.h"

#include <sstream>

#include "test_util.h"

namespace equipoise {
namespace {

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
