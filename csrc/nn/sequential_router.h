// SPDX-License-Identifier: Apache-2.0
// SequentialRouter: a router that remembers the tokens before.
#pragma once

#include <torch/nn/modules/rnn.h>

#include <optional>

#include "router.h"

namespace equipoise::nn {

/// Options for `SequentialRouter`.
///
/// Example:
/// ```
/// SequentialRouter router(SequentialRouterOptions(512, 64, 8).hidden_size(128).influence(0.5));
/// ```
struct SequentialRouterOptions : TopKRouterOptionsBase<SequentialRouterOptions> {
  using TopKRouterOptionsBase::TopKRouterOptionsBase;

  /// Width of the state, >= 1, or 0 for d_model. Default: 0
  TORCH_ARG(int64_t, hidden_size) = 0;
  /// In (0, 1]: multiplies the state between two tokens. Default: 1
  TORCH_ARG(double, damping) = 1.0;
  /// In [0, 1]: how much of the logits comes from the state, the rest from the token alone; 0 is
  /// `TopKRouter`. Default: 1
  TORCH_ARG(double, influence) = 1.0;
};

/// Logits from a GRU over the sequence, mixed with those of the token alone:
///
///   h_s = GRU(x_s, damping h_{s-1}),    h_{-1} = 0, and h_{s-1} = 0 where reset_s
///   logits_s = influence h_s sequence_weight^T + (1 - influence) (x_s weight^T + bias)
///
/// followed by `topk_gating`. A masked token leaves h as it is, as if it were not there. Causal: a
/// token knows those before it only. Without damping, mask and resets this is torch's GRU in one
/// call; otherwise one cell after the other.
///
/// Example:
/// ```
/// SequentialRouter router(512, 64, 8);
/// RoutingResult routing = router(x);  // x [B, S, 512] -> routing.topk_indices [B, S, 8]
/// ```
class EQUIPOISE_API SequentialRouterImpl : public TopKRouterImplBase<SequentialRouterImpl> {
 public:
  static constexpr const char* kName = "SequentialRouter";

  SequentialRouterImpl(int64_t d_model, int64_t num_experts, int64_t top_k)
      : SequentialRouterImpl(SequentialRouterOptions(d_model, num_experts, top_k)) {}
  explicit SequentialRouterImpl(SequentialRouterOptions options);

  void reset() override;

  /// Draws all parameters anew: the weights normal with standard deviation init_std, the GRU's as
  /// torch does.
  void reset_parameters();

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// @param x            [B, S, d_model]; float64, float32, bfloat16 or float16.
  /// @param token_mask   [B, S], bool (true = real token) or floating weights >= 0.
  /// @param expert_bias  [E], added to the scores for the selection only.
  /// @param reset        [B, S] bool: forget everything before this token.
  /// @return             topk_indices [B, S, K], lse [B, S], and the rest as of `TopKRouter`.
  RoutingResult forward(const at::Tensor& x,
                        const std::optional<at::Tensor>& token_mask = std::nullopt,
                        const std::optional<at::Tensor>& expert_bias = std::nullopt,
                        const std::optional<at::Tensor>& reset = std::nullopt);

  /// The options that the module was made with.
  SequentialRouterOptions options;

  /// The recurrent part, [B, S, d_model] -> [B, S, hidden_size].
  torch::nn::GRU gru{nullptr};

  /// [E, hidden_size].
  at::Tensor sequence_weight;

 private:
  at::Tensor states_of(at::Tensor tokens, const std::optional<at::Tensor>& token_mask,
                       const std::optional<at::Tensor>& reset);
};

/// Holds a `SequentialRouterImpl`; copies of the holder share the module.
TORCH_MODULE(SequentialRouter);

}  // namespace equipoise::nn
