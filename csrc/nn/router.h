// SPDX-License-Identifier: Apache-2.0
// TopKRouter, NoisyTopKRouter and DenseRouter: the linear gate of a Mixture-of-Experts layer,
// followed by topk_gating; and what all routers share.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>
#include <utility>

#include "../export.h"
#include "../ops/topk_gating.h"

namespace equipoise::nn {

/// TORCH_ARG for a base of options: the setter returns the router's own options, not the base.
#define EQUIPOISE_ROUTER_ARG(T, name)                      \
 public:                                                   \
  Derived& name(T new_##name) {                            \
    this->name##_ = std::move(new_##name);                 \
    return static_cast<Derived&>(*this);                   \
  }                                                        \
  const T& name() const noexcept { return this->name##_; } \
                                                           \
 private:                                                  \
  T name##_

/// Options of every router: those of the logits x weight^T.
template <typename Derived>
struct RouterOptionsBase {
  RouterOptionsBase(int64_t d_model, int64_t num_experts, int64_t top_k)
      : d_model_(d_model), num_experts_(num_experts), top_k_(top_k) {}

  /// Width of a token, >= 1.
  EQUIPOISE_ROUTER_ARG(int64_t, d_model);
  /// E >= 1.
  EQUIPOISE_ROUTER_ARG(int64_t, num_experts);
  /// K, from 1 to E.
  EQUIPOISE_ROUTER_ARG(int64_t, top_k);
  /// Add a learnt bias to the logits. Default: false
  EQUIPOISE_ROUTER_ARG(bool, bias) = false;
  /// In [0, 1): in training x is multiplied by values uniform within 1 - jitter_eps and
  /// 1 + jitter_eps (Fedus 2021). Default: 0
  EQUIPOISE_ROUTER_ARG(double, jitter_eps) = 0.0;
  /// Standard deviation of the weight at the start, >= 0: small, so that training starts balanced.
  /// Default: 0.02
  EQUIPOISE_ROUTER_ARG(double, init_std) = 0.02;
};

/// Options of the routers that end in `topk_gating`, see `TopKGatingOptions`.
template <typename Derived>
struct TopKRouterOptionsBase : RouterOptionsBase<Derived> {
  using RouterOptionsBase<Derived>::RouterOptionsBase;

  /// How logits become scores. Default: "softmax"
  EQUIPOISE_ROUTER_ARG(std::string, score_function) = "softmax";
  /// Divide the K weights by their sum. Default: false
  EQUIPOISE_ROUTER_ARG(bool, norm_topk_prob) = false;
  /// Multiplies the K weights. Default: 1
  EQUIPOISE_ROUTER_ARG(double, scaling_factor) = 1.0;
  /// Groups of E / num_groups neighbouring experts. Default: 1
  EQUIPOISE_ROUTER_ARG(int64_t, num_groups) = 1;
  /// How many groups of each token are kept; needed with num_groups > 1. Default: none
  EQUIPOISE_ROUTER_ARG(std::optional<int64_t>, group_topk) = std::nullopt;
  /// Score of a group: "max", or "top2_sum", the sum of its best two. Default: "top2_sum"
  EQUIPOISE_ROUTER_ARG(std::string, group_score) = "top2_sum";
  /// In [0, 1): the chance of an expert to be absent in one training step (its logits are -inf for
  /// all tokens). At least top_k experts stay; with groups, those that are kept may then have fewer
  /// than K, and the missing slots hold -1. Default: 0
  EQUIPOISE_ROUTER_ARG(double, expert_dropout) = 0.0;
};

#undef EQUIPOISE_ROUTER_ARG

/// What every router shares: its parameters and the way from tokens to logits.
///
/// The logits are computed in float32, or float64 for float64 x, whatever the type of the weight
/// and also under autocast: with logits rounded to a half type, near ties would send tokens to
/// other experts.
template <typename Derived>
class EQUIPOISE_API RouterImplBase : public torch::nn::Cloneable<Derived> {
 public:
  void reset() override;

  /// Draws the weight from a normal distribution with standard deviation init_std; bias 0.
  void reset_parameters();

  /// [E, d_model].
  at::Tensor weight;

  /// [E]; only with the option bias.
  at::Tensor bias;

 protected:
  /// x, checked, in the type of the logits and with jitter.
  at::Tensor tokens_of(const at::Tensor& x);

  /// tokens weight^T + bias.
  at::Tensor logits_of(const at::Tensor& tokens);

  /// Writes the options up to top_k, and those that were changed, to `stream`, without the closing
  /// bracket.
  void print_options(std::ostream& stream) const;
};

/// What the routers share that end in `topk_gating`.
template <typename Derived>
class EQUIPOISE_API TopKRouterImplBase : public RouterImplBase<Derived> {
 public:
  void reset() override;

 protected:
  /// The options of topk_gating.
  TopKGatingOptions gating_options() const;

  /// The logits with those of dropped experts at -inf.
  at::Tensor drop_experts(const at::Tensor& logits);

  void print_options(std::ostream& stream) const;
};

/// Options for `TopKRouter`.
///
/// Example:
/// ```
/// TopKRouter router(TopKRouterOptions(512, 64, 8).norm_topk_prob(true));
/// ```
struct TopKRouterOptions : TopKRouterOptionsBase<TopKRouterOptions> {
  using TopKRouterOptionsBase::TopKRouterOptionsBase;
};

/// Chooses K of E experts for every token: `topk_gating(x weight^T + bias, top_k)`.
///
/// Example:
/// ```
/// TopKRouter router(512, 64, 8);
/// RoutingResult routing = router(x);  // x [..., 512] -> routing.topk_indices [..., 8]
/// ```
class EQUIPOISE_API TopKRouterImpl : public TopKRouterImplBase<TopKRouterImpl> {
 public:
  static constexpr const char* kName = "TopKRouter";

  TopKRouterImpl(int64_t d_model, int64_t num_experts, int64_t top_k)
      : TopKRouterImpl(TopKRouterOptions(d_model, num_experts, top_k)) {}
  explicit TopKRouterImpl(TopKRouterOptions options);

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// @param x            [..., d_model]; float64, float32, bfloat16 or float16.
  /// @param token_mask   [...], bool (true = real token) or floating weights >= 0.
  /// @param expert_bias  [E], added to the scores for the selection only, see `LossFreeBalancer`.
  /// @return             with the leading dimensions of x: topk_indices [..., K], lse [...].
  RoutingResult forward(const at::Tensor& x,
                        const std::optional<at::Tensor>& token_mask = std::nullopt,
                        const std::optional<at::Tensor>& expert_bias = std::nullopt);

  /// The options that the module was made with.
  TopKRouterOptions options;
};

/// Holds a `TopKRouterImpl`; copies of the holder share the module.
TORCH_MODULE(TopKRouter);

/// Options for `NoisyTopKRouter`.
///
/// Example:
/// ```
/// NoisyTopKRouter router(NoisyTopKRouterOptions(512, 64, 8).norm_topk_prob(true));
/// ```
struct NoisyTopKRouterOptions : TopKRouterOptionsBase<NoisyTopKRouterOptions> {
  using TopKRouterOptionsBase::TopKRouterOptionsBase;

  /// Least standard deviation of the noise, > 0. Default: 0.01
  TORCH_ARG(double, noise_epsilon) = 1e-2;
};

/// Noisy top-k gating (Shazeer 2017, arXiv:1701.06538, eq. 4): in training the logits are
///
///   x weight^T + e stddev,    e ~ N(0, 1),    stddev = softplus(x noise_weight^T) + noise_epsilon
///
/// for the selection, the weights and the sums alike; in eval mode they are x weight^T. The
/// gradient reaches noise_weight through the noise.
///
/// Example:
/// ```
/// NoisyTopKRouter router(512, 64, 8);
/// RoutingResult routing = router(x);
/// ```
class EQUIPOISE_API NoisyTopKRouterImpl : public TopKRouterImplBase<NoisyTopKRouterImpl> {
 public:
  static constexpr const char* kName = "NoisyTopKRouter";

  NoisyTopKRouterImpl(int64_t d_model, int64_t num_experts, int64_t top_k)
      : NoisyTopKRouterImpl(NoisyTopKRouterOptions(d_model, num_experts, top_k)) {}
  explicit NoisyTopKRouterImpl(NoisyTopKRouterOptions options);

  void reset() override;

  /// Draws the weight anew, as `TopKRouter` does; noise_weight 0; no logits.
  void reset_parameters();

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// As of `TopKRouter`.
  RoutingResult forward(const at::Tensor& x,
                        const std::optional<at::Tensor>& token_mask = std::nullopt,
                        const std::optional<at::Tensor>& expert_bias = std::nullopt);

  /// The options that the module was made with.
  NoisyTopKRouterOptions options;

  /// [E, d_model], 0 at the start.
  at::Tensor noise_weight;

  /// [..., E], of the last forward in training; undefined before it, and in a clone. The load loss
  /// of Shazeer's appendix A is a function of them.
  at::Tensor clean_logits, noisy_logits, noise_stddev;

 private:
  void forget();
};

/// Holds a `NoisyTopKRouterImpl`; copies of the holder share the module.
TORCH_MODULE(NoisyTopKRouter);

/// Options for `DenseRouter`.
///
/// Example:
/// ```
/// DenseRouter router(DenseRouterOptions(512, 8).score_function("sigmoid"));
/// ```
struct DenseRouterOptions : TopKRouterOptionsBase<DenseRouterOptions> {
  DenseRouterOptions(int64_t d_model, int64_t num_experts)
      : TopKRouterOptionsBase(d_model, num_experts, num_experts) {}
};

/// Sends every token to every expert: `TopKRouter` with top_k = num_experts. The load is then equal
/// by itself, and `balance_loss` leaves out the losses that balance it, with one warning.
///
/// Example:
/// ```
/// DenseRouter router(512, 8);
/// RoutingResult routing = router(x);  // routing.topk_weights [..., 8]: softmax, sorted
/// ```
class EQUIPOISE_API DenseRouterImpl : public TopKRouterImplBase<DenseRouterImpl> {
 public:
  static constexpr const char* kName = "DenseRouter";

  DenseRouterImpl(int64_t d_model, int64_t num_experts)
      : DenseRouterImpl(DenseRouterOptions(d_model, num_experts)) {}
  explicit DenseRouterImpl(DenseRouterOptions options);

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// As of `TopKRouter`, without a bias: there is nothing to select.
  RoutingResult forward(const at::Tensor& x,
                        const std::optional<at::Tensor>& token_mask = std::nullopt);

  /// The options that the module was made with.
  DenseRouterOptions options;
};

/// Holds a `DenseRouterImpl`; copies of the holder share the module.
TORCH_MODULE(DenseRouter);

}  // namespace equipoise::nn
