// SPDX-License-Identifier: Apache-2.0
// SinkhornRouter: in training the experts are chosen by a balanced assignment.
#pragma once

#include <optional>

#include "router.h"

namespace equipoise::nn {

/// Options for `SinkhornRouter`.
///
/// Example:
/// ```
/// SinkhornRouter router(SinkhornRouterOptions(512, 64, 8).num_iters(4));
/// ```
struct SinkhornRouterOptions : TopKRouterOptionsBase<SinkhornRouterOptions> {
  using TopKRouterOptionsBase::TopKRouterOptionsBase;

  /// Alternations of `sinkhorn`, >= 1. Default: 8
  TORCH_ARG(int64_t, num_iters) = 8;
};

/// In training a token's experts are the K largest of its row of `sinkhorn(logits)`, by which every
/// expert takes the same (BASE layers, arXiv:2103.16716; Megatron-LM). The weights and their
/// gradient come from the plain scores. The plan needs all tokens at once: in eval mode, where a
/// token must not depend on the others, this is `TopKRouter`.
///
/// Example:
/// ```
/// SinkhornRouter router(512, 64, 1);
/// RoutingResult routing = router(x);
/// ```
class EQUIPOISE_API SinkhornRouterImpl : public TopKRouterImplBase<SinkhornRouterImpl> {
 public:
  static constexpr const char* kName = "SinkhornRouter";

  SinkhornRouterImpl(int64_t d_model, int64_t num_experts, int64_t top_k)
      : SinkhornRouterImpl(SinkhornRouterOptions(d_model, num_experts, top_k)) {}
  explicit SinkhornRouterImpl(SinkhornRouterOptions options);

  void reset() override;

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// @param x           [..., d_model]; float64, float32, bfloat16 or float16.
  /// @param token_mask  [...], bool (true = real token) or floating weights >= 0.
  /// @return            with the leading dimensions of x: topk_indices [..., K], lse [...].
  RoutingResult forward(const at::Tensor& x,
                        const std::optional<at::Tensor>& token_mask = std::nullopt);

  /// The options that the module was made with.
  SinkhornRouterOptions options;
};

/// Holds a `SinkhornRouterImpl`; copies of the holder share the module.
TORCH_MODULE(SinkhornRouter);

}  // namespace equipoise::nn
