// SPDX-License-Identifier: Apache-2.0
// ExpertChoiceRouter: the experts choose the tokens.
#pragma once

#include <optional>

#include "../ops/expert_choice.h"
#include "router.h"

namespace equipoise::nn {

/// Options for `ExpertChoiceRouter`.
///
/// Example:
/// ```
/// ExpertChoiceRouter router(ExpertChoiceRouterOptions(512, 64, 2).bias(true));
/// ```
struct ExpertChoiceRouterOptions : RouterOptionsBase<ExpertChoiceRouterOptions> {
  using RouterOptionsBase::RouterOptionsBase;
};

/// Every expert takes its best C = ceil(top_k T / E) of the T tokens, at most T, by softmax over
/// the experts: `expert_choice(x weight^T + bias, C)` (Zhou 2022, arXiv:2202.09368). All experts
/// work the same; a token has top_k experts on average, and may have none.
///
/// A token's experts depend on the other tokens, those after it among them: not for autoregressive
/// models.
///
/// Example:
/// ```
/// ExpertChoiceRouter router(512, 64, 2);
/// ExpertChoiceResult choice = router(x);  // x [..., 512] -> choice.token_indices [64, C]
/// ```
class EQUIPOISE_API ExpertChoiceRouterImpl : public RouterImplBase<ExpertChoiceRouterImpl> {
 public:
  static constexpr const char* kName = "ExpertChoiceRouter";

  ExpertChoiceRouterImpl(int64_t d_model, int64_t num_experts, int64_t top_k)
      : ExpertChoiceRouterImpl(ExpertChoiceRouterOptions(d_model, num_experts, top_k)) {}
  explicit ExpertChoiceRouterImpl(ExpertChoiceRouterOptions options);

  /// Writes the module's name and options to `stream`.
  void pretty_print(std::ostream& stream) const override;

  /// @param x           [..., d_model], whose leading dimensions are the T tokens; float64,
  /// float32,
  ///                    bfloat16 or float16.
  /// @param token_mask  [...], bool (true = real token) or floating weights, of which only > 0
  ///                    counts. A masked token is never taken.
  /// @return            token_indices and token_weights [E, C].
  ExpertChoiceResult forward(const at::Tensor& x,
                             const std::optional<at::Tensor>& token_mask = std::nullopt);

  /// The options that the module was made with.
  ExpertChoiceRouterOptions options;
};

/// Holds an `ExpertChoiceRouterImpl`; copies of the holder share the module.
TORCH_MODULE(ExpertChoiceRouter);

}  // namespace equipoise::nn
