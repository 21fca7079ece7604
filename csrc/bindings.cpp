// SPDX-License-Identifier: Apache-2.0
// The only file that knows Python: binds the C++ modules, for equipoise.cpp. The ops need no
// binding, torch.ops has them. A RoutingResult crosses as the NamedTuple of equipoise.functional,
// so that both languages' modules mix.
//
// Python sees two classes per module: the bound C++ class and, under the public name, torch's
// ModuleWrapper around it (a torch.nn.Module that takes over every attribute of the former).
#include <torch/extension.h>
#include <torch/python.h>

#include <sstream>

#include "equipoise.h"

namespace pybind11::detail {

template <>
struct type_caster<equipoise::RoutingResult> {
  PYBIND11_TYPE_CASTER(equipoise::RoutingResult, const_name("RoutingResult"));

  bool load(handle source, bool convert) {
    make_caster<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>> fields;
    if (!fields.load(source, convert)) return false;
    std::tie(value.topk_weights, value.topk_indices, value.tokens_per_expert, value.lse,
             value.sums) =
        cast_op<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>>(
            std::move(fields));
    return true;
  }

  static handle cast(const equipoise::RoutingResult& result, return_value_policy, handle) {
    return module_::import("equipoise.functional")
        .attr("RoutingResult")(result.topk_weights, result.topk_indices, result.tokens_per_expert,
                               result.lse, result.sums)
        .release();
  }
};

}  // namespace pybind11::detail

namespace {

using equipoise::nn::MoELayerImpl;
using equipoise::nn::MoELayerOptions;
using equipoise::nn::SwitchBalanceLossImpl;
using equipoise::nn::SwitchBalanceLossOptions;
using equipoise::nn::TopKRouterImpl;
using equipoise::nn::TopKRouterOptions;

using without_gil = py::call_guard<py::gil_scoped_release>;

/// torch's bind_module (which would bind `forward` without argument names), with the module's own
/// repr and `doc`.
template <typename Module>
auto bind(py::module_& m, const char* name, const char* doc) {
  auto bound = torch::python::bind_module<Module, /*force_enable=*/true>(m, name);
  const auto repr = [](const Module& module) {
    std::ostringstream stream;
    stream << module;
    return stream.str();
  };
  bound.def("__repr__", repr, py::prepend()).def("__str__", repr, py::prepend());
  bound.attr("__doc__") = doc;
  m.attr(name).attr("__doc__") = doc;
  m.attr(name).attr("__module__") = "equipoise.cpp";
  return bound;
}

/// Binds `forward` and `__call__` to it alike.
template <typename Bound, typename Method, typename... Extra>
void bind_forward(Bound& bound, Method method, const Extra&... extra) {
  bound.def("forward", method, without_gil(), extra...);
  bound.def("__call__", method, without_gil(), extra...);
}

constexpr const char* kTopKRouterDoc =
    R"(Chooses top_k of num_experts experts for each token: topk_gating(x weight^T, top_k).

The matrix product is float32 (float64 for float64 x) and leaves autocast.

Args:
    d_model: width of a token.
    num_experts: E.
    top_k: K, from 1 to E.
    score_function: how logits become scores.
    norm_topk_prob: divide the K weights by their sum.
    scaling_factor: multiplies the K weights.

Parameters:
    weight: [E, d_model], normal with standard deviation 0.02.

Example:
    >>> router = TopKRouter(d_model=8, num_experts=4, top_k=2)
    >>> router(torch.randn(5, 3, 8)).topk_indices.shape
    torch.Size([5, 3, 2])
)";

constexpr const char* kSwitchBalanceLossDoc =
    R"(coeff * E sum_e f_e P_e: the Switch Transformer's balance loss (Fedus 2021, arXiv:2101.03961).

Args:
    coeff: coefficient >= 0, the value of the loss at balance.

Example:
    >>> routing = TopKRouter(d_model=8, num_experts=4, top_k=2)(torch.zeros(5, 8))
    >>> round(SwitchBalanceLoss(coeff=0.5)(routing).item(), 6)  # every probability is 1/4
    0.5
)";

constexpr const char* kMoELayerDoc =
    R"(Feed-forward layer of num_experts experts, of which each token uses top_k.

y_t = sum_k topk_weights[t, k] w_out[e] activation(w_in[e] x_t), e = topk_indices[t, k].

Args:
    d_model: width of a token.
    d_hidden: width inside an expert.
    num_experts: E.
    top_k: K, from 1 to E.
    activation: "relu", "gelu" or "swiglu".
    norm_topk_prob: divide the K weights by their sum.

Parameters:
    router.weight: [E, d_model].
    w_in: [E, d_hidden, d_model] ([E, 2 d_hidden, d_model] for swiglu).
    w_out: [E, d_model, d_hidden].

Example:
    >>> layer = MoELayer(d_model=8, d_hidden=16, num_experts=4, top_k=2)
    >>> y, routing = layer(torch.randn(5, 3, 8))
    >>> y.shape, int(routing.tokens_per_expert.sum())
    (torch.Size([5, 3, 8]), 30)
)";

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ modules of equipoise; use them as equipoise.cpp.";
  m.def("version", &equipoise::version, "Version of the C++ library.");

  auto router = bind<TopKRouterImpl>(m, "TopKRouter", kTopKRouterDoc);
  router.def(
      py::init([](int64_t d_model, int64_t num_experts, int64_t top_k,
                  const std::string& score_function, bool norm_topk_prob, double scaling_factor) {
        return std::make_shared<TopKRouterImpl>(TopKRouterOptions(d_model, num_experts, top_k)
                                                    .score_function(score_function)
                                                    .norm_topk_prob(norm_topk_prob)
                                                    .scaling_factor(scaling_factor));
      }),
      py::arg("d_model"), py::arg("num_experts"), py::arg("top_k"),
      py::arg("score_function") = "softmax", py::arg("norm_topk_prob") = false,
      py::arg("scaling_factor") = 1.0, "See the class.");
  router.def("reset_parameters", &TopKRouterImpl::reset_parameters, "Draws the weight anew.");
  bind_forward(router, &TopKRouterImpl::forward, py::arg("x"), py::arg("token_mask") = py::none(),
               py::arg("expert_bias") = py::none(),
               "Routes x [..., d_model]; token_mask [...], True = real token; expert_bias [E], for "
               "the selection only.");

  auto balance_loss = bind<SwitchBalanceLossImpl>(m, "SwitchBalanceLoss", kSwitchBalanceLossDoc);
  balance_loss.def(
      py::init([](double coeff) {
        return std::make_shared<SwitchBalanceLossImpl>(SwitchBalanceLossOptions(coeff));
      }),
      py::arg("coeff") = 1e-2, "See the class.");
  bind_forward(balance_loss, &SwitchBalanceLossImpl::forward, py::arg("routing"),
               "Scaled scalar loss of one layer's RoutingResult.");

  auto layer = bind<MoELayerImpl>(m, "MoELayer", kMoELayerDoc);
  layer.def(
      py::init([](int64_t d_model, int64_t d_hidden, int64_t num_experts, int64_t top_k,
                  const std::string& activation, bool norm_topk_prob) {
        return std::make_shared<MoELayerImpl>(MoELayerOptions(d_model, d_hidden, num_experts, top_k)
                                                  .activation(activation)
                                                  .norm_topk_prob(norm_topk_prob));
      }),
      py::arg("d_model"), py::arg("d_hidden"), py::arg("num_experts"), py::arg("top_k"),
      py::arg("activation") = "relu", py::arg("norm_topk_prob") = true, "See the class.");
  layer.def("reset_parameters", &MoELayerImpl::reset_parameters,
            "Draws all parameters anew, the router's too.");
  bind_forward(layer, &MoELayerImpl::forward, py::arg("x"), py::arg("token_mask") = py::none(),
               "(y [..., d_model], RoutingResult) for x [..., d_model]; token_mask [...], True = "
               "real token.");
}
