// SPDX-License-Identifier: Apache-2.0
// Each of the direct losses against a number worked out by hand, and its checks.
#include "ops/direct_losses.h"

#include <cmath>
#include <limits>

#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::CpuAutocast;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor number(double value) { return torch::tensor(value, at::kDouble); }

TEST(DirectLosses, LoadLossIsTheSpreadOfExpectedLoads) {
  // Loads 2 Phi(2) and 2 Phi(-2), whose mean is 1 and whose distance from it is erf(sqrt(2)).
  const auto clean = torch::tensor({{2.0, 0.0}, {2.0, 0.0}}, at::kDouble).requires_grad_();
  const auto stddev = at::ones_like(clean);
  const auto loss = load_loss(clean, clean, stddev, 1);
  EXPECT_TRUE(close(loss, number(std::pow(std::erf(std::sqrt(2.0)), 2))));
  EXPECT_TRUE(same(load_loss(clean, clean, stddev, 2), number(0)));  // K = E

  // An expert alone is chosen for certain: loads 1 and 0. The other token is masked.
  const auto absent = torch::tensor({{2.0, -kInfinity}, {0.0, 9.0}}, at::kDouble).requires_grad_();
  const auto alone = load_loss(absent, absent, stddev, 1, torch::tensor({true, false}));
  EXPECT_TRUE(same(alone, number(1)));
  EXPECT_TRUE(same(gradients(alone, {absent})[0], at::zeros_like(absent)));
}

TEST(DirectLosses, CommunicationLossCountsATokenOncePerDevice) {
  // Experts 0 and 1, then 0 and 3: two tokens to the first device, one to the second.
  const auto logits = torch::tensor({{2.0, 1.0, 0.0, 0.0}, {2.0, 0.0, 0.0, 1.0}}, at::kDouble);
  const auto first =
      logits.softmax(1).narrow(1, 0, 2).sum(1);  // what each token gives the first device
  const auto loss = 0.5 + 0.5 * first.mean();
  EXPECT_TRUE(close(communication_loss(topk_gating(logits, 2), 2, /*max_devices=*/2), loss));
  EXPECT_TRUE(close(communication_loss(topk_gating(logits, 2), 2, /*max_devices=*/1), 2 * loss));

  // Of weights 3 and 1: four to the first device, one to the second.
  const auto weights = torch::tensor({3.0, 1.0}, at::kDouble);
  const auto weighted = topk_gating(logits, 2, TopKGatingOptions().token_mask(weights));
  const auto share = (weights * first).sum() / 4;
  EXPECT_TRUE(close(communication_loss(weighted, 2, 2, weights), 0.25 + 0.75 * share));
}

TEST(DirectLosses, RouterL2LossIsTheMeanSquareOfWhatIsPresent) {
  const auto logits = torch::tensor({{1.0, 3.0}, {7.0, -kInfinity}}, at::kDouble).requires_grad_();
  EXPECT_TRUE(same(router_l2_loss(logits, torch::tensor({true, false})), number(5)));
  const auto loss = router_l2_loss(logits);
  EXPECT_TRUE(same(loss, number(59.0 / 4)));
  EXPECT_TRUE(
      same(gradients(loss, {logits})[0], torch::tensor({{0.5, 1.5}, {3.5, 0.0}}, at::kDouble)));
}

TEST(DirectLosses, SimilarityCorrelationIsTheMeanOverAllPairs) {
  at::manual_seed(0);
  const auto inputs = torch::tensor({{1.0, 0.0}, {0.0, 2.0}}, at::kDouble);
  EXPECT_TRUE(close(similarity_correlation(inputs, at::ones({2, 3}, at::kDouble)), number(0.5)));
  const auto x = random_leaf({9, 4}), g = random_leaf({9, 3});
  const auto of_length_one = [](const at::Tensor& rows) {
    return rows / rows.norm(2, 1, /*keepdim=*/true);
  };
  const auto u = of_length_one(x), v = of_length_one(g);
  const auto pairs = (u.mm(u.t()) * v.mm(v.t())).mean();
  const auto loss = similarity_correlation(x, g);
  EXPECT_TRUE(close(loss, pairs));
  EXPECT_TRUE(close(gradients(loss, {x, g})[0], gradients(pairs, {x, g})[0]));

  const auto narrow_x = x.detach().to(at::kFloat), narrow_g = g.detach().to(at::kFloat);
  const auto outside = similarity_correlation(narrow_x, narrow_g);
  const CpuAutocast autocast;
  EXPECT_TRUE(same(similarity_correlation(narrow_x, narrow_g), outside));
}

TEST(DirectLosses, MixtureNllIsThatOfTheMixture) {
  const auto log_probs = torch::tensor({{0.5, 0.25}, {0.125, 0.25}}, at::kDouble).log();
  const auto gate_logits = torch::tensor({{0.0, 0.0}, {std::log(3.0), 0.0}}, at::kDouble);
  // 0.375, and 3/4 of 0.125 with 1/4 of 0.25
  EXPECT_TRUE(close(mixture_nll(gate_logits, log_probs),
                    number(-(std::log(0.375) + std::log(0.15625)) / 2)));
  EXPECT_TRUE(same(mixture_nll(at::zeros({0, 3}), at::zeros({0, 3})), at::zeros({})));
}

TEST(DirectLosses, BoundsOnInformation) {
  const auto scores = std::log(3.0) * at::eye(2, at::kDouble);
  EXPECT_TRUE(close(infonce(scores), number(std::log(2.0) + std::log(0.75))));
  const auto joint = torch::tensor({1.0, 3.0}, at::kDouble);
  const auto marginal = torch::tensor({0.0, std::log(3.0)}, at::kDouble);
  EXPECT_TRUE(close(mine(joint, marginal), number(2 - std::log(2.0))));
}

TEST(DirectLosses, HalfTypesAreWidened) {
  at::manual_seed(0);
  const auto half = at::randn({6, 6}, at::kBFloat16).abs(), wide = half.to(at::kFloat);
  EXPECT_TRUE(same(load_loss(half, half, half, 2), load_loss(wide, wide, wide, 2)));
  EXPECT_TRUE(same(router_l2_loss(half), router_l2_loss(wide)));
  EXPECT_TRUE(same(similarity_correlation(half, half), similarity_correlation(wide, wide)));
  EXPECT_TRUE(same(mixture_nll(half, half), mixture_nll(wide, wide)));
  EXPECT_TRUE(same(infonce(half), infonce(wide)));
  EXPECT_TRUE(same(mine(half[0], half[1]), mine(wide[0], wide[1])));
}

TEST(DirectLosses, NameTheWrongArgument) {
  const auto x = at::randn({3, 5}), row = at::randn({3});
  EXPECT_TRUE(fails([&] { load_loss(x, x, x, 6); }, {"load_loss", "top_k", "5", "6"}));
  EXPECT_TRUE(
      fails([&] { load_loss(x, x, row, 1); }, {"load_loss", "noise_stddev", "[3, 5]", "[3]"}));
  EXPECT_TRUE(fails([&] { load_loss(x, x, x, 1, row.to(at::kLong)); },
                    {"load_loss", "token_mask", "bool or floating", "Long"}));

  const auto routing = topk_gating(at::randn({3, 6}), 2);
  EXPECT_TRUE(fails([&] { communication_loss(routing, 4, 1); },
                    {"communication_loss", "num_devices", "6", "4"}));
  EXPECT_TRUE(fails([&] { communication_loss(routing, 3, 4); },
                    {"communication_loss", "max_devices", "3", "4"}));
  EXPECT_TRUE(fails([&] { communication_loss(routing, 3, 1, at::ones({4})); },
                    {"communication_loss", "token_weights", "[3]", "[4]"}));
  const auto without_stats = topk_gating(x, 2, TopKGatingOptions().stats(false));
  EXPECT_TRUE(
      fails([&] { communication_loss(without_stats, 1, 1); }, {"communication_loss", "stats"}));

  EXPECT_TRUE(fails(
      [&] {
        router_l2_loss(at::zeros({3, 0}));
      },
      {"router_l2_loss", "logits", "[3, 0]"}));
  EXPECT_TRUE(fails(
      [&] {
        similarity_correlation(x, at::ones({2, 5}));
      },
      {"similarity_correlation", "[3, 5]", "[2, 5]"}));
  EXPECT_TRUE(fails([&] { mixture_nll(x, row); }, {"mixture_nll", "log_probs", "[3, 5]", "[3]"}));
  EXPECT_TRUE(fails([&] { infonce(x); }, {"infonce", "scores", "[B, B]", "[3, 5]"}));
  EXPECT_TRUE(fails([&] { mine(x, row); }, {"mine", "joint_scores", "[3, 5]"}));
  EXPECT_TRUE(
      fails([&] { mine(row, row.narrow(0, 0, 0)); }, {"mine", "marginal_scores", "M >= 1", "[0]"}));
}

}  // namespace
}  // namespace equipoise
