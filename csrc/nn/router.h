// SPDX-License-Identifier: Apache-2.0
// TopKRouter: the linear gate of a Mixture-of-Experts layer, followed by topk_gating.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>

#include "../export.h"
#include "../ops/topk_gating.h"

namespace equipoise::nn {

/// Options for `TopKRouter`.
///
/// Example:
/// ```
/// TopKRouter router(TopKRouterOptions(512, 64, 8).norm_topk_prob(true));
/// ```
struct TopKRouterOptions {
  TopKRouterOptions(int64_t d_model, int64_t num_experts, int64_t top_k)
      : d_model_(d_model), num_experts_(num_experts), top_k_(top_k) {}

  /// Width of a token, >= 1.
  TORCH_ARG(int64_t, d_model);
  /// E >= 1.
  TORCH_ARG(int64_t, num_experts);
  /// K, from 1 to E.
  TORCH_ARG(int64_t, top_k);
  /// How logits become scores, see `TopKGatingOptions`. Default: "softmax"
  TORCH_ARG(std::string, score_function) = "softmax";
  /// Divide the K weights by their sum. Default: false
  TORCH_ARG(bool, norm_topk_prob) = false;
  /// Multiplies the K weights. Default: 1
  TORCH_ARG(double, scaling_factor) = 1.0;
};

/// Chooses K of E experts for every token: `topk_gating(x weight^T, top_k)`.
///
/// The matrix product is computed in float32, or float64 for float64 x, whatever the type of the
/// weight and also under autocast: with logits rounded to a half type, near ties would send tokens
/// to other experts.
///
/// Example:
/// ```
/// TopKRouter router(512, 64, 8);
/// RoutingResult routing = router(x);  // x [..., 512] -> routing.topk_indices [..., 8]
/// ```
class EQUIPOISE_API TopKRouterImpl : public torch::nn::Cloneable<TopKRouterImpl> {
 public:
  TopKRouterImpl(int64_t d_model, int64_t num_experts, int64_t top_k)
      : TopKRouterImpl(TopKRouterOptions(d_model, num_experts, top_k)) {}
  explicit TopKRouterImpl(TopKRouterOptions options);

  void reset() override;

  /// Draws the weight from a normal distribution with standard deviation 0.02.
  void reset_parameters();

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// @param x            [..., d_model]; float64, float32, bfloat16 or float16.
  /// @param token_mask   [...], bool (true = real token) or floating weights >= 0.
  /// @param expert_bias  [E], added to the scores for the selection only (loss-free balancing).
  /// @return             with the leading dimensions of x: topk_indices [..., K], lse [...].
  RoutingResult forward(const at::Tensor& x,
                        const std::optional<at::Tensor>& token_mask = std::nullopt,
                        const std::optional<at::Tensor>& expert_bias = std::nullopt);

  /// The options that the module was made with.
  TopKRouterOptions options;

  /// [E, d_model]; there is no bias.
  at::Tensor weight;
};

/// Holds a `TopKRouterImpl`; copies of the holder share the module.
TORCH_MODULE(TopKRouter);

}  // namespace equipoise::nn
