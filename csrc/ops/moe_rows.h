// SPDX-License-Identifier: Apache-2.0
// Moving rows between tokens and the permuted buffer on the CPU: what moe_permute, moe_unpermute
// and both their gradients are made of. Internal; the CUDA twins are declared in cuda/host.h.
// Outputs are allocated and unfilled.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace equipoise {

/// rows[row_id_map[t, k]] = weights[t, k] tokens[t]; without weights a plain copy. Rows without a
/// slot are zeroed.
void moe_scatter_rows_cpu(const at::Tensor& tokens, const at::Tensor& row_id_map,
                          const std::optional<at::Tensor>& weights, const at::Tensor& rows);
/// out[t] = sum over k, in slot order, of weights[t, k] rows[row_id_map[t, k]]; without weights
/// they are 1.
void moe_gather_rows_cpu(const at::Tensor& rows, const at::Tensor& row_id_map,
                         const std::optional<at::Tensor>& weights, const at::Tensor& out);
/// out[t, k] = <tokens[t], rows[row_id_map[t, k]]>, 0 for -1.
void moe_dot_rows_cpu(const at::Tensor& tokens, const at::Tensor& rows,
                      const at::Tensor& row_id_map, const at::Tensor& out);

}  // namespace equipoise
