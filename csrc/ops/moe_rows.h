// SPDX-License-Identifier: Apache-2.0
// Moving rows between tokens and the permuted buffer on the CPU: what moe_permute, moe_unpermute
// and both their gradients are made of. Internal; the CUDA twins are declared in cuda/host.h.
// Outputs are allocated, contiguous and unfilled; elements of a row lie side by side.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace equipoise {

/// rows[row_id_map[t, k]] = weights[t, k] tokens[t]; without weights a plain copy of any dtype.
/// Rows without a slot are zeroed; no row has two.
void moe_scatter_rows_cpu(const at::Tensor& tokens, const at::Tensor& row_id_map,
                          const std::optional<at::Tensor>& weights, const at::Tensor& rows);
/// out[t] = sum over k, in slot order, of weights[t, k] rows[row_id_map[t, k]]; without weights
/// they are 1.
void moe_gather_rows_cpu(const at::Tensor& rows, const at::Tensor& row_id_map,
                         const std::optional<at::Tensor>& weights, const at::Tensor& out);
/// Both gradients of a gather with weights in one pass: grad_rows is `grad` scattered, and
/// grad_weights[t, k] = <grad[t], rows[row_id_map[t, k]]>, 0 for -1.
void moe_gather_rows_backward_cpu(const at::Tensor& grad, const at::Tensor& rows,
                                  const at::Tensor& row_id_map, const at::Tensor& weights,
                                  const at::Tensor& grad_rows, const at::Tensor& grad_weights);

}  // namespace equipoise
