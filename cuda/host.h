// SPDX-License-Identifier: Apache-2.0
// The host functions of the CUDA side, one per op and direction: what csrc/ops/*.cpp registers and
// cuda/*.cu implements. Arguments were checked, are on one device, and outputs are allocated and
// unfilled unless said. None waits for the device. An output with zero elements is allowed
// everywhere.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../csrc/ops/balance_loss_arguments.h"
#include "../csrc/ops/slot_sort.h"
#include "../csrc/ops/topk_gating_arguments.h"

namespace equipoise {

void topk_gating_cuda(const TopKGatingArguments& arguments, const TopKGatingOutputs& outputs);
void topk_gating_backward_cuda(const TopKGatingBackwardArguments& arguments,
                               const at::Tensor& grad_logits);

/// indices [..., K] int64 with at least one element, weights [..., K] (any floating dtype),
/// token_mask [...] bool, segment_ids [...] int64 (the last three may be absent), all contiguous;
/// counts [E], or [S, E] with segment_ids, is int64 without weights, else float32 (float64 for
/// float64 weights). num_invalid [] int64: how many indices outside [-1, E) and segment ids outside
/// [0, S) unmasked tokens had.
void expert_bincount_cuda(const at::Tensor& indices, const std::optional<at::Tensor>& weights,
                          const std::optional<at::Tensor>& token_mask,
                          const std::optional<at::Tensor>& segment_ids, const at::Tensor& counts,
                          const at::Tensor& num_invalid);
/// grad_weights[t, k] = grad[indices[t, k]] (grad[segment_ids[t], indices[t, k]]), 0 for a skipped
/// slot; grad has the type and shape of the counts.
void expert_bincount_backward_cuda(const at::Tensor& grad, const at::Tensor& indices,
                                   const std::optional<at::Tensor>& token_mask,
                                   const std::optional<at::Tensor>& segment_ids,
                                   const at::Tensor& grad_weights);

/// See SlotSort; what the CPU raises on is left out and counted here.
void slot_sort_cuda(const SlotSort& sort);
/// rows[row_id_map[t, k]] = weights[t, k] * x[t] (weights absent: a plain copy of any dtype); every
/// row without a slot is zeroed, none has two. x [T, H] has inner stride 1; rows [N, H] contiguous,
/// same dtype. Map entries outside [0, N) are skipped.
void moe_scatter_rows_cuda(const at::Tensor& x, const at::Tensor& row_id_map,
                           const std::optional<at::Tensor>& weights, const at::Tensor& rows);
/// out[t] = sum_k weights[t, k] * rows[row_id_map[t, k]] in slot order, in compute type; weights
/// absent: 1.
void moe_gather_rows_cuda(const at::Tensor& rows, const at::Tensor& row_id_map,
                          const std::optional<at::Tensor>& weights, const at::Tensor& out);
/// Both gradients of a gather with weights in one pass: grad_rows is `grad` scattered with the
/// weights, grad_weights[t, k] = <grad[t], rows[row_id_map[t, k]]> in compute type, 0 for -1, in
/// the dtype of the weights.
void moe_gather_rows_backward_cuda(const at::Tensor& grad, const at::Tensor& rows,
                                   const at::Tensor& row_id_map, const at::Tensor& weights,
                                   const at::Tensor& grad_rows, const at::Tensor& grad_weights);

/// After slot_sort_cuda -> sorted_token_ids [M] int32, expert_ids [M / align] int32,
/// num_tokens_post_padded [1] int32; M > 0.
void align_blocks_cuda(const SlotSort& slots, const at::Tensor& sorted_token_ids,
                       const at::Tensor& expert_ids, const at::Tensor& num_tokens_post_padded);

/// split_sizes [C] and order [C] int64 contiguous -> row_id_map [N, 1]: where each row goes, -1 for
/// a row that bad values leave without a place.
void sort_chunks_map_cuda(const at::Tensor& split_sizes, const at::Tensor& order,
                          const at::Tensor& row_id_map);

/// topk_indices [T, K] int64 contiguous and not empty -> num_tokens_per_rank [R] int32,
/// num_tokens_per_expert [E] int32, is_token_in_rank [T, R] bool.
void dispatch_layout_cuda(const at::Tensor& topk_indices, const at::Tensor& num_tokens_per_rank,
                          const at::Tensor& num_tokens_per_expert,
                          const at::Tensor& is_token_in_rank);

/// tokens_per_expert [..., E] int64 contiguous and not empty -> metrics [13, ...] float64.
void load_metrics_cuda(const at::Tensor& tokens_per_expert, bool unbiased,
                       const at::Tensor& metrics);

/// values [L] and total []; at most 32 losses.
void balance_loss_cuda(const BalanceLossArguments& arguments, const at::Tensor& total,
                       const at::Tensor& values);
/// grad_sums and grad_gate_sums = (grad_total coefficients_l + grad_values_l) dvalue_l, added over
/// l; either gradient may be absent. grad_gate_sums has no elements without gate_sums.
void balance_loss_backward_cuda(const std::optional<at::Tensor>& grad_total,
                                const std::optional<at::Tensor>& grad_values,
                                const BalanceLossArguments& arguments, const at::Tensor& grad_sums,
                                const at::Tensor& grad_gate_sums);

}  // namespace equipoise
