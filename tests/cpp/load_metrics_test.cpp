// SPDX-License-Identifier: Apache-2.0
// load_metrics on a published case and on layers side by side.
#include "ops/load_metrics.h"

#include <cmath>

#include "test_util.h"

namespace equipoise {
namespace {

using test::fails;
using test::same;

TEST(LoadMetrics, PublishedCase) {
  const auto load = load_metrics(torch::tensor({1, 2, 261, 266, 6, 253, 229, 6}, at::kLong));
  ASSERT_EQ(load.size(), kLoadMetricNames.size());
  const auto rounded = [&](const char* name) {
    return std::round(1000 * load[name].item<double>()) / 1000;
  };
  EXPECT_EQ(rounded("cv"), 0.974);
  EXPECT_EQ(rounded("imbalance_ratio"), 2.078);
  EXPECT_EQ(rounded("max_vio"), 1.078);
  EXPECT_EQ(rounded("max_vio_tokens"), 138);
  EXPECT_EQ(rounded("gini"), 0.502);
  EXPECT_EQ(rounded("entropy"), 1.458);
  EXPECT_EQ(rounded("perplexity"), 4.298);
  EXPECT_EQ(rounded("kl_to_uniform"), 0.621);
  EXPECT_EQ(rounded("expert_utilization_rate"), 0.5);
  EXPECT_EQ(rounded("dead_experts"), 0);
}

TEST(LoadMetrics, LayersStayApartAndVarianceMayBeUnbiased) {
  const auto counts = torch::tensor({8, 0, 0, 0, 2, 2, 2, 2}, at::kLong).view({2, 4});
  const auto load = load_metrics(counts, /*unbiased=*/true);
  EXPECT_TRUE(same(load["max_vio"], torch::tensor({3, 0}, at::kDouble)));
  EXPECT_TRUE(same(load["cv"], torch::tensor({2, 0}, at::kDouble)));
}

TEST(LoadMetrics, NamesTheWrongArgument) {
  EXPECT_TRUE(fails([] { load_metrics(at::ones({4})); },
                    {"load_metrics", "tokens_per_expert", "Long", "Float"}));
  EXPECT_TRUE(fails(
      [] {
        load_metrics(torch::tensor({3, -1}, at::kLong));
      },
      {"load_metrics", "tokens_per_expert", ">= 0", "-1"}));
}

}  // namespace
}  // namespace equipoise
