// SPDX-License-Identifier: Apache-2.0
// AdvancedLoadBalancingLoss: four balance terms of gating weights in one module.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>

#include "../export.h"

namespace equipoise::nn {

/// Options for `AdvancedLoadBalancingLoss`.
///
/// Example:
/// ```
/// AdvancedLoadBalancingLoss loss(AdvancedLoadBalancingLossOptions(8).mi("information"));
/// ```
struct AdvancedLoadBalancingLossOptions {
  /* implicit */ AdvancedLoadBalancingLossOptions(int64_t num_components)
      : num_components_(num_components) {}

  /// N >= 1.
  TORCH_ARG(int64_t, num_components);
  /// Coefficient of uniform, >= 0. Default: 0.01
  TORCH_ARG(double, lambda_uniform) = .01;
  /// Coefficient of entropy, >= 0. Default: 0.01
  TORCH_ARG(double, lambda_entropy) = .01;
  /// Coefficient of mutual_info, >= 0. Default: 0.005
  TORCH_ARG(double, lambda_mi) = .005;
  /// Coefficient of variance, >= 0. Default: 0.01
  TORCH_ARG(double, lambda_variance) = .01;
  /// "similarity" or "information", see the class. Default: "similarity"
  TORCH_ARG(std::string, mi) = "similarity";
};

/// The terms of an `AdvancedLoadBalancingLoss`: scalars, each times its coefficient, and their sum.
struct EQUIPOISE_API AdvancedLoadBalancingTerms {
  at::Tensor uniform, entropy, variance, mutual_info, total;
};

/// With P the mean of the gating weights g over the B rows and u_n = 1 / N:
///
///   uniform      lambda_uniform KL(u || P)            (0 at balance)
///   entropy      lambda_entropy (log N - H(P))        (0 at balance)
///   variance     lambda_variance Var(P), unbiased     (0 at balance)
///   mutual_info  lambda_mi mean_ij cos(x_i, x_j) cos(g_i, g_j)   for "similarity" (0 without x)
///                lambda_mi (mean_i H(g_i) - H(P))                for "information"
///
/// with log(p + 1e-8) for every logarithm. No rows, or one component: all are 0. The mean of the
/// products of cosines is
/// ||U^T V||_F^2 / B^2, U and V the rows of x and g divided by their lengths: nothing of size B x B
/// is built.
///
/// Example:
/// ```
/// AdvancedLoadBalancingLoss loss(8);
/// auto terms = loss(gating_weights, input_features);
/// (task_loss + terms.total).backward();
/// ```
class EQUIPOISE_API AdvancedLoadBalancingLossImpl
    : public torch::nn::Cloneable<AdvancedLoadBalancingLossImpl> {
 public:
  explicit AdvancedLoadBalancingLossImpl(AdvancedLoadBalancingLossOptions options);

  void reset() override;

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// @param gating_weights  [B, N] floating, rows that sum to 1, or [B, ...] with N numbers a row.
  /// @param input_features  [B, D] floating, or [B, ...]; used by "similarity" only.
  /// @return                float32, or float64 for float64 gating_weights. Differentiable.
  AdvancedLoadBalancingTerms forward(
      const at::Tensor& gating_weights,
      const std::optional<at::Tensor>& input_features = std::nullopt);

  /// The options that the module was made with.
  AdvancedLoadBalancingLossOptions options;
};

/// Holds an `AdvancedLoadBalancingLossImpl`; copies of the holder share the module.
TORCH_MODULE(AdvancedLoadBalancingLoss);

}  // namespace equipoise::nn
