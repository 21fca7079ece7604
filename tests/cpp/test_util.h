// SPDX-License-Identifier: Apache-2.0
// What the C++ tests share: comparison of tensors, error messages, gradients. It alone includes
// torch/torch.h, so that it can serve as a precompiled header.
#pragma once

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>
#include <vector>

namespace equipoise::test {

/// Same sizes and dtype, and every element within `tolerance` (absolute and relative).
inline ::testing::AssertionResult close(const at::Tensor& got, const at::Tensor& want,
                                        double tolerance = 1e-12) {
  if (!got.defined() || !want.defined()) return ::testing::AssertionFailure() << "undefined tensor";
  if (got.sizes() != want.sizes() || got.scalar_type() != want.scalar_type()) {
    return ::testing::AssertionFailure() << "got " << got.scalar_type() << got.sizes()
                                         << ", wanted " << want.scalar_type() << want.sizes();
  }
  if (at::allclose(got, want, tolerance, tolerance)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "largest difference " << (got - want).abs().max().item<double>() << "\ngot\n"
         << got << "\nwanted\n"
         << want;
}

inline ::testing::AssertionResult same(const at::Tensor& got, const at::Tensor& want) {
  return close(got, want, 0);
}

/// The message of the c10::Error that `call` raises, or "" where it raises none.
template <typename Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

/// `call` fails, and the message has all of `words` (the op, the argument, what came).
template <typename Call>
::testing::AssertionResult fails(Call&& call, const std::vector<std::string>& words) {
  const auto message = error_of(call);
  if (message.empty()) return ::testing::AssertionFailure() << "no error";
  for (const auto& word : words) {
    if (message.find(word) == std::string::npos) {
      return ::testing::AssertionFailure() << "\"" << word << "\" is not in: " << message;
    }
  }
  return ::testing::AssertionSuccess();
}

/// d(sum weights * output) / d inputs, for weights that are the same in every call.
inline std::vector<at::Tensor> gradients(const at::Tensor& output,
                                         const std::vector<at::Tensor>& inputs) {
  const auto weights =
      at::cos(at::arange(output.numel(), output.options())).reshape(output.sizes());
  return torch::autograd::grad({output}, inputs, {weights}, /*retain_graph=*/true);
}

/// Fills uninitialised memory with NaN while it lives, so that reading any of it shows.
class NanFilledMemory {
 public:
  NanFilledMemory() { at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false); }
  ~NanFilledMemory() { at::globalContext().setDeterministicAlgorithms(false, /*warn_only=*/false); }
  NanFilledMemory(const NanFilledMemory&) = delete;
  NanFilledMemory& operator=(const NanFilledMemory&) = delete;
};

/// CPU autocast to bfloat16 while it lives.
class CpuAutocast {
 public:
  CpuAutocast() { at::autocast::set_autocast_enabled(at::kCPU, true); }
  ~CpuAutocast() {
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
  }
  CpuAutocast(const CpuAutocast&) = delete;
  CpuAutocast& operator=(const CpuAutocast&) = delete;
};

/// A leaf of independent normal values that requires a gradient.
inline at::Tensor random_leaf(at::IntArrayRef sizes, at::ScalarType type = at::kDouble) {
  return at::randn(sizes, type).requires_grad_();
}

}  // namespace equipoise::test
