// SPDX-License-Identifier: Apache-2.0
// Allocates the results of an op.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace equipoise {

/// Not filled, on the device of `like`; on the CPU without the dispatcher, which a call with one
/// token would notice.
inline at::Tensor new_empty(c10::SymIntArrayRef sizes, at::ScalarType type,
                            const at::Tensor& like) {
  if (like.is_cpu()) {
    if (const auto known = c10::asIntArrayRefSlowOpt(sizes))
      return at::detail::empty_cpu(*known, type);
  }
  return at::empty_symint(sizes, like.options().dtype(type));
}

}  // namespace equipoise
