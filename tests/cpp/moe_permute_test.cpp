// SPDX-License-Identifier: Apache-2.0
// moe_permute against a stable sort of the slots by expert.
#include "ops/moe_permute.h"

#include <limits>

#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

/// The slots (flat over [T, K]) in the order of the permuted rows; slots with -1 are left out.
at::Tensor slots_by_expert(const at::Tensor& topk_indices) {
  const auto flat = topk_indices.flatten();
  const auto order = std::get<1>(flat.sort(/*stable=*/true, /*dim=*/0, /*descending=*/false));
  return order.index_select(0, (flat.index_select(0, order) >= 0).nonzero().flatten());
}

/// `rows`, followed by zero rows up to `size`.
at::Tensor fill_up(const at::Tensor& rows, int64_t size) {
  auto sizes = rows.sizes().vec();
  sizes[0] = size - rows.size(0);
  return at::cat({rows, at::zeros(sizes, rows.options())});
}

TEST(MoEPermute, Example) {
  const auto x = torch::tensor({{1.0, 1.5}, {2.0, 2.5}, {3.0, 3.5}});
  const auto topk_indices = torch::tensor({{2, 0}, {-1, 2}, {0, 1}}, at::kLong);
  const auto result = moe_permute(x, topk_indices, 3);
  EXPECT_TRUE(same(
      result.permuted,
      torch::tensor({{1.0, 1.5}, {3.0, 3.5}, {3.0, 3.5}, {1.0, 1.5}, {2.0, 2.5}, {0.0, 0.0}})));
  EXPECT_TRUE(same(result.row_id_map, torch::tensor({{3, 0}, {-1, 4}, {1, 2}}, at::kLong)));
  EXPECT_TRUE(same(result.tokens_per_expert, torch::tensor({2, 1, 2}, at::kLong)));
  EXPECT_TRUE(same(result.kept_per_expert, torch::tensor({2, 1, 2}, at::kLong)));
  EXPECT_TRUE(same(result.expert_offsets, torch::tensor({0, 2, 3, 5}, at::kLong)));
  EXPECT_EQ(result.overflow.item<int64_t>(), 0);
}

TEST(MoEPermute, MatchesStableSort) {
  at::manual_seed(0);
  for (const auto& [num_tokens, top_k, num_experts] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{
           {1, 1, 1}, {33, 2, 5}, {500, 8, 64}, {7, 3, 200}, {0, 2, 3}}) {
    const auto topk_indices = at::randint(-1, num_experts, {num_tokens, top_k}, at::kLong);
    const auto x = random_leaf({num_tokens, 6});
    const auto weights = random_leaf({num_tokens, top_k});
    const auto result =
        moe_permute(x, topk_indices, num_experts, MoEPermuteOptions().topk_weights(weights));

    const auto slots = slots_by_expert(topk_indices);
    const auto num_rows = num_tokens * top_k;
    const auto permuted = fill_up(x.index_select(0, slots.floor_divide(top_k)), num_rows);
    const auto permuted_weights = fill_up(weights.flatten().index_select(0, slots), num_rows);
    const auto row_id_map =
        at::full({num_rows}, -1, at::kLong).index_copy(0, slots, at::arange(slots.size(0)));
    EXPECT_TRUE(same(result.permuted, permuted));
    EXPECT_TRUE(same(result.permuted_weights, permuted_weights));
    EXPECT_TRUE(same(result.row_id_map, row_id_map.reshape({num_tokens, top_k})));
    EXPECT_TRUE(same(result.tokens_per_expert,
                     (topk_indices.unsqueeze(-1) == at::arange(num_experts)).sum({0, 1})));
    EXPECT_TRUE(same(result.expert_offsets.slice(0, 1), result.tokens_per_expert.cumsum(0)));

    EXPECT_TRUE(close(gradients(result.permuted, {x})[0], gradients(permuted, {x})[0]));
    EXPECT_TRUE(close(gradients(result.permuted_weights, {weights})[0],
                      gradients(permuted_weights, {weights})[0]));
  }
}

TEST(MoEPermute, GivenCountsChangeNothing) {
  at::manual_seed(0);
  const auto topk_indices = at::randint(-1, 9, {50, 2}, at::kLong);
  const auto x = at::randn({50, 4}, at::kBFloat16);
  const auto counted = moe_permute(x, topk_indices, 9);
  const auto given = moe_permute(x, topk_indices, 9,
                                 MoEPermuteOptions().tokens_per_expert(counted.tokens_per_expert));
  EXPECT_TRUE(same(given.permuted, counted.permuted));
  EXPECT_TRUE(same(given.row_id_map, counted.row_id_map));
  EXPECT_TRUE(same(given.expert_offsets, counted.expert_offsets));
}

/// Tokens 0..5 of one column, all to expert 0.
PermuteResult permute_to_one_expert(const MoEPermuteOptions& options) {
  return moe_permute(at::arange(6, at::kFloat).unsqueeze(1), at::zeros({6, 1}, at::kLong), 1,
                     options);
}

TEST(MoEPermute, EachPolicyKeepsItsOwn) {
  const auto weights = torch::tensor({0.1F, 0.2F, 0.5F, 0.5F, 0.9F, 0.5F}).unsqueeze(1);
  const auto options = MoEPermuteOptions().topk_weights(weights).capacity(3).pad_to_capacity(true);
  const auto kept = [](const PermuteResult& result) { return result.permuted.flatten(); };
  EXPECT_TRUE(same(kept(permute_to_one_expert(options)), torch::tensor({0.0F, 1.0F, 2.0F})));
  const auto by_probs = permute_to_one_expert(MoEPermuteOptions(options).drop_policy("probs"));
  EXPECT_TRUE(same(kept(by_probs), torch::tensor({2.0F, 3.0F, 4.0F})));
  EXPECT_TRUE(same(by_probs.permuted_weights, torch::tensor({0.5F, 0.5F, 0.9F})));
  EXPECT_TRUE(same(by_probs.tokens_per_expert, torch::tensor({6}, at::kLong)));
  EXPECT_TRUE(same(by_probs.kept_per_expert, torch::tensor({3}, at::kLong)));
  EXPECT_TRUE(same(by_probs.dropped_per_expert(), torch::tensor({3}, at::kLong)));

  const auto random = MoEPermuteOptions(options).drop_policy("random");
  const auto rows = [&](int64_t seed) {
    return kept(permute_to_one_expert(MoEPermuteOptions(random).seed(seed)));
  };
  EXPECT_TRUE(same(rows(1), rows(1)));
  bool differs = false;
  for (int64_t seed = 2; seed < 10; ++seed) differs |= !same(rows(1), rows(seed));
  EXPECT_TRUE(differs);
}

TEST(MoEPermute, RoutingMapIsTheSameAsIndices) {
  at::manual_seed(0);
  const auto x = at::randn({20, 4});
  const auto routing_map = at::rand({20, 5}) < 0.4;
  const auto indices = at::where(routing_map, at::arange(5), -1);
  for (const auto& options :
       {MoEPermuteOptions().align(4), MoEPermuteOptions().capacity(3).output_rows(15)}) {
    const auto by_map =
        moe_permute(x, std::nullopt, 5, MoEPermuteOptions(options).routing_map(routing_map));
    const auto by_indices = moe_permute(x, indices, 5, options);
    EXPECT_TRUE(same(by_map.permuted, by_indices.permuted));
    EXPECT_TRUE(same(by_map.row_id_map, by_indices.row_id_map));
    EXPECT_TRUE(same(by_map.expert_offsets, by_indices.expert_offsets));
  }
}

TEST(MoEPermute, RoomsAreAligned) {
  const auto indices = torch::tensor({{0}, {2}, {2}, {2}}, at::kLong);
  const auto result = moe_permute(at::ones({4, 1}), indices, 3, MoEPermuteOptions().align(2));
  EXPECT_TRUE(same(result.expert_offsets, torch::tensor({0, 2, 2, 6}, at::kLong)));
  EXPECT_TRUE(same(result.permuted.flatten(),
                   torch::tensor({1.0F, 0.0F, 1.0F, 1.0F, 1.0F, 0.0F, 0.0F, 0.0F})));
}

TEST(MoEPermute, WritesIntoMemoryThatIsGiven) {
  at::manual_seed(0);
  const auto x = at::randn({6, 3}), out = at::full({12, 3}, -1.0);
  const auto indices = at::randint(-1, 4, {6, 2}, at::kLong);
  const auto result = moe_permute(x, indices, 4, MoEPermuteOptions().out(out));
  EXPECT_EQ(result.permuted.data_ptr(), out.data_ptr());
  EXPECT_TRUE(same(out, moe_permute(x, indices, 4).permuted));
  EXPECT_TRUE(fails(
      [&] {
        moe_permute(x, indices, 4, MoEPermuteOptions().out(at::ones({2, 3})));
      },
      {"moe_permute", "out", "[2, 3]"}));
}

TEST(MoEPermute, ExpertCapacity) {
  EXPECT_EQ(expert_capacity(4096, 2, 64, 1.25), 160);
  EXPECT_EQ(expert_capacity(100, 1, 10, 1.1), 11);
  EXPECT_EQ(expert_capacity(8, 2, 64, 1.0, 4), 4);
  EXPECT_EQ(expert_capacity(2, 2, 64, 1.0, 4), 2);
  EXPECT_TRUE(
      fails([] { expert_capacity(4, 1, 2, -1.0); }, {"expert_capacity", "capacity_factor"}));
}

TEST(MoEPermute, BackwardReadsNoRowOfNobody) {
  const auto x = random_leaf({3, 4});
  const auto result = moe_permute(x, torch::tensor({{0, -1}, {-1, -1}, {1, 0}}, at::kLong), 2);
  auto grad = at::ones({6, 4}, at::kDouble);
  grad.slice(0, 3).fill_(std::numeric_limits<double>::quiet_NaN());
  const auto grad_x = torch::autograd::grad({result.permuted}, {x}, {grad})[0];
  EXPECT_TRUE(same(grad_x.select(1, 0), torch::tensor({1.0, 0.0, 2.0}, at::kDouble)));
}

TEST(MoEPermute, NamesTheWrongArgument) {
  const auto x = at::randn({4, 6});
  const auto topk_indices = at::zeros({4, 2}, at::kLong);
  EXPECT_TRUE(fails(
      [&] {
        moe_permute(x, at::zeros({5, 2}, at::kLong), 3);
      },
      {"moe_permute", "topk_indices", "5"}));
  EXPECT_TRUE(fails([&] { moe_permute(x, topk_indices.to(at::kFloat), 3); },
                    {"moe_permute", "topk_indices"}));
  EXPECT_TRUE(
      fails([&] { moe_permute(x, topk_indices + 3, 3); }, {"moe_permute", "topk_indices", "3"}));
  EXPECT_TRUE(fails([&] { moe_permute(x, topk_indices, 0); }, {"moe_permute", "num_experts", "0"}));
  EXPECT_TRUE(fails([&] { moe_permute(at::randn({4}), topk_indices, 3); }, {"moe_permute", "x"}));
  EXPECT_TRUE(fails(
      [&] { moe_permute(x, topk_indices, 3, MoEPermuteOptions().topk_weights(at::ones({4}))); },
      {"moe_permute", "topk_weights", "[4]"}));
  EXPECT_TRUE(fails(
      [&] {
        moe_permute(x, topk_indices, 3,
                    MoEPermuteOptions().tokens_per_expert(torch::tensor({1, 0, 0}, at::kLong)));
      },
      {"moe_permute", "tokens_per_expert"}));
  EXPECT_TRUE(fails([&] { moe_permute(x, topk_indices, 3, MoEPermuteOptions().capacity(-1)); },
                    {"moe_permute", "capacity", "-1"}));
  EXPECT_TRUE(fails([&] { moe_permute(x, topk_indices, 3, MoEPermuteOptions().drop_policy("no")); },
                    {"moe_permute", "drop_policy", "no"}));
}

}  // namespace
}  // namespace equipoise
