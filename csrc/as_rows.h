// SPDX-License-Identifier: Apache-2.0
// The layout that kernels take matrices in.
#pragma once

#include <ATen/core/Tensor.h>

namespace equipoise {

/// A matrix whose rows may be at any distance, their elements side by side: a copy only if they are
/// not.
inline at::Tensor as_rows(const at::Tensor& matrix) {
  return matrix.size(1) == 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

}  // namespace equipoise
