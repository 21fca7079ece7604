// SPDX-License-Identifier: Apache-2.0
// Small helpers shared by the autograd part of every op.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <utility>

namespace equipoise {

inline bool requires_grad(const at::Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad();
}
inline bool requires_grad(const std::optional<at::Tensor>& tensor) {
  return tensor && requires_grad(*tensor);
}

/// Whether autograd must be able to differentiate a result of these tensors. Inside a backward this
/// is true only under create_graph: then the registered X_backward ops take their ATen form, which
/// has derivatives of any order, instead of their kernel.
template <typename... Tensors>
bool differentiating(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (... || requires_grad(tensors));
}

/// An undefined tensor, such as an absent gradient, as an absent optional.
inline std::optional<at::Tensor> if_defined(at::Tensor tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(std::move(tensor)) : std::nullopt;
}

}  // namespace equipoise
