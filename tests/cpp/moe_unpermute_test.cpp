// SPDX-License-Identifier: Apache-2.0
// moe_unpermute against a gather and a weighted sum over the slots.
#include "ops/moe_unpermute.h"

#include <limits>

#include "ops/moe_permute.h"
#include "test_util.h"

namespace equipoise {
namespace {

using test::close;
using test::fails;
using test::gradients;
using test::random_leaf;
using test::same;

at::Tensor reference(const at::Tensor& permuted, const at::Tensor& row_id_map,
                     const at::Tensor& weights) {
  const auto rows = permuted.index_select(0, row_id_map.flatten().clamp_min(0));
  const auto factors = weights * (row_id_map >= 0);
  return (rows.reshape({row_id_map.size(0), row_id_map.size(1), -1}) * factors.unsqueeze(-1))
      .sum(1);
}

TEST(MoEUnpermute, MatchesGather) {
  at::manual_seed(0);
  for (const auto& [num_tokens, top_k, width] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 1, 1}, {33, 2, 5}, {100, 8, 48}}) {
    const auto topk_indices = at::randint(-1, 6, {num_tokens, top_k}, at::kLong);
    const auto row_id_map = moe_permute(at::zeros({num_tokens, 1}), topk_indices, 6).row_id_map;
    const auto permuted = random_leaf({num_tokens * top_k, width});
    const auto weights = random_leaf({num_tokens, top_k});
    const auto got = moe_unpermute(permuted, row_id_map, weights);
    const auto want = reference(permuted, row_id_map, weights);
    EXPECT_TRUE(close(got, want));
    EXPECT_TRUE(close(moe_unpermute(permuted, row_id_map),
                      reference(permuted, row_id_map, at::ones_like(weights))));
    const auto got_gradients = gradients(got, {permuted, weights});
    const auto want_gradients = gradients(want, {permuted, weights});
    EXPECT_TRUE(close(got_gradients[0], want_gradients[0]));
    EXPECT_TRUE(close(got_gradients[1], want_gradients[1]));
    const auto got32 = moe_unpermute(permuted.to(at::kFloat), row_id_map, weights.to(at::kFloat));
    EXPECT_TRUE(close(got32, want.to(at::kFloat), 1e-5));
  }
}

TEST(MoEUnpermute, UndoesMoEPermute) {
  at::manual_seed(0);
  const auto x = at::randn({20, 8});
  const auto result = moe_permute(x, at::randint(0, 4, {20, 1}, at::kLong), 4);
  EXPECT_TRUE(same(moe_unpermute(result.permuted, result.row_id_map), x));
}

TEST(MoEUnpermute, HalfRowsAreAddedUpInFloat) {
  at::manual_seed(0);
  const auto permuted = at::randn({12, 8}, at::kBFloat16);
  const auto row_id_map = at::arange(12, at::kLong).reshape({3, 4});
  const auto weights = at::rand({3, 4});
  EXPECT_TRUE(same(moe_unpermute(permuted, row_id_map, weights),
                   moe_unpermute(permuted.to(at::kFloat), row_id_map, weights).to(at::kBFloat16)));
}

TEST(MoEUnpermute, ReadsNoRowOfNobody) {
  auto permuted = at::ones({4, 2}, at::kDouble);
  permuted.slice(0, 2).fill_(std::numeric_limits<double>::quiet_NaN());
  permuted.requires_grad_();
  const auto weights = at::full({2, 2}, 0.5, at::kDouble).requires_grad_();
  const auto out = moe_unpermute(permuted, torch::tensor({{1, 0}, {-1, -1}}, at::kLong), weights);
  EXPECT_TRUE(same(out, torch::tensor({{1.0, 1.0}, {0.0, 0.0}}, at::kDouble)));
  const test::NanFilledMemory nan_filled_memory;
  const auto grads = torch::autograd::grad({out.sum()}, {permuted, weights});
  EXPECT_TRUE(same(grads[0].select(1, 0), torch::tensor({0.5, 0.5, 0.0, 0.0}, at::kDouble)));
  EXPECT_TRUE(same(grads[1], torch::tensor({{2.0, 2.0}, {0.0, 0.0}}, at::kDouble)));
}

TEST(MoEUnpermute, TakesASlotPerExpertAndRowsOfNobody) {
  at::manual_seed(0);
  const auto permuted = random_leaf({7, 5});
  const auto row_id_map = at::full({3, 40}, -1, at::kLong);
  row_id_map.view({120}).slice(0, 10, 120, 30).copy_(torch::tensor({6, 2, 0, 5}, at::kLong));
  const auto weights = at::rand({3, 40}, at::kDouble);  // without a gradient
  const auto got = moe_unpermute(permuted, row_id_map, weights);
  const auto want = reference(permuted, row_id_map, weights);
  EXPECT_TRUE(close(got, want));
  const test::NanFilledMemory nan_filled_memory;
  EXPECT_TRUE(close(gradients(got, {permuted})[0], gradients(want, {permuted})[0]));
}

TEST(MoEUnpermute, NamesTheWrongArgument) {
  const auto permuted = at::randn({6, 4});
  const auto row_id_map = at::zeros({3, 2}, at::kLong);
  EXPECT_TRUE(
      fails([&] { moe_unpermute(permuted[0], row_id_map); }, {"moe_unpermute", "permuted"}));
  EXPECT_TRUE(fails([&] { moe_unpermute(permuted, row_id_map.to(at::kFloat)); },
                    {"moe_unpermute", "row_id_map"}));
  EXPECT_TRUE(fails([&] { moe_unpermute(permuted, row_id_map + 6); },
                    {"moe_unpermute", "row_id_map", "6"}));
  EXPECT_TRUE(fails([&] { moe_unpermute(permuted, row_id_map, at::ones({3})); },
                    {"moe_unpermute", "topk_weights", "[3]"}));
}

}  // namespace
}  // namespace equipoise
