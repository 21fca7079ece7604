// SPDX-License-Identifier: Apache-2.0
// nn::SequentialRouter against a GRU written out in float64.
#include "nn/sequential_router.h"

#include <limits>
#include <sstream>

#include "test_util.h"

namespace equipoise {
namespace {

using nn::SequentialRouter;
using nn::SequentialRouterImpl;
using nn::SequentialRouterOptions;
using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

/// The logits of the class's comment, one token after the other, x [B, S, d].
at::Tensor written_out(SequentialRouterImpl& router, const at::Tensor& x, const at::Tensor& mask,
                       const at::Tensor& reset) {
  const auto parameters = router.gru->named_parameters();
  const auto hidden = router.sequence_weight.size(1);
  auto state = at::zeros({x.size(0), hidden}, x.options());
  std::vector<at::Tensor> logits;
  for (int64_t s = 0; s < x.size(1); ++s) {
    const auto token = x.select(1, s);
    const auto before = state * reset.select(1, s).logical_not().unsqueeze(1);
    state = router.options.damping() * before;
    const auto in =
        (token.matmul(parameters["weight_ih_l0"].t()) + parameters["bias_ih_l0"]).chunk(3, 1);
    const auto back =
        (state.matmul(parameters["weight_hh_l0"].t()) + parameters["bias_hh_l0"]).chunk(3, 1);
    const auto r = at::sigmoid(in[0] + back[0]);
    const auto z = at::sigmoid(in[1] + back[1]);
    state = (1 - z) * at::tanh(in[2] + r * back[2]) + z * state;
    state = at::where(mask.select(1, s).unsqueeze(1), state, before);
    const auto influence = router.options.influence();
    logits.push_back(influence * state.matmul(router.sequence_weight.t()) +
                     (1 - influence) * token.matmul(router.weight.t()));
  }
  return at::stack(logits, 1);
}

class SequentialRouterTest : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

TEST_F(SequentialRouterTest, IsAGRUMixedWithALinearMap) {
  for (const double damping : {1.0, 0.5}) {
    for (const double influence : {1.0, 0.25, 0.0}) {
      for (const auto& [masks, resets] : {std::pair(false, false), {true, false}, {true, true}}) {
        SequentialRouter router(
            SequentialRouterOptions(6, 5, 2).hidden_size(3).damping(damping).influence(influence));
        router->to(at::kDouble);
        const auto x = random_leaf({4, 7, 6});
        const auto mask = masks ? at::rand({4, 7}) > 0.3 : at::ones({4, 7}, at::kBool);
        const auto reset = resets ? at::rand({4, 7}) > 0.6 : at::zeros({4, 7}, at::kBool);
        const auto bias = at::randn({5}, at::kDouble);
        const auto got = router(x, masks ? std::optional(mask) : std::nullopt, bias,
                                resets ? std::optional(reset) : std::nullopt);
        const auto want = topk_gating(written_out(*router, x, mask, reset), 2,
                                      TopKGatingOptions().token_mask(mask).expert_bias(bias));
        EXPECT_TRUE(same(got.topk_indices, want.topk_indices));
        EXPECT_TRUE(close(got.topk_weights, want.topk_weights));
        EXPECT_TRUE(close(got.sums, want.sums));
        EXPECT_TRUE(close(gradients(got.lse, {x})[0], gradients(want.lse, {x})[0]));
        if (influence == 0) continue;
        for (const auto& weight : router->gru->parameters()) {
          EXPECT_TRUE(close(gradients(got.lse, {weight})[0], gradients(want.lse, {weight})[0]));
        }
      }
    }
  }
}

TEST_F(SequentialRouterTest, LetsNothingOutOfMaskedTokens) {
  SequentialRouter router(6, 5, 2);
  auto x = at::randn({2, 4, 6});
  auto mask = at::ones({2, 4}, at::kBool);
  mask.select(1, 1).fill_(false);
  const auto plain = router(x, mask);
  x.select(1, 1).fill_(std::numeric_limits<double>::quiet_NaN());
  const auto routing = router(x, mask);
  EXPECT_TRUE(same(routing.lse, plain.lse));
  for (const auto& gradient : gradients(routing.lse, router->gru->parameters())) {
    EXPECT_TRUE(gradient.isfinite().all().item<bool>());
  }
}

TEST_F(SequentialRouterTest, ForgetsAtAReset) {
  SequentialRouter router(6, 5, 2);
  const auto x = at::randn({1, 6, 6});
  auto reset = at::zeros({1, 6}, at::kBool);
  reset[0][4] = true;
  const auto tail = router(x.slice(1, 4)).lse;
  EXPECT_TRUE(close(router(x, std::nullopt, std::nullopt, reset).lse.slice(1, 4), tail, 1e-6));
  EXPECT_FALSE(router(x).lse.slice(1, 4).allclose(tail));
}

TEST_F(SequentialRouterTest, ComputesInFloatAndLeavesAutocast) {
  SequentialRouter router(6, 5, 2);
  const auto x = at::randn({2, 4, 6});
  const auto plain = router(x);
  {
    const test::CpuAutocast cpu_autocast;
    EXPECT_TRUE(same(router(x).topk_weights, plain.topk_weights));
  }
  router->to(at::kBFloat16);
  const auto half = router(x.to(at::kBFloat16));
  router->to(at::kFloat);
  EXPECT_TRUE(same(half.lse, router(x.to(at::kBFloat16)).lse));
}

TEST_F(SequentialRouterTest, TakesNothing) {
  SequentialRouter router(6, 5, 2);
  EXPECT_EQ(router(at::randn({0, 4, 6})).topk_indices.sizes(), at::IntArrayRef({0, 4, 2}));
  EXPECT_EQ(router(at::randn({2, 0, 6})).topk_indices.sizes(), at::IntArrayRef({2, 0, 2}));
}

TEST_F(SequentialRouterTest, ClonesAndPrints) {
  SequentialRouter router(SequentialRouterOptions(6, 5, 2).damping(0.5));
  const auto copy = std::dynamic_pointer_cast<SequentialRouterImpl>(router->clone());
  ASSERT_NE(copy, nullptr);
  const auto x = at::randn({2, 4, 6});
  EXPECT_TRUE(same(copy->forward(x).topk_weights, router(x).topk_weights));
  const auto before = copy->forward(x).lse;
  router->reset_parameters();
  EXPECT_TRUE(same(copy->forward(x).lse, before));
  EXPECT_FALSE(router(x).lse.equal(before));
  std::ostringstream stream;
  stream << router;
  EXPECT_EQ(stream.str().substr(0, stream.str().find('\n')),
            "equipoise::nn::SequentialRouter(d_model=6, num_experts=5, top_k=2, "
            "score_function=softmax, norm_topk_prob=false, scaling_factor=1, hidden_size=6, "
            "damping=0.5, influence=1)(");
}

TEST_F(SequentialRouterTest, NamesTheWrongArgument) {
  using Options = SequentialRouterOptions;
  const auto refused = [](Options options, const std::vector<std::string>& words) {
    return fails([&] { SequentialRouter router(options); }, words);
  };
  EXPECT_TRUE(refused(Options(6, 5, 2).hidden_size(-1), {"SequentialRouter", "hidden_size", "-1"}));
  EXPECT_TRUE(refused(Options(6, 5, 2).damping(0), {"SequentialRouter", "damping", "0"}));
  EXPECT_TRUE(refused(Options(6, 5, 2).influence(-1), {"SequentialRouter", "influence", "-1"}));
  EXPECT_TRUE(refused(Options(6, 5, 6), {"SequentialRouter", "top_k", "6"}));
  SequentialRouter router(6, 5, 2);
  const auto x = at::randn({2, 4, 6});
  EXPECT_TRUE(fails([&] { router(x[0]); }, {"SequentialRouter", "x", "[4, 6]"}));
  EXPECT_TRUE(fails([&] { router(x, at::ones({4, 2}, at::kBool)); }, {"token_mask", "[4, 2]"}));
  EXPECT_TRUE(fails(
      [&] {
        router(x, std::nullopt, std::nullopt, at::ones({2, 4}));
      },
      {"SequentialRouter", "reset"}));
  EXPECT_TRUE(fails(
      [&] {
        router(x, std::nullopt, std::nullopt, at::ones({4, 2}, at::kBool));
      },
      {"SequentialRouter", "reset", "[4, 2]"}));
}

}  // namespace
}  // namespace equipoise
