// SPDX-License-Identifier: Apache-2.0
// sort_chunks_by_index against splitting and concatenating.
#include "ops/sort_chunks_by_index.h"

#include "ops/moe_unpermute.h"
#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

TEST(SortChunksByIndex, Example) {
  const auto x = torch::tensor({{1.0, 1.5}, {2.0, 2.5}, {3.0, 3.5}, {4.0, 4.5}});
  const auto s = sort_chunks_by_index(x, torch::tensor({1, 2, 1}, at::kLong),
                                      torch::tensor({2, 0, 1}, at::kInt));
  EXPECT_TRUE(same(s.sorted, torch::tensor({{4.0, 4.5}, {1.0, 1.5}, {2.0, 2.5}, {3.0, 3.5}})));
  EXPECT_TRUE(same(s.row_id_map, torch::tensor({{1}, {2}, {3}, {0}}, at::kLong)));
  EXPECT_EQ(s.sorted_probs.numel(), 0);
}

TEST(SortChunksByIndex, MatchesSplitAndCat) {
  at::manual_seed(0);
  for (const int64_t num_chunks : {1, 4, 300}) {
    const auto sizes = at::randint(0, 5, {num_chunks}, at::kLong);
    const auto order = at::randperm(num_chunks);
    const auto num_rows = sizes.sum().item<int64_t>();
    const auto x = random_leaf({num_rows, 6}), probs = random_leaf({num_rows});
    const auto in_order = [&](const at::Tensor& tensor) {
      const auto chunks = tensor.split_with_sizes(
          at::IntArrayRef(sizes.const_data_ptr<int64_t>(), num_chunks), /*dim=*/0);
      std::vector<at::Tensor> moved;
      for (int64_t i = 0; i < num_chunks; ++i) moved.push_back(chunks[order[i].item<int64_t>()]);
      return at::cat(moved);
    };
    const auto s = sort_chunks_by_index(x, sizes, order, probs);
    EXPECT_TRUE(same(s.sorted, in_order(x)));
    EXPECT_TRUE(same(s.sorted_probs, in_order(probs)));
    EXPECT_TRUE(same(moe_unpermute(s.sorted, s.row_id_map), x));
    EXPECT_TRUE(close(gradients(s.sorted, {x})[0], gradients(in_order(x), {x})[0]));
    EXPECT_TRUE(
        close(gradients(s.sorted_probs, {probs})[0], gradients(in_order(probs), {probs})[0]));
  }
}

TEST(SortChunksByIndex, NamesTheWrongArgument) {
  const auto x = at::randn({5, 2});
  const auto sizes = torch::tensor({2, 3}, at::kLong), order = torch::tensor({1, 0}, at::kLong);
  constexpr const char* op = "sort_chunks_by_index";
  EXPECT_TRUE(fails([&] { sort_chunks_by_index(x[0], sizes, order); }, {op, "x", "[2]"}));
  EXPECT_TRUE(fails([&] { sort_chunks_by_index(x, sizes + 1, order); }, {op, "split_sizes", "5"}));
  EXPECT_TRUE(fails([&] { sort_chunks_by_index(x, sizes - 3, order); }, {op, "split_sizes", "-1"}));
  EXPECT_TRUE(fails([&] { sort_chunks_by_index(x, sizes, order + 1); }, {op, "order", "2"}));
  EXPECT_TRUE(fails([&] { sort_chunks_by_index(x, sizes, order * 0); }, {op, "order", "0 twice"}));
  EXPECT_TRUE(
      fails([&] { sort_chunks_by_index(x, sizes, order, x); }, {op, "probs", "[N]", "[5, 2]"}));
}

}  // namespace
}  // namespace equipoise
