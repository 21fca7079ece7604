// SPDX-License-Identifier: Apache-2.0
// The layout of the packed statistics of topk_gating; plain C++, shared by the API, the CPU and the
// CUDA kernels.
#pragma once

#include <cstdint>

namespace equipoise {

/// Where each statistic lives in the last dimension of `RoutingResult::sums`, for E experts. All
/// are sums over the tokens, weighted with the token weight w (1 or 0 for a mask).
struct RoutingSums {
  static constexpr int64_t kTail = 5;  ///< scalars after the two [E] parts
  static constexpr int64_t prob = 0;   ///< [E] sum w p
  static constexpr int64_t width(int64_t num_experts) { return 2 * num_experts + kTail; }
  static constexpr int64_t load(int64_t num_experts) {
    return num_experts;
  }  ///< [E] sum w [e chosen]
  static constexpr int64_t weight(int64_t num_experts) { return 2 * num_experts; }  ///< sum w
  static constexpr int64_t lse_squared(int64_t num_experts) {
    return 2 * num_experts + 1;
  }  ///< sum w lse^2
  static constexpr int64_t entropy(int64_t num_experts) {
    return 2 * num_experts + 2;
  }  ///< sum w H
  static constexpr int64_t nan_rows(int64_t num_experts) {
    return 2 * num_experts + 3;
  }  ///< rows with a NaN
  static constexpr int64_t invalid(int64_t num_experts) {
    return 2 * num_experts + 4;
  }  ///< bad values met on CUDA
};

}  // namespace equipoise
