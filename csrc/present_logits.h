// SPDX-License-Identifier: Apache-2.0
// The logits as the ops see them that are made of ATen calls: checked, widened, with absent experts
// and masked tokens told apart as topk_gating does. Internal.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>

#include "checks.h"

namespace equipoise {

struct PresentLogits {
  at::Tensor logits;  ///< [T, E] compute type: -inf for an absent expert, 0 for a masked token
  at::Tensor absent;  ///< [T, E] bool: no such choice, whether for the expert or for the token
};

/// logits [..., E] of any floating type, token_mask [...]. NaN and -inf are absent experts, a token
/// without any other counts as masked, +inf counts as 1e18. Of a masked token every logit is
/// finite, so that no gradient of it is NaN.
inline PresentLogits present_logits(const char* op, const at::Tensor& logits,
                                    const std::optional<at::Tensor>& token_mask) {
  check_floating(op, "logits", logits);
  TORCH_CHECK(logits.dim() >= 1, op, ": logits must have shape [..., E], got a scalar");
  TORCH_CHECK(logits.sym_size(-1) >= 1, op,
              ": logits must have at least one expert in its last dimension, got ",
              logits.sym_sizes());
  if (token_mask) check_token_mask(op, logits, *token_mask);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto x =
      logits.reshape_symint({-1, logits.sym_size(-1)}).to(accumulate_type(logits.scalar_type()));
  const auto absent = x.gt(-kInfinity).logical_not();
  auto masked = absent.all(-1, /*keepdim=*/true);
  if (token_mask) masked = masked.logical_or(token_mask->reshape({-1, 1}).le(0));
  return {x.clamp_max(1e18).masked_fill(absent, -kInfinity).masked_fill(masked, 0),
          absent.logical_or(masked)};
}

}  // namespace equipoise
