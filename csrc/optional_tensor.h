// SPDX-License-Identifier: Apache-2.0
// What the CPU side of several ops does with tensors that may be absent.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace equipoise {

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional<at::Tensor>(tensor->contiguous()) : std::nullopt;
}

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace equipoise
