// SPDX-License-Identifier: Apache-2.0
// sinkhorn against a factor per row and per column.
#include "ops/sinkhorn.h"

#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::fails;
using test::same;

TEST(Sinkhorn, MatchesFactorsOfRowsAndColumns) {
  at::manual_seed(0);
  for (const int64_t num_iters : {1, 8}) {
    const auto logits = at::randn({30, 5}, at::kDouble);
    const auto cost = logits.exp();
    auto rows = at::ones({30}, at::kDouble), columns = at::ones({5}, at::kDouble);
    for (int64_t i = 0; i < num_iters; ++i) {
      rows = 1 / (30 * cost.mv(columns));
      columns = 1 / (5 * cost.t().mv(rows));
    }
    EXPECT_TRUE(close(sinkhorn(logits, num_iters), rows.unsqueeze(1) * cost * columns));
  }
}

TEST(Sinkhorn, MaskedTokensAndAbsentExpertsAreZero) {
  auto logits = torch::tensor({{2.0, 0.0}, {2.0, 1.0}, {5.0, 5.0}});
  const auto mask = torch::tensor({true, true, false});
  const auto plan = sinkhorn(logits, 20, mask);
  EXPECT_TRUE(close(plan.slice(0, 0, 2), sinkhorn(logits.slice(0, 0, 2), 20)));
  EXPECT_TRUE(same(plan[2], torch::tensor({0.0, 0.0})));
  logits.select(1, 0).fill_(-std::numeric_limits<double>::infinity());
  EXPECT_TRUE(
      close(sinkhorn(logits, 20, mask), torch::tensor({{0.0, .25}, {0.0, .25}, {0.0, 0.0}})));
}

TEST(Sinkhorn, HasNoGradientAndWidensHalfTypes) {
  const auto logits = test::random_leaf({4, 3}, at::kBFloat16);
  const auto plan = sinkhorn(logits);
  EXPECT_FALSE(plan.requires_grad());
  EXPECT_TRUE(same(plan, sinkhorn(logits.to(at::kFloat))));
}

TEST(Sinkhorn, NamesTheWrongArgument) {
  const auto logits = at::randn({5, 3});
  EXPECT_TRUE(fails([&] { sinkhorn(logits.to(at::kLong)); }, {"sinkhorn", "logits", "Long"}));
  EXPECT_TRUE(fails([&] { sinkhorn(logits, 0); }, {"sinkhorn", "num_iters", "0"}));
  EXPECT_TRUE(
      fails([&] { sinkhorn(logits, 8, at::ones({4})); }, {"sinkhorn", "token_mask", "[5]", "[4]"}));
}

}  // namespace
}  // namespace equipoise
