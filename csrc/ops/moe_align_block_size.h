// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size: slots by expert, in blocks of one expert each.
#pragma once

#include <ATen/core/Tensor.h>

#include "../export.h"

namespace equipoise {

/// What `moe_align_block_size` returns: what vLLM's function of that name gives its fused expert
/// kernels, and in its dtypes. M is the most that any routing of T K slots needs, in whole blocks:
/// T K + E (block_size - 1) rounded up, at most T K block_size.
struct EQUIPOISE_API AlignedBlocks {
  at::Tensor sorted_token_ids;  ///< [M] int32: flat numbers t K + k of slots, or T K: padding
  at::Tensor expert_ids;        ///< [M / block_size] int32: the expert of each block, -1: none
  at::Tensor num_tokens_post_padded;  ///< [1] int32: what comes behind is of no expert
};

/// The slots of each expert together, in token order (which vLLM does not promise), padded to a
/// multiple of block_size. M depends on shapes alone, so nothing waits for the device.
///
/// @param topk_indices  [T, K] int64; -1 is left out. Anything else outside [0, E) is an error on
///                      the CPU and is left out on CUDA.
/// @param block_size    >= 1.
/// @param num_experts   E >= 1.
/// Not differentiable. Deterministic.
EQUIPOISE_API AlignedBlocks moe_align_block_size(const at::Tensor& topk_indices, int64_t block_size,
                                                 int64_t num_experts);

}  // namespace equipoise
