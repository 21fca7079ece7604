// SPDX-License-Identifier: Apache-2.0
// What the CPU and the CUDA side of balance_loss are given.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "balance_loss_terms.h"

namespace equipoise {

/// Checked and contiguous, all on one device.
struct BalanceLossArguments {
  at::Tensor sums;                           // [S, 2 E + 5], float32 or float64
  at::Tensor coefficients;                   // [L] float32
  std::optional<at::Tensor> gate_sums;       // [E], type of sums
  std::optional<at::Tensor> expert_weights;  // [E], type of sums
  std::vector<int64_t> kinds;                // [L], see BalanceLossKind
  int64_t top_k;                             // 1 where f is to add up to K
  int64_t num_devices;
  bool unbiased;

  int64_t num_experts() const { return (sums.size(1) - RoutingSums::kTail) / 2; }

  /// The sums of the first segment; those of the others follow.
  template <typename scalar_t>
  SegmentSums<scalar_t> first_segment() const {
    const auto pointer = [](const std::optional<at::Tensor>& tensor) {
      return tensor ? tensor->const_data_ptr<scalar_t>() : nullptr;
    };
    return {sums.const_data_ptr<scalar_t>(),
            pointer(gate_sums),
            pointer(expert_weights),
            num_experts(),
            num_devices,
            static_cast<double>(top_k),
            unbiased};
  }
};

}  // namespace equipoise
