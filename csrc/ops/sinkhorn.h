// SPDX-License-Identifier: Apache-2.0
// sinkhorn: the balanced assignment of tokens to experts, for the selection of a SinkhornRouter.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../export.h"

namespace equipoise {

/// exp(x - rowmax(x)), scaled by turns to row sums 1/T and to column sums 1/E: every token gives
/// the same, and every expert takes the same. With more iterations both hold more closely; the
/// columns are scaled last, so they hold exactly.
///
///   plan <- exp(x - rowmax(x));   num_iters times:   plan <- plan / (T rowsum(plan)),
///                                                    plan <- plan / (E columnsum(plan))
///
/// NaN and -inf logits are absent experts, with 0 in the plan; +inf counts as 1e18.
///
/// @param logits      [..., E]; float64, float32, bfloat16 or float16.
/// @param num_iters   >= 1.
/// @param token_mask  [...], bool (true = real token) or floating weights, of which only > 0
/// counts.
///                    The row of a masked token is 0, and T is the number of the others.
/// @return            [..., E] float32, or float64 for float64 logits.
///
/// Not differentiable: the plan chooses, it does not weigh. Nothing waits for the device. Sources:
/// Sinkhorn 1964; for routing BASE layers (arXiv:2103.16716) and Megatron-LM.
EQUIPOISE_API at::Tensor sinkhorn(const at::Tensor& logits, int64_t num_iters = 8,
                                  const std::optional<at::Tensor>& token_mask = std::nullopt);

}  // namespace equipoise
