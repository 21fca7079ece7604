// SPDX-License-Identifier: Apache-2.0
// dispatch_layout: which ranks each token must be sent to, and how many tokens they get.
#pragma once

#include <ATen/core/Tensor.h>

#include "../export.h"

namespace equipoise {

/// What `dispatch_layout` returns: what DeepEP's Buffer.get_dispatch_layout gives its dispatch,
/// and in its dtypes.
struct EQUIPOISE_API DispatchLayout {
  at::Tensor num_tokens_per_rank;    ///< [R] int32: tokens with at least one expert of the rank
  at::Tensor num_tokens_per_expert;  ///< [E] int32: slots that chose the expert
  at::Tensor is_token_in_rank;       ///< [T, R] bool
};

/// The layout of a dispatch over R ranks, to which the experts are dealt in equal contiguous runs:
/// expert e belongs to rank e / (E / R). A token counts once for a rank, however many of its slots
/// go there. The sizes of the results depend on shapes alone, so nothing waits for the device.
///
/// @param topk_indices  [T, K] int64 with T K < 2^31; -1 is skipped. Anything else outside [0, E)
///                      is an error on the CPU and is skipped on CUDA.
/// @param num_ranks     R >= 1, a divisor of E.
/// @param num_experts   E >= 1.
/// Not differentiable. Deterministic: the counts are integers.
EQUIPOISE_API DispatchLayout dispatch_layout(const at::Tensor& topk_indices, int64_t num_ranks,
                                             int64_t num_experts);

}  // namespace equipoise
