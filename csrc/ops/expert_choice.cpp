// SPDX-License-Identifier: Apache-2.0
// expert_choice: a composite of ATen calls, which every device, Meta and tracing have. The tokens
// of an expert come from a stable sort, since torch.topk leaves the order of ties open.
#include "expert_choice.h"

#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <tuple>

#include "../library.h"
#include "../present_logits.h"

namespace equipoise {
namespace {

using at::Tensor;

constexpr const char* kOp = "expert_choice";

std::tuple<Tensor, Tensor> expert_choice_composite(const Tensor& logits, c10::SymInt capacity,
                                                   const std::optional<Tensor>& token_mask) {
  TORCH_CHECK(capacity >= 0, kOp, ": capacity must be at least 0, got ", capacity);
  const auto [x, absent] = present_logits(kOp, logits, token_mask);
  const auto probs = x.softmax(-1).t();  // [E, T]
  const auto key = probs.detach().masked_fill(absent.t(), -1);
  const auto [sorted, order] = at::sort(key, /*stable=*/true, /*dim=*/1, /*descending=*/true);
  const auto best = order.slice_symint(1, 0, capacity);  // no more than T
  const auto empty = sorted.slice_symint(1, 0, capacity).lt(0);
  return {best.masked_fill(empty, -1), probs.gather(1, best).masked_fill(empty, 0)};
}

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def(
      "expert_choice(Tensor logits, SymInt capacity, Tensor? token_mask=None) -> "
      "(Tensor token_indices, Tensor token_weights)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(equipoise, CompositeImplicitAutograd, m) {
  m.impl(kOp, expert_choice_composite);
}

}  // namespace

ExpertChoiceResult expert_choice(const Tensor& logits, int64_t capacity,
                                 const std::optional<Tensor>& token_mask) {
  auto [indices, weights] = expert_choice_composite(logits, capacity, token_mask);
  return {indices, weights};
}

}  // namespace equipoise
