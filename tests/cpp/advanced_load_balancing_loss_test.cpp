// SPDX-License-Identifier: Apache-2.0
// nn::AdvancedLoadBalancingLoss against its formulas, the B x B matrices among them.
#include "nn/advanced_load_balancing_loss.h"

#include <sstream>

#include "test_util.h"

namespace equipoise {
namespace {

using nn::AdvancedLoadBalancingLoss;
using nn::AdvancedLoadBalancingLossImpl;
using nn::AdvancedLoadBalancingLossOptions;
using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;

/// Independent of the terms: in loops over the rows.
at::Tensor entropy(const at::Tensor& p) { return -(p * (p + 1e-8).log()).sum(); }

TEST(AdvancedLoadBalancingLoss, IsTheFourFormulas) {
  at::manual_seed(0);
  const auto logits = random_leaf({7, 5});
  const auto gates = logits.softmax(1);
  const auto x = random_leaf({7, 2, 3});
  const auto mean = gates.mean(0);
  const auto uniform = 0.1 * (0.2 * (std::log(0.2) - (mean + 1e-8).log())).sum();
  const auto entropy_term = 0.2 * (std::log(5.0) - entropy(mean));
  const auto variance = 0.4 * (mean - 0.2).square().sum() / 4;
  auto similarity = at::zeros({}, at::kDouble);
  auto information = -entropy(mean);
  for (int64_t i = 0; i < 7; ++i) {
    information = information + entropy(gates[i]) / 7;
    for (int64_t j = 0; j < 7; ++j) {
      const auto cosine = [&](const at::Tensor& rows) {
        return (rows[i] * rows[j]).sum() / (rows[i].norm() * rows[j].norm());
      };
      similarity = similarity + cosine(x) * cosine(gates) / 49;
    }
  }
  const auto options = AdvancedLoadBalancingLossOptions(5)
                           .lambda_uniform(0.1)
                           .lambda_entropy(0.2)
                           .lambda_mi(0.3)
                           .lambda_variance(0.4);
  AdvancedLoadBalancingLoss loss(options);
  const auto terms = loss(gates, x);
  EXPECT_TRUE(close(terms.uniform, uniform));
  EXPECT_TRUE(close(terms.entropy, entropy_term));
  EXPECT_TRUE(close(terms.variance, variance));
  EXPECT_TRUE(close(terms.mutual_info, 0.3 * similarity));
  const auto total = uniform + entropy_term + variance + 0.3 * similarity;
  EXPECT_TRUE(close(terms.total, total));
  EXPECT_TRUE(close(gradients(terms.total, {logits})[0], gradients(total, {logits})[0]));
  EXPECT_TRUE(close(gradients(terms.total, {x})[0], gradients(total, {x})[0]));
  EXPECT_EQ(loss(gates).mutual_info.item<double>(), 0);

  AdvancedLoadBalancingLoss informed(AdvancedLoadBalancingLossOptions(options).mi("information"));
  EXPECT_TRUE(close(informed(gates).mutual_info, 0.3 * information));
}

TEST(AdvancedLoadBalancingLoss, IsNothingAtBalance) {
  AdvancedLoadBalancingLoss loss(8);
  const auto terms = loss(at::full({4, 2, 4}, 0.125));  // flattened to [4, 8]
  for (const auto& term : {terms.uniform, terms.entropy, terms.variance, terms.total}) {
    EXPECT_EQ(term.scalar_type(), at::kFloat);
    EXPECT_NEAR(term.item<double>(), 0, 1e-7);
  }
  const auto none = loss(at::ones({0, 8}), at::ones({0, 3}));
  EXPECT_EQ(none.total.item<double>(), 0);
  AdvancedLoadBalancingLoss one(1);
  EXPECT_EQ(one(at::ones({4, 1}), at::ones({4, 2})).total.item<double>(), 0);

  const auto x = at::randn({4, 2}, at::kDouble);
  x[1].zero_();  // similar to none
  x.requires_grad_();
  const auto similarity = loss(at::full({4, 8}, 0.125, at::kDouble), x).mutual_info;
  EXPECT_LT(similarity.item<double>(), 0.005 * 9 / 16 + 1e-9);
  const auto gradient = gradients(similarity, {x})[0];
  EXPECT_TRUE(gradient.isfinite().all().item<bool>());
  EXPECT_LT(gradient.abs().max().item<double>(), 1);
}

TEST(AdvancedLoadBalancingLoss, ComputesInFloat) {
  at::manual_seed(0);
  AdvancedLoadBalancingLoss loss(8);
  const auto gates = at::randn({64, 8}).softmax(1).to(at::kBFloat16);
  const auto x = at::randn({64, 6}).to(at::kBFloat16);
  const auto want = loss(gates.to(at::kFloat), x.to(at::kFloat));
  const test::CpuAutocast cpu_autocast;
  EXPECT_TRUE(close(loss(gates, x).total, want.total, 0));
  EXPECT_TRUE(close(loss(gates.to(at::kFloat), x).total, want.total, 0));
}

TEST(AdvancedLoadBalancingLoss, ClonesAndPrints) {
  AdvancedLoadBalancingLoss loss(AdvancedLoadBalancingLossOptions(8).lambda_mi(0));
  EXPECT_NE(std::dynamic_pointer_cast<AdvancedLoadBalancingLossImpl>(loss->clone()), nullptr);
  std::ostringstream stream;
  stream << loss;
  EXPECT_EQ(stream.str(),
            "equipoise::nn::AdvancedLoadBalancingLoss(num_components=8, lambda_uniform=0.01, "
            "lambda_entropy=0.01, lambda_mi=0, lambda_variance=0.01, mi=similarity)");
}

TEST(AdvancedLoadBalancingLoss, NamesTheWrongArgument) {
  using Options = AdvancedLoadBalancingLossOptions;
  const auto refused = [](Options options, const std::vector<std::string>& words) {
    return fails([&] { AdvancedLoadBalancingLoss loss(options); }, words);
  };
  EXPECT_TRUE(refused(Options(0), {"AdvancedLoadBalancingLoss", "num_components", "0"}));
  EXPECT_TRUE(refused(Options(8).lambda_uniform(-1), {"lambda_uniform", "-1"}));
  EXPECT_TRUE(refused(Options(8).lambda_entropy(-1), {"lambda_entropy", "-1"}));
  EXPECT_TRUE(refused(Options(8).lambda_mi(-1), {"lambda_mi", "-1"}));
  EXPECT_TRUE(refused(Options(8).lambda_variance(-1), {"lambda_variance", "-1"}));
  EXPECT_TRUE(refused(Options(8).mi("mine"), {"mi", "similarity", "information", "mine"}));
  AdvancedLoadBalancingLoss loss(8);
  EXPECT_TRUE(fails([&] { loss(at::ones({4, 7})); }, {"gating_weights", "8", "[4, 7]"}));
  EXPECT_TRUE(fails([&] { loss(at::ones({8})); }, {"gating_weights", "[8]"}));
  EXPECT_TRUE(fails([&] { loss(at::ones({4, 8}, at::kLong)); }, {"gating_weights", "Long"}));
  EXPECT_TRUE(fails(
      [&] {
        loss(at::ones({4, 8}), at::ones({3, 2}));
      },
      {"input_features", "4", "[3, 2]"}));
}

}  // namespace
}  // namespace equipoise
