// SPDX-License-Identifier: Apache-2.0
// sort_chunks_by_index: puts chunks of neighbouring rows into another order.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../export.h"

namespace equipoise {

/// What `sort_chunks_by_index` returns.
struct EQUIPOISE_API SortedChunks {
  at::Tensor sorted;        ///< [N, H], dtype of x; differentiable
  at::Tensor sorted_probs;  ///< [N], dtype of probs; empty where none were given; differentiable
  at::Tensor row_id_map;    ///< [N, 1] int64: the row of `sorted` that holds row n of x
};

/// With x cut into C chunks of split_sizes[0], split_sizes[1], ... rows, the chunks order[0],
/// order[1], ... one behind the other: what turns the rows that an all-to-all brings, rank by rank,
/// into rows expert by expert (moe_sort_chunks_by_index of TransformerEngine). The sizes of the
/// results depend on N alone, so nothing waits for the device. Back again:
/// moe_unpermute(sorted, row_id_map).
///
/// @param x            [N, H]; float64, float32, bfloat16, float16 or any type of 8 bits.
/// @param split_sizes  [C] int64 or int32, >= 0, with the sum N.
/// @param order        [C] int64 or int32, each of 0 .. C - 1 once.
/// @param probs        [N] float, moved along.
/// Bad values are an error on the CPU. On CUDA a negative size is 0, and the rows of a chunk that
/// `order` does not name exactly once, and those past the sum of the sizes, are dropped: -1 in the
/// map; the rows of `sorted` that are left over are zero.
/// Differentiable (twice) in x and probs. Deterministic.
EQUIPOISE_API SortedChunks
sort_chunks_by_index(const at::Tensor& x, const at::Tensor& split_sizes, const at::Tensor& order,
                     const std::optional<at::Tensor>& probs = std::nullopt);

}  // namespace equipoise
