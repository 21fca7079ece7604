// SPDX-License-Identifier: Apache-2.0
// expert_bincount against the one-hot way of counting.
#include "ops/expert_bincount.h"

#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

/// [..., K, E] bool: true where the slot holds the expert.
at::Tensor slot_holds_expert(const at::Tensor& indices, int64_t num_experts) {
  return indices.unsqueeze(-1) == at::arange(num_experts);
}

TEST(ExpertBincount, CountsEverySlotButMinusOne) {
  const auto indices = torch::tensor({{0, 2}, {2, 1}, {-1, 2}}, at::kLong);
  EXPECT_TRUE(same(expert_bincount(indices, 4), torch::tensor({1, 1, 3, 0}, at::kLong)));
  at::manual_seed(0);
  for (const int64_t num_experts : {1, 7, 300}) {
    const auto random = at::randint(-1, num_experts, {5, 113, 3}, at::kLong);
    EXPECT_TRUE(same(expert_bincount(random, num_experts),
                     slot_holds_expert(random, num_experts).sum({0, 1, 2})));
  }
}

TEST(ExpertBincount, CountsNothing) {
  EXPECT_TRUE(same(expert_bincount(at::empty({0, 2}, at::kLong), 3), at::zeros({3}, at::kLong)));
}

TEST(ExpertBincount, LeavesMaskedTokensOut) {
  const auto indices = torch::tensor({{0, 2}, {2, 1}, {0, 2}}, at::kLong);
  const auto mask = torch::tensor({1, 0, 1}).to(at::kBool);
  EXPECT_TRUE(
      same(expert_bincount(indices, 3, std::nullopt, mask), torch::tensor({2, 0, 2}, at::kLong)));
}

TEST(ExpertBincount, CountsEachSegmentByItself) {
  at::manual_seed(0);
  const auto indices = at::randint(-1, 5, {40, 3}, at::kLong);
  const auto segment_ids = at::randint(0, 4, {40}, at::kLong);
  const auto mask = at::rand({40}) > 0.3;
  const auto weights = random_leaf({40, 3});
  at::Tensor num_invalid;
  const auto counts = expert_bincount(indices, 5, std::nullopt, mask, segment_ids, 4, &num_invalid);
  const auto sums = expert_bincount(indices, 5, weights, mask, segment_ids, 4);
  EXPECT_TRUE(same(num_invalid, torch::tensor(0, at::kLong)));
  for (const int64_t s : {0, 1, 2, 3}) {
    const auto tokens = mask.logical_and(segment_ids == s);
    EXPECT_TRUE(same(counts[s], expert_bincount(indices, 5, std::nullopt, tokens)));
    EXPECT_TRUE(close(sums[s], expert_bincount(indices, 5, weights, tokens)));
  }
  const auto whole = expert_bincount(indices, 5, weights, mask);
  EXPECT_TRUE(close(gradients(sums.sum(0), {weights})[0], gradients(whole, {weights})[0]));
}

TEST(ExpertBincount, FrequencyIsTheShareOfTheSelections) {
  const auto indices = torch::tensor({{0, 2}, {2, -1}, {-1, -1}}, at::kLong);
  EXPECT_TRUE(close(expert_frequency(indices, 3), torch::tensor({1.f, 0.f, 2.f}) / 3, 1e-6));
  const auto frequency =
      expert_frequency(indices, 3, std::nullopt, torch::tensor({1, 1, 0}, at::kLong), 2);
  EXPECT_TRUE(close(frequency, torch::tensor({{0.f, 0.f, 0.f}, {1.f, 0.f, 2.f}}) / 3, 1e-6));
}

TEST(ExpertBincount, WeightsAreAddedUpAndDifferentiable) {
  at::manual_seed(0);
  const auto indices = at::randint(-1, 5, {40, 3}, at::kLong);
  const auto weights = random_leaf({40, 3});
  const auto mask = at::rand({40}) > 0.3;
  const auto got = expert_bincount(indices, 5, weights, mask);
  const auto want =
      (slot_holds_expert(indices, 5) * (weights * mask.unsqueeze(1)).unsqueeze(-1)).sum({0, 1});
  EXPECT_TRUE(close(got, want));
  EXPECT_TRUE(close(gradients(got, {weights})[0], gradients(want, {weights})[0]));
  EXPECT_EQ(expert_bincount(indices, 5, weights.to(at::kBFloat16)).scalar_type(), at::kFloat);
}

TEST(ExpertBincount, NamesTheWrongArgument) {
  const auto indices = at::zeros({4, 2}, at::kLong);
  EXPECT_TRUE(fails([&] { expert_bincount(indices, 0); }, {"expert_bincount", "num_experts", "0"}));
  EXPECT_TRUE(
      fails([&] { expert_bincount(indices.to(at::kFloat), 2); }, {"expert_bincount", "indices"}));
  EXPECT_TRUE(fails([&] { expert_bincount(indices + 3, 3); }, {"expert_bincount", "indices", "3"}));
  EXPECT_TRUE(
      fails([&] { expert_bincount(indices - 2, 3); }, {"expert_bincount", "indices", "-2"}));
  EXPECT_TRUE(fails([&] { expert_bincount(indices, 3, at::ones({4})); },
                    {"expert_bincount", "weights", "[4]"}));
  EXPECT_TRUE(fails([&] { expert_bincount(indices, 3, std::nullopt, at::ones({3}, at::kBool)); },
                    {"expert_bincount", "token_mask", "[3]"}));
  const auto segments = at::full({4}, 3, at::kLong);
  const auto count = [&](const at::Tensor& ids, std::optional<int64_t> num_segments) {
    return [=] { expert_bincount(indices, 2, std::nullopt, std::nullopt, ids, num_segments); };
  };
  EXPECT_TRUE(fails(count(segments, std::nullopt), {"expert_bincount", "num_segments"}));
  EXPECT_TRUE(fails(count(segments.slice(0, 1), 4), {"expert_bincount", "segment_ids", "[3]"}));
  EXPECT_TRUE(fails(count(segments, 3), {"expert_bincount", "segment_ids", "got 3"}));
}

}  // namespace
}  // namespace equipoise
