// SPDX-License-Identifier: Apache-2.0
// Gate, bring the rows of each expert together, two GEMMs per expert with the activation between
// them, bring the rows back.
//
// The rows after expert_offsets[E] (slots that chose no expert) belong to nobody. torch's grouped
// GEMM leaves them uninitialised, in its result and in its gradient, NaN included. That stays
// without effect because every step between moe_permute and moe_unpermute works row by row or
// inside one expert's rows, and moe_unpermute (and the backward of moe_permute) reads only the rows
// that row_id_map names.
#include "moe_layer.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <torch/nn/init.h>

#include <cmath>
#include <utility>
#include <vector>

#include "../ops/moe_permute.h"
#include "../ops/moe_unpermute.h"

namespace equipoise::nn {
namespace {

at::Tensor activate(const std::string& activation, const at::Tensor& hidden) {
  if (activation == "relu") return at::relu(hidden);
  if (activation == "gelu") return at::gelu(hidden);
  const auto halves = hidden.chunk(2, -1);
  return at::silu(halves[0]) * halves[1];
}

/// What torch's own GEMMs do: autocast's type where it is on, except for float64.
at::Tensor autocast(const at::Tensor& tensor) {
  const auto device = tensor.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return tensor;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

/// What torch's grouped GEMM takes, in its backward too: float32 and half types, at least one row,
/// rows of a multiple of 16 bytes.
bool can_group(const at::Tensor& rows, int64_t d_model, int64_t d_hidden) {
  const auto row_unit = 16 / rows.element_size();
  return rows.scalar_type() != at::kDouble && rows.size(0) > 0 && d_model % row_unit == 0 &&
         d_hidden % row_unit == 0;
}

at::Tensor grouped_experts(const at::Tensor& rows, const at::Tensor& w_in, const at::Tensor& w_out,
                           const std::string& activation, const at::Tensor& expert_offsets) {
  const auto ends = expert_offsets.slice(0, 1).to(at::kInt);
  const auto hidden = activate(activation, at::_grouped_mm(rows, w_in.transpose(1, 2), ends));
  return at::_grouped_mm(hidden, w_out.transpose(1, 2), ends);
}

at::Tensor looped_experts(const at::Tensor& rows, const at::Tensor& w_in, const at::Tensor& w_out,
                          const std::string& activation, const at::Tensor& expert_offsets) {
  const auto num_experts = w_in.size(0);
  const auto offsets = expert_offsets.cpu();
  std::vector<int64_t> sizes;
  for (int64_t e = 0; e < num_experts; ++e) {
    sizes.push_back(offsets.const_data_ptr<int64_t>()[e + 1] -
                    offsets.const_data_ptr<int64_t>()[e]);
  }
  sizes.push_back(rows.size(0) - offsets.const_data_ptr<int64_t>()[num_experts]);
  // Unbound once: the backward then stacks the gradients, where indexing w_in[e] would add up E
  // tensors of w_in's size.
  const auto w_in_of = w_in.unbind(0);
  const auto w_out_of = w_out.unbind(0);
  auto pieces = rows.split_with_sizes(sizes);  // the last one, the rows of nobody, stays as it is
  for (int64_t e = 0; e < num_experts; ++e) {
    pieces[e] = at::linear(activate(activation, at::linear(pieces[e], w_in_of[e])), w_out_of[e]);
  }
  return at::cat(pieces);
}

}  // namespace

MoELayerImpl::MoELayerImpl(MoELayerOptions options) : options(std::move(options)) { reset(); }

void MoELayerImpl::reset() {
  const auto d_model = options.d_model();
  const auto d_hidden = options.d_hidden();
  const auto num_experts = options.num_experts();
  const auto& activation = options.activation();
  TORCH_CHECK(d_model >= 1, "MoELayer: d_model must be >= 1, got ", d_model);
  TORCH_CHECK(d_hidden >= 1, "MoELayer: d_hidden must be >= 1, got ", d_hidden);
  TORCH_CHECK(num_experts >= 1, "MoELayer: num_experts must be >= 1, got ", num_experts);
  TORCH_CHECK(options.top_k() >= 1 && options.top_k() <= num_experts,
              "MoELayer: top_k must be from 1 to num_experts = ", num_experts, ", got ",
              options.top_k());
  TORCH_CHECK(activation == "relu" || activation == "gelu" || activation == "swiglu",
              "MoELayer: activation must be relu, gelu or swiglu, got ", activation);
  router =
      register_module("router", TopKRouter(TopKRouterOptions(d_model, num_experts, options.top_k())
                                               .norm_topk_prob(options.norm_topk_prob())));
  const auto inner = activation == "swiglu" ? 2 * d_hidden : d_hidden;
  w_in = register_parameter("w_in", at::empty({num_experts, inner, d_model}));
  w_out = register_parameter("w_out", at::empty({num_experts, d_model, d_hidden}));
  reset_experts();  // the router has drawn its own
}

void MoELayerImpl::reset_parameters() {
  router->reset_parameters();
  reset_experts();
}

void MoELayerImpl::reset_experts() {
  const auto in_bound = 1 / std::sqrt(static_cast<double>(options.d_model()));
  const auto out_bound = 1 / std::sqrt(static_cast<double>(options.d_hidden()));
  torch::nn::init::uniform_(w_in, -in_bound, in_bound);
  torch::nn::init::uniform_(w_out, -out_bound, out_bound);
}

void MoELayerImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "equipoise::nn::MoELayer(d_model=" << options.d_model()
         << ", d_hidden=" << options.d_hidden() << ", num_experts=" << options.num_experts()
         << ", top_k=" << options.top_k() << ", activation=" << options.activation()
         << ", norm_topk_prob=" << options.norm_topk_prob() << ")";
}

std::tuple<at::Tensor, RoutingResult> MoELayerImpl::forward(
    const at::Tensor& x, const std::optional<at::Tensor>& token_mask) {
  const auto routing = router(x, token_mask);
  const auto tokens = autocast(x).reshape({-1, options.d_model()});
  const auto expert_in = autocast(w_in);
  const auto expert_out = autocast(w_out);
  TORCH_CHECK(tokens.scalar_type() == expert_in.scalar_type(),
              "MoELayer: x must have the type of w_in (", expert_in.scalar_type(), "), got ",
              tokens.scalar_type());

  const auto topk_indices = routing.topk_indices.reshape({-1, options.top_k()});
  const auto topk_weights = routing.topk_weights.reshape({-1, options.top_k()});
  const auto permuted =
      moe_permute(tokens, topk_indices, options.num_experts(),
                  MoEPermuteOptions().tokens_per_expert(routing.tokens_per_expert));
  const auto experts = can_group(permuted.permuted, options.d_model(), options.d_hidden())
                           ? grouped_experts
                           : looped_experts;
  const auto rows = experts(permuted.permuted, expert_in, expert_out, options.activation(),
                            permuted.expert_offsets);
  return {moe_unpermute(rows, permuted.row_id_map, topk_weights).reshape(x.sizes()), routing};
}

}  // namespace equipoise::nn
