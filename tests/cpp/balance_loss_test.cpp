// SPDX-License-Identifier: Apache-2.0
// balance_loss and its single functions against their formulas, written with ATen on the logits.
#include "ops/balance_loss.h"

#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::error_of;
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

/// Var / mean^2 of E numbers.
at::Tensor spread_reference(const at::Tensor& of_expert, bool unbiased) {
  return of_expert.var(/*dim=*/std::nullopt, /*correction=*/unbiased ? 1 : 0) /
         of_expert.mean().square();
}

struct Reference {
  std::string name;
  BalanceLossOptions options;
  at::Tensor value;
};

/// Every loss on the logits [T, 6] of real tokens, of which each chooses 2.
std::vector<Reference> references(const at::Tensor& logits) {
  const auto prob = at::softmax(logits, 1), mean = prob.mean(0);
  const auto chosen = at::zeros_like(prob).scatter(1, std::get<1>(prob.topk(2, 1)), 1);
  const auto share = 6 * chosen.mean(0) / 2;  // E f_e
  const auto token_entropy = -(prob * at::log_softmax(logits, 1)).sum(1).mean();
  const auto penalties = torch::tensor({1.0, 2.0, 0.0, 0.5, 1.0, 3.0});
  const BalanceLossOptions none;
  const auto of_probs = BalanceLossOptions().importance_of("probs");
  return {
      {"switch", none, (share * mean).sum()},
      {"switch", BalanceLossOptions().expert_weights(penalties), (penalties * share * mean).sum()},
      {"device", none, at::ones({}, at::kDouble)},  // one device has everything
      {"device", BalanceLossOptions().num_devices(3),
       (share.view({3, 2}).mean(1) * mean.view({3, 2}).sum(1)).sum()},
      {"importance", none, spread_reference((prob * chosen).sum(0), false)},
      {"importance", BalanceLossOptions().unbiased(true),
       spread_reference((prob * chosen).sum(0), true)},
      {"importance", of_probs, spread_reference(mean, false)},
      {"importance", BalanceLossOptions(of_probs).unbiased(true), spread_reference(mean, true)},
      {"z", none, z_reference(logits, at::ones({logits.size(0)}, at::kDouble))},
      {"uniform_kl", none, -(6 * mean).log().mean()},
      {"entropy", none, (mean * (6 * mean).log()).sum()},
      {"variance", none, mean.var()},
      {"mutual_information", none, token_entropy + (mean * mean.log()).sum()},
      {"token_entropy", none, token_entropy},
  };
}

/// d value / d logits, zero where the value does not depend on them.
at::Tensor gradient(const at::Tensor& value, const at::Tensor& logits) {
  return gradients(value + 0 * logits.sum(), {logits})[0];
}

TEST(BalanceLoss, EveryLossMatchesItsFormula) {
  at::manual_seed(0);
  const auto logits = random_leaf({13, 6});
  const auto routing = topk_gating(logits, 2);
  for (const auto& [name, options, want] : references(logits)) {
    const auto report = balance_loss(routing, {{name, 0.5}}, options);
    EXPECT_TRUE(close(report.values, want.unsqueeze(0))) << name;
    EXPECT_TRUE(close(report.total, 0.5 * want)) << name;
    EXPECT_TRUE(close(gradient(report.total, logits), gradient(0.5 * want, logits))) << name;
  }
}

TEST(BalanceLoss, TheSingleFunctionsAreTheSame) {
  at::manual_seed(0);
  const auto logits = random_leaf({13, 6});
  const auto routing = topk_gating(logits, 2);
  const auto want = references(logits);
  const std::vector<at::Tensor> got{switch_loss(routing),
                                    device_loss(routing, 1),
                                    device_loss(routing, 3),
                                    importance_loss(routing),
                                    importance_loss(routing, "gates", true),
                                    importance_loss(routing, "probs"),
                                    importance_loss(routing, "probs", true),
                                    z_loss(routing),
                                    uniform_kl_loss(routing),
                                    entropy_loss(routing),
                                    variance_loss(routing),
                                    mutual_information_loss(routing),
                                    token_entropy_loss(routing)};
  EXPECT_TRUE(close(got[0], want[0].value));
  for (size_t i = 1; i < got.size(); ++i) {
    EXPECT_TRUE(close(got[i], want[i + 1].value)) << want[i + 1].name;
  }
}

TEST(BalanceLoss, ScopeSequenceIsTheMeanOverTheSegmentsThatHaveTokens) {
  at::manual_seed(0);
  const auto logits = random_leaf({7, 6});
  const auto ids = torch::tensor({0, 0, 0, 2, 2, 2, 2}, at::kLong);  // 1 and 3 are empty
  const auto routing = topk_gating(logits, 2, TopKGatingOptions().segment_ids(ids).num_segments(4));
  const auto whole = references(logits);
  const auto first = references(logits.narrow(0, 0, 3)), last = references(logits.narrow(0, 3, 4));
  for (size_t i = 0; i < whole.size(); ++i) {
    const auto& name = whole[i].name;
    auto options = whole[i].options;
    EXPECT_TRUE(close(balance_loss(routing, {{name, 1.0}}, options).total, whole[i].value)) << name;
    // Means over the tokens, and the gates, which are not kept by segment.
    const bool of_all = name == "z" || name == "token_entropy" ||
                        (name == "importance" && options.importance_of() == "gates");
    const auto want = of_all ? whole[i].value : (first[i].value + last[i].value) / 2;
    const auto got = balance_loss(routing, {{name, 1.0}}, options.scope("sequence")).total;
    EXPECT_TRUE(close(got, want)) << name;
    EXPECT_TRUE(close(gradient(got, logits), gradient(want, logits))) << name;
  }
  EXPECT_TRUE(close(switch_loss(routing, "sequence"), (first[0].value + last[0].value) / 2));
}

TEST(BalanceLoss, HuggingFacesNumbersAreKTimesAsLarge) {
  const auto routing = topk_gating(at::randn({9, 6}), 2);
  const std::vector<std::pair<std::string, double>> losses{{"switch", 1}, {"device", 1}, {"z", 1}};
  const auto options = BalanceLossOptions().num_devices(2);
  const auto plain = balance_loss(routing, losses, options).values;
  const auto hf = balance_loss(routing, losses, BalanceLossOptions(options).normalize("hf")).values;
  EXPECT_TRUE(close(hf, plain * torch::tensor({2.0f, 2.0f, 1.0f}), 1e-6));
}

TEST(BalanceLoss, ImportanceOfWeightedTokens) {
  at::manual_seed(0);
  const auto logits = at::randn({3, 4}, at::kDouble);
  const auto weights = torch::tensor({2.0, 0.0, 1.0}, at::kDouble);
  const auto weighted = topk_gating(logits, 2, TopKGatingOptions().token_mask(weights));
  const auto repeated = topk_gating(at::stack({logits[0], logits[0], logits[2]}), 2);
  EXPECT_TRUE(close(
      balance_loss(weighted, {{"importance", 1.0}}, BalanceLossOptions().token_weights(weights))
          .total,
      importance_loss(repeated)));
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
  for (const auto& [name, function] : std::vector<std::pair<std::string, std::string>>{
           {"load", "load_loss"},
           {"communication", "communication_loss"},
           {"router_l2", "router_l2_loss"},
           {"similarity_correlation", "similarity_correlation"},
           {"infonce", "infonce"},
           {"mine", "mine"}}) {
    EXPECT_TRUE(fails(
        [&, name = name] {
          balance_loss(routing, {{name, 1.0}});
        },
        {"balance_loss", "'" + name + "'", "call " + function + " for it"}));
  }
  EXPECT_TRUE(fails([&] { switch_loss(routing, "layer"); },
                    {"balance_loss", "scope", "'batch' or 'sequence'", "'layer'"}));
  EXPECT_TRUE(fails([&] { importance_loss(routing, "all"); },
                    {"balance_loss", "importance_of", "'gates' or 'probs'", "'all'"}));
  EXPECT_TRUE(fails(
      [&] {
        balance_loss(routing, {{"z", 1.0}}, BalanceLossOptions().normalize("topk"));
      },
      {"balance_loss", "normalize", "'none' or 'hf'", "'topk'"}));
  EXPECT_TRUE(fails([&] { device_loss(routing, 2); }, {"balance_loss", "num_devices", "3", "2"}));
  EXPECT_EQ(error_of([&] { balance_loss(routing, {{"token_entropy", -1.0}}); }), "");  // a bonus
  const auto without_stats = topk_gating(at::randn({6, 3}), 2, TopKGatingOptions().stats(false));
  EXPECT_TRUE(fails(
      [&] {
        balance_loss(without_stats, {{"switch", 1.0}});
      },
      {"balance_loss", "stats"}));
}

}  // namespace
}  // namespace equipoise
