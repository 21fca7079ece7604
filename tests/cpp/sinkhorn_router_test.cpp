// SPDX-License-Identifier: Apache-2.0
// nn::SinkhornRouter and nn::ExpertChoiceRouter: linear maps, then sinkhorn and expert_choice.
#include "nn/sinkhorn_router.h"

#include <sstream>

#include "nn/expert_choice_router.h"
#include "ops/sinkhorn.h"
#include "test_util.h"

namespace equipoise {
namespace {

using nn::ExpertChoiceRouter;
using nn::ExpertChoiceRouterOptions;
using nn::SinkhornRouter;
using nn::SinkhornRouterImpl;
using nn::SinkhornRouterOptions;
using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

TEST(SinkhornRouter, ChoosesByThePlanInTraining) {
  at::manual_seed(0);
  SinkhornRouter router(
      SinkhornRouterOptions(6, 5, 2).num_iters(20).norm_topk_prob(true).init_std(1));
  router->to(at::kDouble);
  const auto x = random_leaf({40, 3, 6});
  const auto mask = at::rand({40, 3}) > 0.2;
  const auto logits = x.matmul(router->weight.t());
  const auto chosen = std::get<1>(sinkhorn(logits, 20, mask).topk(2));
  const auto want = topk_gating(
      logits, 2, TopKGatingOptions().norm_topk_prob(true).token_mask(mask).forced_indices(chosen));
  const auto plain = topk_gating(logits, 2, TopKGatingOptions().token_mask(mask));
  const auto got = router(x, mask);
  EXPECT_TRUE(same(got.topk_indices, want.topk_indices));
  EXPECT_TRUE(close(got.topk_weights, want.topk_weights));
  EXPECT_TRUE(close(got.sums, want.sums));
  EXPECT_TRUE(close(gradients(got.topk_weights, {x})[0], gradients(want.topk_weights, {x})[0]));
  EXPECT_FALSE(got.topk_indices.equal(plain.topk_indices));
  router->eval();
  EXPECT_TRUE(same(router(x, mask).topk_indices, plain.topk_indices));
}

TEST(SinkhornRouter, EvensOutTheLoad) {
  at::manual_seed(0);
  SinkhornRouter router(SinkhornRouterOptions(8, 4, 1).init_std(1));
  const auto x = at::randn({1000, 8}) + 1;  // all much alike
  EXPECT_LT(router(x).tokens_per_expert.max().item<int64_t>(), 400);
  router->eval();
  EXPECT_GT(router(x).tokens_per_expert.max().item<int64_t>(), 500);
}

TEST(SinkhornRouter, NeverChoosesADroppedExpert) {
  at::manual_seed(0);
  SinkhornRouter router(SinkhornRouterOptions(6, 8, 3).expert_dropout(0.9).init_std(30));
  const auto x = at::randn({50, 6});
  for (int step = 0; step < 20; ++step) {
    EXPECT_TRUE((router(x).topk_indices >= 0).all().item<bool>());
  }
  EXPECT_EQ(router(at::randn({0, 6})).topk_indices.sizes(), at::IntArrayRef({0, 3}));
}

TEST(SinkhornRouter, ClonesPrintsAndNamesTheWrongArgument) {
  SinkhornRouter router(6, 5, 2);
  EXPECT_NE(std::dynamic_pointer_cast<SinkhornRouterImpl>(router->clone()), nullptr);
  std::ostringstream stream;
  stream << router;
  EXPECT_EQ(stream.str(),
            "equipoise::nn::SinkhornRouter(d_model=6, num_experts=5, top_k=2, "
            "score_function=softmax, norm_topk_prob=false, scaling_factor=1, num_iters=8)");
  using Options = SinkhornRouterOptions;
  EXPECT_TRUE(fails([] { SinkhornRouter router(Options(6, 5, 2).num_iters(0)); },
                    {"SinkhornRouter", "num_iters", "0"}));
  EXPECT_TRUE(fails([] { SinkhornRouter router(Options(6, 6, 2).num_groups(2).group_topk(1)); },
                    {"SinkhornRouter", "num_groups", "2"}));
}

TEST(ExpertChoiceRouter, LetsTheExpertsChoose) {
  at::manual_seed(0);
  ExpertChoiceRouter router(ExpertChoiceRouterOptions(6, 5, 2).bias(true));
  router->to(at::kDouble);
  const auto x = random_leaf({9, 2, 6});
  const auto mask = at::rand({9, 2}) > 0.2;
  const auto got = router(x, mask);
  const auto want = expert_choice(at::linear(x, router->weight, router->bias), 8, mask);
  EXPECT_EQ(got.token_indices.sizes(), at::IntArrayRef({5, 8}));  // ceil(2 * 18 / 5)
  EXPECT_TRUE(same(got.token_indices, want.token_indices));
  EXPECT_TRUE(close(got.token_weights, want.token_weights));
  EXPECT_TRUE(close(gradients(got.token_weights, {router->weight})[0],
                    gradients(want.token_weights, {router->weight})[0]));

  EXPECT_EQ(router(at::randn({10, 6}, at::kDouble)).token_indices.size(1), 4);
  EXPECT_EQ(router(at::randn({0, 6}, at::kDouble)).token_indices.size(1), 0);
  EXPECT_EQ(ExpertChoiceRouter(6, 5, 5)(at::randn({3, 6})).token_indices.size(1), 3);  // all
}

TEST(ExpertChoiceRouter, PrintsAndNamesTheWrongArgument) {
  std::ostringstream stream;
  stream << ExpertChoiceRouter(6, 5, 2);
  EXPECT_EQ(stream.str(), "equipoise::nn::ExpertChoiceRouter(d_model=6, num_experts=5, top_k=2)");
  EXPECT_TRUE(fails([] { ExpertChoiceRouter(6, 5, 6); }, {"ExpertChoiceRouter", "top_k", "6"}));
  ExpertChoiceRouter router(6, 5, 2);
  EXPECT_TRUE(fails([&] { router(at::randn({3, 7})); }, {"ExpertChoiceRouter", "x", "[3, 7]"}));
}

}  // namespace
}  // namespace equipoise
