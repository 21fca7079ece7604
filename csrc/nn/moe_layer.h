// SPDX-License-Identifier: Apache-2.0
// MoELayer: a Mixture-of-Experts feed-forward layer.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>
#include <tuple>

#include "../export.h"
#include "router.h"

namespace equipoise::nn {

/// Options for `MoELayer`.
///
/// Example:
/// ```
/// MoELayer layer(MoELayerOptions(512, 2048, 64, 8).activation("swiglu"));
/// ```
struct MoELayerOptions {
  MoELayerOptions(int64_t d_model, int64_t d_hidden, int64_t num_experts, int64_t top_k)
      : d_model_(d_model), d_hidden_(d_hidden), num_experts_(num_experts), top_k_(top_k) {}

  /// Width of a token, >= 1.
  TORCH_ARG(int64_t, d_model);
  /// Inner width of one expert, >= 1.
  TORCH_ARG(int64_t, d_hidden);
  /// E >= 1.
  TORCH_ARG(int64_t, num_experts);
  /// K, from 1 to E.
  TORCH_ARG(int64_t, top_k);
  /// "relu", "gelu" (exact) or "swiglu": silu(gate) up, with `w_in` holding gate, then up.
  /// Default: "relu"
  TORCH_ARG(std::string, activation) = "relu";
  /// Divide the K weights of a token by their sum. Default: true
  TORCH_ARG(bool, norm_topk_prob) = true;
};

/// y_t = sum_k topk_weights[t, k] w_out[e] activation(w_in[e] x_t),  e = topk_indices[t, k]
///
/// No token is dropped. A masked token, and one without any present expert, gets y = 0 and sends no
/// gradient. Under autocast the experts run in its type, the router in float32.
///
/// The experts are two grouped GEMMs, and nothing waits for the device, in float32, bfloat16 and
/// float16 with rows of a multiple of 16 bytes (d_model and d_hidden multiples of 4, or of 8).
/// float64 and other widths take one pair of GEMMs per expert and read the counts back to the host.
/// A second gradient is not promised: torch's grouped GEMM has none.
///
/// Example:
/// ```
/// MoELayer layer(512, 2048, 64, 8);
/// auto [y, routing] = layer(x);  // x [..., 512] -> y [..., 512]
/// ```
class EQUIPOISE_API MoELayerImpl : public torch::nn::Cloneable<MoELayerImpl> {
 public:
  MoELayerImpl(int64_t d_model, int64_t d_hidden, int64_t num_experts, int64_t top_k)
      : MoELayerImpl(MoELayerOptions(d_model, d_hidden, num_experts, top_k)) {}
  explicit MoELayerImpl(MoELayerOptions options);

  void reset() override;

  /// Draws all parameters anew: the router's, w_in uniform within 1/sqrt(d_model) and w_out
  /// uniform within 1/sqrt(d_hidden).
  void reset_parameters();

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// @param x           [..., d_model], of the parameters' type (under autocast any floating one).
  /// @param token_mask  [...], bool (true = real token) or floating weights >= 0, which weigh the
  ///                    statistics of the routing, not y.
  /// @return            y [..., d_model], and the routing with the leading dimensions of x.
  std::tuple<at::Tensor, RoutingResult> forward(
      const at::Tensor& x, const std::optional<at::Tensor>& token_mask = std::nullopt);

  /// The options that the module was made with.
  MoELayerOptions options;

  /// Chooses the experts; its parameter is `router.weight`.
  TopKRouter router{nullptr};

  /// [E, d_hidden, d_model]; swiglu: [E, 2 d_hidden, d_model].
  at::Tensor w_in;

  /// [E, d_model, d_hidden].
  at::Tensor w_out;

 private:
  void reset_experts();
};

/// Holds a `MoELayerImpl`; copies of the holder share the module.
TORCH_MODULE(MoELayer);

}  // namespace equipoise::nn
