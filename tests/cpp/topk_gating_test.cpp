// SPDX-License-Identifier: Apache-2.0
// topk_gating against the formulas of its header, written with ATen.
#include "ops/topk_gating.h"

#include <cmath>
#include <limits>

#include "ops/expert_bincount.h"
#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// The same results for 2-D logits without ties or absent experts.
RoutingResult reference(const at::Tensor& logits, int64_t top_k, bool norm_topk_prob,
                        double scaling_factor, const at::Tensor& token_weights) {
  const auto num_experts = logits.size(1);
  const auto prob = at::softmax(logits, 1);
  const auto lse = at::logsumexp(logits, 1);
  const auto entropy = -(prob * prob.log()).sum(1);
  const auto real = token_weights > 0;
  const auto chosen = std::get<1>(prob.topk(top_k, 1));
  auto weights = prob.gather(1, chosen);
  if (norm_topk_prob) weights = weights / weights.sum(1, true);
  const auto one_hot = at::one_hot(chosen, num_experts).sum(1);
  const auto zero = at::zeros({1}, logits.options());
  return {scaling_factor * weights * real.unsqueeze(1), at::where(real.unsqueeze(1), chosen, -1),
          (one_hot * real.unsqueeze(1)).sum(0), at::where(real, lse, zero),
          at::cat({token_weights.matmul(prob), token_weights.matmul(one_hot.to(prob.scalar_type())),
                   token_weights.sum().reshape(1), (token_weights * lse.square()).sum().reshape(1),
                   (token_weights * entropy).sum().reshape(1), zero, zero})};
}

void expect_same_routing(const RoutingResult& got, const RoutingResult& want, double tolerance) {
  EXPECT_TRUE(close(got.topk_weights, want.topk_weights, tolerance));
  EXPECT_TRUE(same(got.topk_indices, want.topk_indices));
  EXPECT_TRUE(same(got.tokens_per_expert, want.tokens_per_expert));
  EXPECT_TRUE(close(got.lse, want.lse, tolerance));
  EXPECT_TRUE(close(got.sums, want.sums, tolerance));
}

class TopKGating : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

TEST_F(TopKGating, MatchesAten) {
  for (const bool norm_topk_prob : {false, true}) {
    for (const auto& [num_tokens, num_experts, top_k] :
         std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {1, 1, 1}, {1, 8, 2}, {37, 33, 5}, {300, 64, 8}, {5, 7, 7}}) {
      const auto logits = at::randn({num_tokens, num_experts}, at::kDouble);
      const auto options = TopKGatingOptions().norm_topk_prob(norm_topk_prob).scaling_factor(2.5);
      const auto ones = at::ones({num_tokens}, at::kDouble);
      expect_same_routing(topk_gating(logits, top_k, options),
                          reference(logits, top_k, norm_topk_prob, 2.5, ones), 1e-11);
      const auto logits32 = logits.to(at::kFloat);
      expect_same_routing(topk_gating(logits32, top_k, options),
                          reference(logits32, top_k, norm_topk_prob, 2.5, ones.to(at::kFloat)),
                          2e-5);
    }
  }
}

TEST_F(TopKGating, GradientMatchesAten) {
  const auto logits = random_leaf({19, 12});
  const auto token_weights =
      torch::tensor({1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1}, at::kDouble);
  for (const bool norm_topk_prob : {false, true}) {
    const auto got = topk_gating(logits, 3,
                                 TopKGatingOptions()
                                     .norm_topk_prob(norm_topk_prob)
                                     .scaling_factor(0.5)
                                     .token_mask(token_weights > 0));
    const auto want = reference(logits, 3, norm_topk_prob, 0.5, token_weights);
    expect_same_routing(got, want, 1e-12);
    EXPECT_TRUE(
        close(gradients(got.topk_weights, {logits})[0], gradients(want.topk_weights, {logits})[0]));
    EXPECT_TRUE(close(gradients(got.lse, {logits})[0], gradients(want.lse, {logits})[0]));
    const auto differentiable = [](const RoutingResult& routing) {  // the counts carry no gradient
      const auto e = RoutingSums::weight(routing.num_experts());
      return at::cat(
          {routing.sums.slice(0, 0, routing.num_experts()), routing.sums.slice(0, e + 1, e + 3)});
    };
    EXPECT_TRUE(close(gradients(differentiable(got), {logits})[0],
                      gradients(differentiable(want), {logits})[0]));
  }
}

TEST_F(TopKGating, FloatTokenWeightsWeighTheSums) {
  const auto logits = at::randn({6, 5}, at::kDouble);
  const auto token_weights = torch::tensor({1.0, 0.25, 0.0, 3.0, 1.0, 0.5}, at::kDouble);
  expect_same_routing(topk_gating(logits, 2, TopKGatingOptions().token_mask(token_weights)),
                      reference(logits, 2, false, 1.0, token_weights), 1e-12);
}

TEST_F(TopKGating, NamesTheSums) {
  const auto logits = at::randn({4, 6}, at::kDouble);
  const auto routing = topk_gating(logits, 2);
  EXPECT_EQ(routing.num_experts(), 6);
  EXPECT_EQ(routing.top_k(), 2);
  EXPECT_TRUE(close(routing.prob_sum(), at::softmax(logits, 1).sum(0)));
  EXPECT_TRUE(same(routing.load(), routing.tokens_per_expert.to(at::kDouble)));
  EXPECT_EQ(routing.num_tokens().item<double>(), 4);
  EXPECT_EQ(routing.num_nan_rows().item<double>(), 0);
}

TEST_F(TopKGating, BiasActsOnTheSelectionOnly) {
  const auto logits = torch::tensor({{3.0, 2.0, 1.0, 0.0}}, at::kDouble);
  const auto bias = torch::tensor({0.0, 0.0, 0.0, 10.0}, at::kDouble);
  const auto routing = topk_gating(logits, 2, TopKGatingOptions().expert_bias(bias));
  EXPECT_TRUE(same(routing.topk_indices, torch::tensor({{3, 0}}, at::kLong)));
  EXPECT_TRUE(close(routing.topk_weights, at::softmax(logits, 1).gather(1, routing.topk_indices)));
}

TEST_F(TopKGating, TiesGoToTheLowestIndexAndAbsentExpertsAreNotChosen) {
  const auto logits = torch::tensor({{1.0, 2.0, 2.0, 1.0},
                                     {-kInfinity, 0.0, -kInfinity, -kInfinity},
                                     {-kInfinity, -kInfinity, -kInfinity, -kInfinity},
                                     {kNan, 5.0, 0.0, 1.0}},
                                    at::kDouble);
  const auto routing = topk_gating(logits, 3);
  EXPECT_TRUE(same(routing.topk_indices,
                   torch::tensor({{1, 2, 0}, {1, -1, -1}, {-1, -1, -1}, {1, 3, 2}}, at::kLong)));
  EXPECT_TRUE(same(routing.tokens_per_expert, expert_bincount(routing.topk_indices, 4)));
  EXPECT_TRUE(close(routing.topk_weights[1], torch::tensor({1.0, 0.0, 0.0}, at::kDouble)));
  EXPECT_TRUE(close(routing.topk_weights[2], at::zeros({3}, at::kDouble)));
  EXPECT_TRUE(routing.sums.isfinite().all().item<bool>());
  EXPECT_EQ(routing.num_tokens().item<double>(),
            3);  // a row without any present expert counts as masked
  EXPECT_EQ(routing.num_nan_rows().item<double>(), 1);
}

TEST_F(TopKGating, KeepsLeadingDimensionsAndTakesNoTokens) {
  const auto logits = at::randn({2, 3, 5});
  const auto routing = topk_gating(logits, 2);
  EXPECT_EQ(routing.topk_weights.sizes(), at::IntArrayRef({2, 3, 2}));
  EXPECT_EQ(routing.lse.sizes(), at::IntArrayRef({2, 3}));
  EXPECT_TRUE(same(routing.topk_indices.reshape({6, 2}),
                   topk_gating(logits.reshape({6, 5}), 2).topk_indices));

  const auto empty = topk_gating(at::randn({0, 5}), 2);
  EXPECT_EQ(empty.topk_indices.sizes(), at::IntArrayRef({0, 2}));
  EXPECT_TRUE(same(empty.tokens_per_expert, at::zeros({5}, at::kLong)));
  EXPECT_TRUE(same(empty.sums, at::zeros({15})));
}

TEST_F(TopKGating, WithoutStatsLeavesThemOut) {
  const auto logits = random_leaf({9, 6});
  const auto with = topk_gating(logits, 2, TopKGatingOptions().norm_topk_prob(true));
  const auto without =
      topk_gating(logits, 2, TopKGatingOptions().norm_topk_prob(true).stats(false));
  EXPECT_FALSE(without.lse.defined() || without.sums.defined());
  EXPECT_TRUE(fails([&] { without.prob_sum(); }, {"RoutingResult", "stats"}));
  EXPECT_TRUE(same(without.topk_indices, with.topk_indices));
  EXPECT_TRUE(close(without.topk_weights, with.topk_weights));
  EXPECT_TRUE(close(gradients(without.topk_weights, {logits})[0],
                    gradients(with.topk_weights, {logits})[0]));
}

TEST_F(TopKGating, SigmoidBiasAndGroupsAsInDeepSeekV3) {
  constexpr int64_t kTokens = 21, kExperts = 24, kGroups = 6, kKept = 2, kTopK = 3;
  const auto logits = random_leaf({kTokens, kExperts});
  const auto bias = at::randn({kExperts}, at::kDouble) / 5;
  const auto routing = topk_gating(logits, kTopK,
                                   TopKGatingOptions()
                                       .score_function("sigmoid")
                                       .norm_topk_prob(true)
                                       .scaling_factor(2.5)
                                       .expert_bias(bias)
                                       .num_groups(kGroups)
                                       .group_topk(kKept));

  const auto scores = logits.sigmoid();
  const auto keys = (scores + bias).view({kTokens, kGroups, kExperts / kGroups});
  const auto kept = std::get<1>(std::get<0>(keys.topk(2, -1)).sum(-1).topk(kKept, -1));
  const auto is_kept = at::zeros({kTokens, kGroups}, at::kBool).scatter(1, kept, true);
  const auto limited = at::where(is_kept.unsqueeze(-1), keys, -kInfinity).view_as(logits);
  const auto chosen = std::get<1>(limited.topk(kTopK, -1));
  auto weights = scores.gather(1, chosen);
  weights = 2.5 * weights / weights.sum(1, true);
  EXPECT_TRUE(same(routing.topk_indices, chosen));
  EXPECT_TRUE(close(routing.topk_weights, weights, 1e-12));
  EXPECT_TRUE(close(routing.prob_sum(), (scores / scores.sum(1, true)).sum(0), 1e-12));
  EXPECT_TRUE(close(gradients(routing.topk_weights, {logits})[0], gradients(weights, {logits})[0]));
}

TEST_F(TopKGating, SegmentsAreAddedUpByThemselves) {
  const auto ids = segment_ids_from_cu_seqlens(torch::tensor({0, 3, 3, 5}), 5);
  EXPECT_TRUE(same(ids, torch::tensor({0, 0, 0, 2, 2}, at::kLong)));
  const auto logits = at::randn({5, 6}, at::kDouble);
  const auto routing = topk_gating(logits, 2, TopKGatingOptions().segment_ids(ids).num_segments(3));
  EXPECT_TRUE(same(routing.num_tokens(), torch::tensor({3.0, 0.0, 2.0}, at::kDouble)));
  const auto first = topk_gating(logits.slice(0, 0, 3), 2);
  EXPECT_TRUE(same(routing.tokens_per_expert[0], first.tokens_per_expert));
  EXPECT_TRUE(close(routing.sums[0], first.sums, 1e-12));
  EXPECT_TRUE(same(routing.tokens_per_expert.sum(0), topk_gating(logits, 2).tokens_per_expert));
}

TEST_F(TopKGating, NoiseIsPartOfTheLogitsAndForcedExpertsKeepTheirSlots) {
  const auto logits = random_leaf({4, 6}), noise = random_leaf({4, 6});
  const auto got = topk_gating(logits, 2, TopKGatingOptions().noise(noise));
  const auto want = topk_gating(logits + noise, 2);
  expect_same_routing(got, want, 1e-12);
  const auto grads = gradients(got.topk_weights, {logits, noise});
  EXPECT_TRUE(close(grads[0], gradients(want.topk_weights, {logits})[0]));
  EXPECT_TRUE(same(grads[0], grads[1]));

  const auto forced = torch::tensor({{5, 0}, {-1, 3}, {2, 1}, {-1, -1}}, at::kLong);
  const auto replayed = topk_gating(logits, 2, TopKGatingOptions().forced_indices(forced));
  EXPECT_TRUE(same(replayed.topk_indices, forced));
  EXPECT_TRUE(close(replayed.topk_weights,
                    at::softmax(logits, 1).gather(1, forced.clamp_min(0)) * (forced >= 0)));
}

TEST_F(TopKGating, HalfLogitsAreWidened) {
  const auto logits = at::randn({16, 8}, at::kBFloat16);
  const auto got = topk_gating(logits, 2);
  const auto want = topk_gating(logits.to(at::kFloat), 2);
  EXPECT_TRUE(same(got.topk_indices, want.topk_indices));
  EXPECT_TRUE(close(got.topk_weights, want.topk_weights, 1e-6));
  EXPECT_TRUE(close(got.sums, want.sums, 1e-6));
}

TEST_F(TopKGating, NamesTheWrongArgument) {
  const auto logits = at::randn({4, 6});
  EXPECT_TRUE(fails([&] { topk_gating(logits, 7); }, {"topk_gating", "top_k", "6", "7"}));
  EXPECT_TRUE(fails([&] { topk_gating(logits, 0); }, {"topk_gating", "top_k", "0"}));
  EXPECT_TRUE(fails([&] { topk_gating(logits.to(at::kLong), 2); }, {"topk_gating", "logits"}));
  EXPECT_TRUE(fails([&] { topk_gating(at::randn({}), 1); }, {"topk_gating", "logits"}));
  EXPECT_TRUE(fails(
      [&] { topk_gating(logits, 2, TopKGatingOptions().token_mask(at::ones({3}, at::kBool))); },
      {"topk_gating", "token_mask", "[3]"}));
  EXPECT_TRUE(
      fails([&] { topk_gating(logits, 2, TopKGatingOptions().expert_bias(at::zeros({5}))); },
            {"topk_gating", "expert_bias", "[5]"}));
  EXPECT_TRUE(fails([&] { topk_gating(logits, 2, TopKGatingOptions().score_function("cosine")); },
                    {"topk_gating", "score_function", "cosine"}));
  EXPECT_TRUE(fails([&] { topk_gating(logits, 2, TopKGatingOptions().num_groups(4)); },
                    {"topk_gating", "num_groups", "6", "4"}));
}

}  // namespace
}  // namespace equipoise
