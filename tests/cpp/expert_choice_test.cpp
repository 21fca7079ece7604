// SPDX-License-Identifier: Apache-2.0
// expert_choice: which tokens, their weights, and the gradient.
#include "ops/expert_choice.h"

#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

TEST(ExpertChoice, Example) {
  const auto logits = torch::tensor({{2.0, 0.0}, {1.0, 0.0}, {0.0, 0.0}});
  const auto r = expert_choice(logits, 2);
  EXPECT_TRUE(same(r.token_indices, torch::tensor({{0, 1}, {2, 1}}, at::kLong)));
  const auto probs = logits.softmax(-1).t();
  EXPECT_TRUE(close(r.token_weights, probs.gather(1, r.token_indices)));
}

TEST(ExpertChoice, TiesGoToTheLowerTokenAndNobodyIsMinusOne) {
  const auto r = expert_choice(at::zeros({4, 2}), 9, torch::tensor({true, false, true, true}));
  EXPECT_TRUE(same(r.token_indices, torch::tensor({{0, 2, 3, -1}, {0, 2, 3, -1}}, at::kLong)));
  EXPECT_TRUE(same(r.token_weights, torch::tensor({{.5f, .5f, .5f, 0.f}, {.5f, .5f, .5f, 0.f}})));
  auto logits = at::randn({3, 2});
  logits[1][0] = std::numeric_limits<float>::quiet_NaN();
  const auto of_absent = expert_choice(logits, 3).token_indices[0];
  EXPECT_EQ(of_absent[2].item<int64_t>(), -1);
  EXPECT_EQ(of_absent.eq(1).sum().item<int64_t>(), 0);
}

TEST(ExpertChoice, Gradient) {
  at::manual_seed(0);
  const auto logits = random_leaf({7, 4});
  const auto r = expert_choice(logits, 3);
  const auto want = logits.softmax(-1).t().gather(1, r.token_indices);
  EXPECT_TRUE(close(gradients(r.token_weights, {logits})[0], gradients(want, {logits})[0]));
}

TEST(ExpertChoice, NamesTheWrongArgument) {
  const auto logits = at::randn({5, 3});
  constexpr const char* op = "expert_choice";
  EXPECT_TRUE(fails([&] { expert_choice(logits.to(at::kLong), 1); }, {op, "logits", "Long"}));
  EXPECT_TRUE(fails([&] { expert_choice(logits, -1); }, {op, "capacity", "-1"}));
  EXPECT_TRUE(
      fails([&] { expert_choice(logits, 1, at::ones({4})); }, {op, "token_mask", "[5]", "[4]"}));
}

}  // namespace
}  // namespace equipoise
