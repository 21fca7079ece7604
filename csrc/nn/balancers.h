// SPDX-License-Identifier: Apache-2.0
// LossFreeBalancer and EMABalancer: balancing without a loss, by a bias per expert that steers the
// selection and nothing else.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <string>

#include "../export.h"

namespace c10d {
class ProcessGroup;
}

namespace equipoise::nn {

/// What the balancers share: they count the tokens of each expert between two optimizer steps, and
/// turn the counts into a new `expert_bias`.
///
/// The steps of the bias are so small (1e-3) that bfloat16 would lose them: `to` moves the bias and
/// leaves it float32.
template <typename Derived>
class EQUIPOISE_API BalancerImplBase : public torch::nn::Cloneable<Derived> {
 public:
  /// Adds the counts of one forward pass; several may come before an update.
  ///
  /// Nothing is recorded in eval mode, without gradients, or when activation checkpointing runs a
  /// forward pass for the second time: only tokens that are learnt from count, and each once.
  ///
  /// @param counts  `tokens_per_expert`, [E] int64, or [S, E] of segments, as in `RoutingResult`.
  void record(const at::Tensor& counts);

  /// One step of the bias, in place, to be taken once per optimizer step; the counts start again
  /// from zero. Nothing changes where nothing was recorded since the last update; an error where
  /// nothing ever was, on any rank.
  ///
  /// @param group  the counts are summed over it first, so that every rank makes the same step.
  ///               (The class is in <torch/csrc/distributed/c10d/ProcessGroup.hpp>.)
  void update(c10d::ProcessGroup* group = nullptr);

  /// Sets everything back to the start.
  void reset_parameters();

  void reset() override;

  using torch::nn::Module::to;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;

  /// [E] float32 buffer, 0 at the start: give it to the router's forward.
  at::Tensor expert_bias;

  /// [E] int64, counted since the last update; no buffer, it is not saved.
  at::Tensor tokens_per_expert;

 private:
  bool recorded_ = false;
};

/// Options for `LossFreeBalancer`.
///
/// Example:
/// ```
/// LossFreeBalancer balancer(LossFreeBalancerOptions(64).bias_update_rate(1e-2).center(true));
/// ```
struct LossFreeBalancerOptions {
  /* implicit */ LossFreeBalancerOptions(int64_t num_experts) : num_experts_(num_experts) {}

  /// E >= 1.
  TORCH_ARG(int64_t, num_experts);
  /// u >= 0, what one update adds or takes. Too large and the load swings. Default: 0.001
  TORCH_ARG(double, bias_update_rate) = 1e-3;
  /// "sign" or "proportional". Default: "sign"
  TORCH_ARG(std::string, mode) = "sign";
  /// Take the mean off the bias after each update: selection stays, the bias cannot drift. Default:
  /// false
  TORCH_ARG(bool, center) = false;
};

/// b_e <- b_e + u sign(mean(C) - C_e)    (Wang 2024, arXiv:2408.15664)
///
/// with C_e the tokens that expert e got since the last update; "proportional" takes
/// (mean(C) - C_e) / mean(C) in place of the sign. (The mode "quantile" of the Python class needs
/// the scores of all tokens; it is not here.)
///
/// Example:
/// ```
/// LossFreeBalancer balancer(64);
/// RoutingResult routing = router(x, std::nullopt, balancer->expert_bias);
/// balancer->record(routing.tokens_per_expert);
/// ...
/// optimizer.step();
/// balancer->update();
/// ```
class EQUIPOISE_API LossFreeBalancerImpl : public BalancerImplBase<LossFreeBalancerImpl> {
 public:
  static constexpr const char* kName = "LossFreeBalancer";

  explicit LossFreeBalancerImpl(LossFreeBalancerOptions options);

  void reset() override;

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// The options that the module was made with.
  LossFreeBalancerOptions options;

 private:
  friend class BalancerImplBase<LossFreeBalancerImpl>;
  at::Tensor next_bias(const at::Tensor& counts, const at::Tensor& total) const;
};

/// Holds a `LossFreeBalancerImpl`; copies of the holder share the module.
TORCH_MODULE(LossFreeBalancer);

/// Options for `EMABalancer`.
///
/// Example:
/// ```
/// EMABalancer balancer(EMABalancerOptions(64).beta(0.99));
/// ```
struct EMABalancerOptions {
  /* implicit */ EMABalancerOptions(int64_t num_experts) : num_experts_(num_experts) {}

  /// E >= 1.
  TORCH_ARG(int64_t, num_experts);
  /// >= 0: the bias of an expert that gets nothing. Default: 0.05
  TORCH_ARG(double, balancing_strength) = .05;
  /// In [0, 1): how much of the average an update keeps. Default: 0.9
  TORCH_ARG(double, beta) = .9;
};

/// m <- beta m + (1 - beta) f,    b_e = -balancing_strength (E m_e - 1)
///
/// with f_e the share of the selections since the last update that went to expert e, from
/// m_e = 1 / E. Used as `LossFreeBalancer` is. The bias comes to rest at a load that is still a
/// little uneven, where `LossFreeBalancer` goes on until the loads are even.
class EQUIPOISE_API EMABalancerImpl : public BalancerImplBase<EMABalancerImpl> {
 public:
  static constexpr const char* kName = "EMABalancer";

  explicit EMABalancerImpl(EMABalancerOptions options);

  void reset() override;

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// The options that the module was made with.
  EMABalancerOptions options;

 private:
  friend class BalancerImplBase<EMABalancerImpl>;
  at::Tensor next_bias(const at::Tensor& counts, const at::Tensor& total) const;
};

/// Holds an `EMABalancerImpl`; copies of the holder share the module.
TORCH_MODULE(EMABalancer);

}  // namespace equipoise::nn
