// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size against lists of the slots of each expert.
#include "ops/moe_align_block_size.h"

#include "test_util.h"

namespace equipoise {
namespace {

using test::fails;
using test::same;

TEST(MoEAlignBlockSize, Example) {
  const auto topk_indices = torch::tensor({{2, 0}, {0, 2}, {-1, 2}}, at::kLong);
  const auto blocks = moe_align_block_size(topk_indices, 2, 3);
  EXPECT_TRUE(
      same(blocks.sorted_token_ids, torch::tensor({1, 2, 0, 3, 5, 6, 6, 6, 6, 6}, at::kInt)));
  EXPECT_TRUE(same(blocks.expert_ids, torch::tensor({0, 2, 2, -1, -1}, at::kInt)));
  EXPECT_TRUE(same(blocks.num_tokens_post_padded, torch::tensor({6}, at::kInt)));
}

TEST(MoEAlignBlockSize, MatchesListsOfSlots) {
  at::manual_seed(0);
  for (const auto& [num_tokens, top_k, num_experts, block_size] :
       std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>{
           {1, 1, 1, 1}, {500, 8, 64, 16}, {7, 3, 200, 4}, {0, 2, 3, 4}}) {
    const auto topk_indices = at::randint(-1, num_experts, {num_tokens, top_k}, at::kLong);
    const int64_t slots = num_tokens * top_k;
    std::vector<int> ids, experts;
    for (int64_t e = 0; e < num_experts; ++e) {
      const auto of_expert = (topk_indices.flatten() == e).nonzero();
      for (int64_t i = 0; i < of_expert.size(0); ++i) ids.push_back(of_expert[i].item<int>());
      while (ids.size() % block_size != 0) ids.push_back(static_cast<int>(slots));
      while (experts.size() * block_size < ids.size()) experts.push_back(static_cast<int>(e));
    }
    const int size = static_cast<int>(ids.size());
    const auto whole = (slots + num_experts * (block_size - 1) + block_size - 1) / block_size;
    experts.resize(std::min(slots, whole), -1);
    ids.resize(experts.size() * block_size, static_cast<int>(slots));
    const auto blocks = moe_align_block_size(topk_indices, block_size, num_experts);
    EXPECT_TRUE(same(blocks.sorted_token_ids, torch::tensor(ids, at::kInt)));
    EXPECT_TRUE(same(blocks.expert_ids, torch::tensor(experts, at::kInt)));
    EXPECT_EQ(blocks.num_tokens_post_padded.item<int>(), size);
  }
}

TEST(MoEAlignBlockSize, NamesTheWrongArgument) {
  const auto topk_indices = at::zeros({4, 2}, at::kLong);
  constexpr const char* op = "moe_align_block_size";
  EXPECT_TRUE(fails([&] { moe_align_block_size(topk_indices.to(at::kInt), 2, 4); },
                    {op, "topk_indices", "Int"}));
  EXPECT_TRUE(
      fails([&] { moe_align_block_size(topk_indices + 4, 2, 4); }, {op, "topk_indices", "4"}));
  EXPECT_TRUE(fails([&] { moe_align_block_size(topk_indices, 0, 4); }, {op, "block_size", "0"}));
  EXPECT_TRUE(fails([&] { moe_align_block_size(topk_indices, 2, 0); }, {op, "num_experts", "0"}));
}

}  // namespace
}  // namespace equipoise
