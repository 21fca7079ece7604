// SPDX-License-Identifier: Apache-2.0
// SwitchBalanceLoss: the Switch Transformer's load-balancing loss as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include "../export.h"
#include "../ops/balance_loss.h"

namespace equipoise::nn {

/// Options for `SwitchBalanceLoss`.
///
/// Example:
/// ```
/// SwitchBalanceLoss balance(SwitchBalanceLossOptions().coeff(1e-3));
/// ```
struct SwitchBalanceLossOptions {
  /* implicit */ SwitchBalanceLossOptions(double coeff = 1e-2) : coeff_(coeff) {}

  /// Multiplies the loss, >= 0. Default: 0.01
  TORCH_ARG(double, coeff);
};

/// coeff E sum_e f_e P_e, with f_e the share of the selections that went to expert e (a constant
/// for the gradient) and P_e its mean probability; coeff at balance (Fedus 2021, arXiv:2101.03961).
/// With top_k = num_experts every expert gets every token: the loss is then 0, with one warning.
///
/// Example:
/// ```
/// SwitchBalanceLoss balance;
/// auto [y, routing] = layer(x);
/// (task_loss(y) + balance(routing)).backward();
/// ```
class EQUIPOISE_API SwitchBalanceLossImpl : public torch::nn::Cloneable<SwitchBalanceLossImpl> {
 public:
  explicit SwitchBalanceLossImpl(SwitchBalanceLossOptions options = {});

  void reset() override;

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// @param routing  of `TopKRouter`, `MoELayer` or `topk_gating` with stats; one layer's.
  /// @return         scalar, float32 (float64 for float64 logits), scaled by coeff.
  at::Tensor forward(const RoutingResult& routing);

  /// The options that the module was made with.
  SwitchBalanceLossOptions options;
};

/// Holds a `SwitchBalanceLossImpl`; copies of the holder share the module.
TORCH_MODULE(SwitchBalanceLoss);

}  // namespace equipoise::nn
