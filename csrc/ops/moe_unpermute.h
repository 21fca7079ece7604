// SPDX-License-Identifier: Apache-2.0
// moe_unpermute: gathers each token's rows back and adds them up.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../export.h"

namespace equipoise {

/// out[t] = sum over k, in slot order, of topk_weights[t, k] permuted[row_id_map[t, k]],
/// accumulated in float32 (float64 for float64) and rounded once; without weights they are 1. Slots
/// with -1 add nothing.
///
/// @param permuted      [N, H]; float64, float32, bfloat16 or float16.
/// @param row_id_map    [T, K] int64 in [-1, N), as moe_permute gives it.
/// @param topk_weights  [T, K] float32 (float64 for float64 rows) or the dtype of permuted.
/// @return              [T, H], dtype of permuted.
/// Differentiable (twice) in permuted and topk_weights. Deterministic: the same bits for any number
/// of threads. Every row of `permuted` belongs to at most one slot (which moe_permute guarantees);
/// the backward relies on it.
EQUIPOISE_API at::Tensor moe_unpermute(
    const at::Tensor& permuted, const at::Tensor& row_id_map,
    const std::optional<at::Tensor>& topk_weights = std::nullopt);

}  // namespace equipoise
