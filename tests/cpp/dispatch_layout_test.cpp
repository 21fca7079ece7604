// SPDX-License-Identifier: Apache-2.0
// dispatch_layout against comparing each slot with each rank.
#include "ops/dispatch_layout.h"

#include "test_util.h"

namespace equipoise {
namespace {

using test::fails;
using test::same;

TEST(DispatchLayout, Example) {
  const auto topk_indices = torch::tensor({{0, 1}, {1, 3}, {3, -1}}, at::kLong);
  const auto layout = dispatch_layout(topk_indices, 2, 4);
  EXPECT_TRUE(same(layout.num_tokens_per_rank, torch::tensor({2, 2}, at::kInt)));
  EXPECT_TRUE(same(layout.num_tokens_per_expert, torch::tensor({1, 2, 0, 2}, at::kInt)));
  EXPECT_TRUE(same(layout.is_token_in_rank, torch::tensor({{1, 0}, {1, 1}, {0, 1}}).to(at::kBool)));
}

TEST(DispatchLayout, MatchesComparingEachSlot) {
  at::manual_seed(0);
  for (const auto& [num_tokens, top_k, num_ranks, num_experts] :
       std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>{
           {1, 1, 1, 1}, {500, 8, 8, 64}, {7, 3, 200, 200}, {0, 2, 3, 6}}) {
    const auto topk_indices = at::randint(-1, num_experts, {num_tokens, top_k}, at::kLong);
    const auto layout = dispatch_layout(topk_indices, num_ranks, num_experts);
    const auto is_expert = topk_indices.unsqueeze(-1) == at::arange(num_experts);
    const auto in_rank =
        is_expert.reshape({num_tokens, top_k, num_ranks, num_experts / num_ranks}).sum({1, 3}) > 0;
    EXPECT_TRUE(same(layout.is_token_in_rank, in_rank));
    EXPECT_TRUE(same(layout.num_tokens_per_rank, in_rank.sum(0).to(at::kInt)));
    EXPECT_TRUE(same(layout.num_tokens_per_expert, is_expert.sum({0, 1}).to(at::kInt)));
  }
}

TEST(DispatchLayout, NamesTheWrongArgument) {
  const auto topk_indices = at::zeros({4, 2}, at::kLong);
  EXPECT_TRUE(fails([&] { dispatch_layout(topk_indices.to(at::kInt), 2, 4); },
                    {"dispatch_layout", "topk_indices", "Int"}));
  EXPECT_TRUE(fails([&] { dispatch_layout(topk_indices.select(1, 0), 2, 4); },
                    {"dispatch_layout", "topk_indices", "[4]"}));
  EXPECT_TRUE(fails([&] { dispatch_layout(topk_indices + 4, 2, 4); },
                    {"dispatch_layout", "topk_indices", "4"}));
  EXPECT_TRUE(fails([&] { dispatch_layout(topk_indices, 3, 4); },
                    {"dispatch_layout", "num_ranks", "divide", "3"}));
  EXPECT_TRUE(
      fails([&] { dispatch_layout(topk_indices, 0, 4); }, {"dispatch_layout", "num_ranks", "0"}));
}

}  // namespace
}  // namespace equipoise
