// SPDX-License-Identifier: Apache-2.0
// balance_loss, switch_loss and z_loss against their formulas, written with ATen on the logits.
#include "ops/balance_loss.h"

#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

/// E sum_e f_e P_e from the logits; `real` is 1 for tokens that count.
at::Tensor switch_reference(const at::Tensor& logits, int64_t top_k, const at::Tensor& real) {
  const auto num_experts = logits.size(1);
  const auto prob = at::softmax(logits, 1);
  const auto counts =
      (at::one_hot(std::get<1>(prob.topk(top_k, 1)), num_experts).sum(1) * real.unsqueeze(1))
          .sum(0);
  const auto share = counts / (real.sum() * top_k);
  return num_experts * (share * real.matmul(prob) / real.sum()).sum();
}

at::Tensor z_reference(const at::Tensor& logits, const at::Tensor& real) {
  return (real * at::logsumexp(logits, 1).square()).sum() / real.sum();
}

TEST(BalanceLoss, MatchesTheFormulas) {
  at::manual_seed(0);
  const auto logits = random_leaf({31, 9});
  const auto real = (at::rand({31}, at::kDouble) > 0.2).to(at::kDouble);
  const auto routing = topk_gating(logits, 3, TopKGatingOptions().token_mask(real > 0));
  const auto report = balance_loss(routing, {{"switch", 0.25}, {"z", 0.125}});
  const auto switch_value = switch_reference(logits, 3, real);
  const auto z_value = z_reference(logits, real);

  EXPECT_EQ(report.names, (std::vector<std::string>{"switch", "z"}));
  EXPECT_TRUE(close(report.values, at::stack({switch_value, z_value})));
  const auto total = 0.25 * switch_value + 0.125 * z_value;
  EXPECT_TRUE(close(report.total, total));
  EXPECT_TRUE(close(gradients(report.total, {logits})[0], gradients(total, {logits})[0]));
  EXPECT_TRUE(close(gradients(report.values, {logits})[0],
                    gradients(at::stack({switch_value, z_value}), {logits})[0]));

  EXPECT_TRUE(close(switch_loss(routing), switch_value));
  EXPECT_TRUE(
      close(gradients(switch_loss(routing), {logits})[0], gradients(switch_value, {logits})[0]));
  EXPECT_TRUE(close(z_loss(routing), z_value));
  EXPECT_TRUE(close(gradients(z_loss(routing), {logits})[0], gradients(z_value, {logits})[0]));
}

TEST(BalanceLoss, KeepsTheOrderAskedFor) {
  const auto routing = topk_gating(at::randn({8, 4}), 1);
  const auto report = balance_loss(routing, {{"z", 1.0}, {"switch", 0.0}});
  EXPECT_EQ(report.names, (std::vector<std::string>{"z", "switch"}));
  EXPECT_TRUE(close(report.values[0], z_loss(routing), 1e-6));
  EXPECT_TRUE(close(report.total, z_loss(routing), 1e-6));
  EXPECT_EQ(report.total.scalar_type(), at::kFloat);
}

TEST(BalanceLoss, SwitchIsOneAtBalanceAndLargeAtCollapse) {
  const auto balanced = topk_gating(20 * at::eye(4, at::kDouble).repeat({3, 1}), 1);
  EXPECT_TRUE(close(switch_loss(balanced), torch::tensor(1.0, at::kDouble)));
  const auto collapsed =
      topk_gating(torch::tensor({{40.0, 0.0, 0.0, 0.0}}, at::kDouble).repeat({12, 1}), 1);
  EXPECT_TRUE(close(switch_loss(collapsed), torch::tensor(4.0, at::kDouble)));
}

TEST(BalanceLoss, NothingToBalanceGivesZeroWithZeroGradient) {
  const auto one_expert = random_leaf({5, 1});
  const auto masked = random_leaf({5, 4});
  const auto nobody = TopKGatingOptions().token_mask(at::zeros({5}, at::kBool));
  for (const auto& [routing, logits] : std::vector<std::pair<RoutingResult, at::Tensor>>{
           {topk_gating(one_expert, 1), one_expert}, {topk_gating(masked, 2, nobody), masked}}) {
    const auto loss = switch_loss(routing);
    EXPECT_TRUE(same(loss, at::zeros({}, at::kDouble)));
    EXPECT_TRUE(same(gradients(loss, {logits})[0], at::zeros_like(logits)));
  }
}

TEST(BalanceLoss, SwitchIsLeftOutWhereEveryExpertGetsEveryToken) {
  const auto routing = topk_gating(at::randn({6, 3}), 3);
  const auto report = balance_loss(routing, {{"switch", 1.0}, {"z", 1.0}});
  EXPECT_EQ(report.values[0].item<float>(), 0);
  EXPECT_TRUE(close(report.total, z_loss(routing), 1e-6));
  EXPECT_TRUE(close(switch_loss(routing), torch::tensor(1.0f), 1e-6));
}

TEST(BalanceLoss, NamesTheWrongArgument) {
  const auto routing = topk_gating(at::randn({6, 3}), 2);
  EXPECT_TRUE(fails([&] { balance_loss(routing, {{"swich", 1.0}}); }, {"balance_loss", "swich"}));
  EXPECT_TRUE(fails(
      [&] {
        balance_loss(routing, {{"switch", -1.0}});
      },
      {"balance_loss", "switch", "-1"}));
  const auto without_stats = topk_gating(at::randn({6, 3}), 2, TopKGatingOptions().stats(false));
  EXPECT_TRUE(fails(
      [&] {
        balance_loss(without_stats, {{"switch", 1.0}});
      },
      {"balance_loss", "stats"}));
}

}  // namespace
}  // namespace equipoise
