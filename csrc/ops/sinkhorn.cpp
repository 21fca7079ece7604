// SPDX-License-Identifier: Apache-2.0
// sinkhorn: a composite of ATen calls, which every device, Meta and tracing have.
//
// The plan itself is scaled, not a factor per row and column beside it: with a quotient of two
// numbers that are both tiny nothing overflows. A scale common to all elements is undone by the
// next division, so T appears nowhere, and E only in the last.
#include "sinkhorn.h"

#include <torch/library.h>

#include "../library.h"
#include "../present_logits.h"

namespace equipoise {
namespace {

using at::Tensor;

constexpr const char* kOp = "sinkhorn";

/// Divides by the sums over `dim`; what adds up to zero stays zero.
Tensor normalised(const Tensor& plan, int64_t dim) {
  const auto sums = plan.sum(dim, /*keepdim=*/true);
  return plan.div(sums.masked_fill(sums.eq(0), 1));
}

}  // namespace

Tensor sinkhorn(const Tensor& logits, int64_t num_iters, const std::optional<Tensor>& token_mask) {
  TORCH_CHECK(num_iters >= 1, kOp, ": num_iters must be at least 1, got ", num_iters);
  const auto [x, absent] = present_logits(kOp, logits.detach(), token_mask);
  auto plan = x.sub(x.amax(-1, /*keepdim=*/true)).exp().masked_fill(absent, 0);
  for (int64_t i = 0; i < num_iters; ++i) plan = normalised(normalised(plan, 1), 0);
  const auto num_experts = logits.sym_size(-1).guard_int(__FILE__, __LINE__);
  return plan.div(num_experts).reshape_symint(logits.sym_sizes());
}

namespace {

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def("sinkhorn(Tensor logits, int num_iters=8, Tensor? token_mask=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(equipoise, CompositeImplicitAutograd, m) { m.impl(kOp, sinkhorn); }

}  // namespace
}  // namespace equipoise
