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
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

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

template <>
struct type_caster<equipoise::ExpertChoiceResult> {
  PYBIND11_TYPE_CASTER(equipoise::ExpertChoiceResult, const_name("ExpertChoiceResult"));

  static handle cast(const equipoise::ExpertChoiceResult& result, return_value_policy, handle) {
    return module_::import("equipoise.functional")
        .attr("ExpertChoiceResult")(result.token_indices, result.token_weights)
        .release();
  }
};

template <>
struct type_caster<equipoise::nn::AdvancedLoadBalancingTerms> {
  PYBIND11_TYPE_CASTER(equipoise::nn::AdvancedLoadBalancingTerms, const_name("dict[str, Tensor]"));

  static handle cast(const equipoise::nn::AdvancedLoadBalancingTerms& terms, return_value_policy,
                     handle) {
    return dict("uniform"_a = terms.uniform, "entropy"_a = terms.entropy,
                "variance"_a = terms.variance, "mutual_info"_a = terms.mutual_info,
                "total"_a = terms.total)
        .release();
  }
};

}  // namespace pybind11::detail

namespace {

using equipoise::nn::AdvancedLoadBalancingLossImpl;
using equipoise::nn::AdvancedLoadBalancingLossOptions;
using equipoise::nn::DenseRouterImpl;
using equipoise::nn::DenseRouterOptions;
using equipoise::nn::EMABalancerImpl;
using equipoise::nn::EMABalancerOptions;
using equipoise::nn::ExpertChoiceRouterImpl;
using equipoise::nn::ExpertChoiceRouterOptions;
using equipoise::nn::LossFreeBalancerImpl;
using equipoise::nn::LossFreeBalancerOptions;
using equipoise::nn::MoELayerImpl;
using equipoise::nn::MoELayerOptions;
using equipoise::nn::NoisyTopKRouterImpl;
using equipoise::nn::NoisyTopKRouterOptions;
using equipoise::nn::SequentialRouterImpl;
using equipoise::nn::SequentialRouterOptions;
using equipoise::nn::SinkhornRouterImpl;
using equipoise::nn::SinkhornRouterOptions;
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

/// A member that a forward or an update gives another value: ModuleWrapper copies attributes when
/// it is made, so that a property of the wrapper must ask each time.
template <typename Module, typename Bound, typename Base>
void bind_current(py::module_& m, Bound& bound, const std::string& name, at::Tensor Base::*member) {
  const auto hidden = "_" + name;  // ModuleWrapper leaves out names that begin so
  bound.def_property_readonly(
      hidden.c_str(), [member](const Module& module) -> std::optional<at::Tensor> {
        const auto& tensor = module.*member;
        return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
      });
  const auto get = py::cpp_function(
      [hidden](const py::object& self) { return self.attr("cpp_module").attr(hidden.c_str()); });
  m.attr(bound.attr("__name__")).attr(name.c_str()) =
      py::module_::import("builtins").attr("property")(get);
}

/// The constructor of a router that ends in topk_gating; `set_more` takes what only this one has.
template <typename Module, typename Options, typename Bound, typename... More, typename... Args>
void bind_router_init(Bound& bound, void (*set_more)(Options&, More...), const Args&... more) {
  bound.def(py::init([set_more](int64_t d_model, int64_t num_experts, int64_t top_k,
                                const std::string& score_function, bool norm_topk_prob,
                                double scaling_factor, bool bias, int64_t num_groups,
                                std::optional<int64_t> group_topk, const std::string& group_score,
                                double jitter_eps, double expert_dropout, double init_std,
                                More... values) {
              auto options = Options(d_model, num_experts, top_k)
                                 .score_function(score_function)
                                 .norm_topk_prob(norm_topk_prob)
                                 .scaling_factor(scaling_factor)
                                 .bias(bias)
                                 .num_groups(num_groups)
                                 .group_topk(group_topk)
                                 .group_score(group_score)
                                 .jitter_eps(jitter_eps)
                                 .expert_dropout(expert_dropout)
                                 .init_std(init_std);
              set_more(options, values...);
              return std::make_shared<Module>(std::move(options));
            }),
            py::arg("d_model"), py::arg("num_experts"), py::arg("top_k"),
            py::arg("score_function") = "softmax", py::arg("norm_topk_prob") = false,
            py::arg("scaling_factor") = 1.0, py::arg("bias") = false, py::arg("num_groups") = 1,
            py::arg("group_topk") = py::none(), py::arg("group_score") = "top2_sum",
            py::arg("jitter_eps") = 0.0, py::arg("expert_dropout") = 0.0,
            py::arg("init_std") = 0.02, more..., "See the class.");
  bound.def("reset_parameters", &Module::reset_parameters, "Draws the parameters anew.");
}

/// `forward` of a router whose selection a balancer may steer.
template <typename Module, typename Bound>
void bind_router_forward(Bound& bound) {
  bind_forward(bound, &Module::forward, py::arg("x"), py::arg("token_mask") = py::none(),
               py::arg("expert_bias") = py::none(),
               "Routes x [..., d_model]; token_mask [...], True = real token; expert_bias [E], for "
               "the selection only.");
}

/// What the balancers share. Casting a Python module that holds one goes through `_apply`, which
/// must leave the bias float32 as C++'s `to` does.
template <typename Module, typename Bound>
void bind_balancer(py::module_& m, Bound& bound) {
  bound.def("record", &Module::record, without_gil(), py::arg("tokens_per_expert"),
            "Adds counts [E] of one forward pass in training mode with gradients.");
  bound.def("update", &Module::update, without_gil(), py::arg("group") = py::none(),
            "One step of expert_bias, with the counts summed over the process group if given.");
  bound.def("reset_parameters", &Module::reset_parameters, "Zeroes the bias and the counts.");
  bind_current<Module>(m, bound, "tokens_per_expert", &Module::tokens_per_expert);
  m.attr(bound.attr("__name__")).attr("_apply") = py::cpp_function(
      [](const py::object& self, const py::function& move, bool) {
        auto bias = self.attr("expert_bias").template cast<at::Tensor>();
        bias.set_data(bias.to(move(bias).template cast<at::Tensor>().device()));
        return self;
      },
      py::is_method(m.attr(bound.attr("__name__"))), py::arg("move"), py::arg("recurse") = true);
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
    bias: add a learnt bias to the logits.
    num_groups, group_topk, group_score: choose within the best groups of experts only.
    jitter_eps: in training, x is multiplied by values uniform within 1 +- jitter_eps.
    expert_dropout: chance of an expert to be absent in one training step.
    init_std: standard deviation of the weight at the start.

Parameters:
    weight: [E, d_model], normal with standard deviation init_std.
    bias: [E], zero; only with bias=True.

Example:
    >>> router = TopKRouter(d_model=8, num_experts=4, top_k=2)
    >>> router(torch.randn(5, 3, 8)).topk_indices.shape
    torch.Size([5, 3, 2])
)";

constexpr const char* kNoisyTopKRouterDoc =
    R"(Noisy top-k gating (Shazeer 2017, arXiv:1701.06538, eq. 4).

In training e stddev is added to the logits, e ~ N(0, 1),
stddev = softplus(x noise_weight^T) + noise_epsilon.

Args:
    d_model, num_experts, top_k, ...: see TopKRouter.
    noise_epsilon: least standard deviation of the noise.

Parameters:
    weight, bias: see TopKRouter.
    noise_weight: [E, d_model], zero.

Attributes:
    clean_logits, noisy_logits, noise_stddev: [..., E] of the last forward in training, or None.

Example:
    >>> router = NoisyTopKRouter(d_model=8, num_experts=4, top_k=2)
    >>> router(torch.randn(5, 8)).topk_indices.shape, router.noise_stddev.shape
    (torch.Size([5, 2]), torch.Size([5, 4]))
)";

constexpr const char* kSequentialRouterDoc =
    R"(Logits from a GRU over the sequence, mixed with those of the token alone.

h_s = GRU(x_s, damping h_{s-1}), from 0 and anew where reset_s;
logits_s = influence h_s sequence_weight^T + (1 - influence) x_s weight^T.

Args:
    d_model, num_experts, top_k, ...: see TopKRouter.
    hidden_size: width of the state; 0 for d_model.
    damping: in [0, 1], multiplies the state between two tokens.
    influence: in [0, 1], how much of the logits comes from the state.

Parameters:
    weight, bias: see TopKRouter.
    sequence_weight: [E, hidden_size].
    gru: those of torch.nn.GRU.

Example:
    >>> router = SequentialRouter(d_model=8, num_experts=4, top_k=2)
    >>> router(torch.randn(5, 3, 8)).topk_indices.shape
    torch.Size([5, 3, 2])
)";

constexpr const char* kSinkhornRouterDoc =
    R"(In training the experts are chosen by a balanced plan, functional.sinkhorn(logits).

The weights come from the plain scores. In eval mode this is TopKRouter.

Args:
    d_model, num_experts, top_k, ...: see TopKRouter; num_groups must be 1.
    num_iters: of the scaling, at least 1.

Parameters:
    weight, bias: see TopKRouter.

Example:
    >>> router = SinkhornRouter(d_model=8, num_experts=4, top_k=2)
    >>> router(torch.randn(5, 8)).topk_indices.shape
    torch.Size([5, 2])
)";

constexpr const char* kExpertChoiceRouterDoc =
    R"(Every expert takes its best C = ceil(top_k T / E) tokens (Zhou 2022, arXiv:2202.09368).

Args:
    d_model, num_experts, top_k, bias, jitter_eps, init_std: see TopKRouter.

Parameters:
    weight, bias: see TopKRouter.

Example:
    >>> router = ExpertChoiceRouter(d_model=8, num_experts=4, top_k=2)
    >>> router(torch.randn(5, 3, 8)).token_indices.shape
    torch.Size([4, 8])
)";

constexpr const char* kDenseRouterDoc =
    R"(Sends every token to every expert: TopKRouter with top_k = num_experts.

Args:
    d_model: width of a token.
    num_experts: E.
    score_function, norm_topk_prob, scaling_factor, bias, jitter_eps, init_std: see TopKRouter.

Parameters:
    weight, bias: see TopKRouter.

Example:
    >>> router = DenseRouter(d_model=8, num_experts=4)
    >>> router(torch.zeros(5, 8)).topk_weights[0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500], grad_fn=<SelectBackward0>)
)";

constexpr const char* kLossFreeBalancerDoc =
    R"(Loss-free balancing: b_e += u sign(mean(C) - C_e) (Wang 2024, arXiv:2408.15664).

Give expert_bias to the router's forward, record its counts, call update() after each optimizer step.
In place of Python's, tokens_per_expert is recorded by the caller.

Args:
    num_experts: E.
    bias_update_rate: u.
    mode: "sign", or "proportional" for u (mean(C) - C_e) / mean(C).
    center: take the mean off the bias after each update.

Attributes:
    expert_bias: [E] float32 buffer.
    tokens_per_expert: [E] int64, counted since the last update.

Example:
    >>> balancer = LossFreeBalancer(4, bias_update_rate=0.25)
    >>> balancer.record(torch.tensor([9, 5, 5, 1]))
    >>> balancer.update()
    >>> balancer.expert_bias
    tensor([-0.2500,  0.0000,  0.0000,  0.2500])
)";

constexpr const char* kEMABalancerDoc =
    R"(Balancing by a moving average m of the loads: expert_bias = -balancing_strength (E m - 1).

Args:
    num_experts: E.
    balancing_strength: the bias of an expert without any tokens.
    beta: share of the past in the average, in [0, 1).

Attributes:
    expert_bias: [E] float32 buffer.
    tokens_per_expert: [E] int64, counted since the last update.

Example:
    >>> balancer = EMABalancer(4, balancing_strength=0.5, beta=0.5)
    >>> balancer.record(torch.tensor([9, 5, 5, 1]))
    >>> balancer.update()
    >>> balancer.expert_bias
    tensor([-0.2000,  0.0000,  0.0000,  0.2000])
)";

constexpr const char* kAdvancedLoadBalancingLossDoc =
    R"(Balance terms of gating weights [B, N] with mean P over the rows.

uniform = KL(u || P), entropy = log N - H(P), variance = unbiased Var(P), mutual_info =
mean_ij cos(x_i, x_j) cos(g_i, g_j) ("similarity") or mean_i H(g_i) - H(P) ("information").

Args:
    num_components: N.
    lambda_uniform, lambda_entropy, lambda_mi, lambda_variance: coefficients.
    mi: "similarity" or "information".

Example:
    >>> terms = AdvancedLoadBalancingLoss(4)(torch.full((5, 4), 0.25))
    >>> sorted(terms), abs(terms["total"].item()) < 1e-6
    (['entropy', 'mutual_info', 'total', 'uniform', 'variance'], True)
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
  bind_router_init<TopKRouterImpl>(
      router, +[](TopKRouterOptions&) {});
  bind_router_forward<TopKRouterImpl>(router);

  auto noisy = bind<NoisyTopKRouterImpl>(m, "NoisyTopKRouter", kNoisyTopKRouterDoc);
  bind_router_init<NoisyTopKRouterImpl>(
      noisy,
      +[](NoisyTopKRouterOptions& options, double epsilon) { options.noise_epsilon(epsilon); },
      py::arg("noise_epsilon") = 1e-2);
  bind_router_forward<NoisyTopKRouterImpl>(noisy);
  bind_current<NoisyTopKRouterImpl>(m, noisy, "clean_logits", &NoisyTopKRouterImpl::clean_logits);
  bind_current<NoisyTopKRouterImpl>(m, noisy, "noisy_logits", &NoisyTopKRouterImpl::noisy_logits);
  bind_current<NoisyTopKRouterImpl>(m, noisy, "noise_stddev", &NoisyTopKRouterImpl::noise_stddev);

  auto sequential = bind<SequentialRouterImpl>(m, "SequentialRouter", kSequentialRouterDoc);
  bind_router_init<SequentialRouterImpl>(
      sequential,
      +[](SequentialRouterOptions& options, int64_t hidden_size, double damping, double influence) {
        options.hidden_size(hidden_size).damping(damping).influence(influence);
      },
      py::arg("hidden_size") = 0, py::arg("damping") = 1.0, py::arg("influence") = 1.0);
  bind_forward(sequential, &SequentialRouterImpl::forward, py::arg("x"),
               py::arg("token_mask") = py::none(), py::arg("expert_bias") = py::none(),
               py::arg("reset") = py::none(),
               "Routes x [B, S, d_model]; token_mask and reset [B, S], True = real token and = "
               "forget what came before; expert_bias [E], for the selection only.");

  auto plan = bind<SinkhornRouterImpl>(m, "SinkhornRouter", kSinkhornRouterDoc);
  bind_router_init<SinkhornRouterImpl>(
      plan,
      +[](SinkhornRouterOptions& options, int64_t num_iters) { options.num_iters(num_iters); },
      py::arg("num_iters") = 8);
  bind_forward(plan, &SinkhornRouterImpl::forward, py::arg("x"), py::arg("token_mask") = py::none(),
               "Routes x [..., d_model]; token_mask [...], True = real token.");

  auto choice = bind<ExpertChoiceRouterImpl>(m, "ExpertChoiceRouter", kExpertChoiceRouterDoc);
  choice.def(py::init([](int64_t d_model, int64_t num_experts, int64_t top_k, bool bias,
                         double jitter_eps, double init_std) {
               return std::make_shared<ExpertChoiceRouterImpl>(
                   ExpertChoiceRouterOptions(d_model, num_experts, top_k)
                       .bias(bias)
                       .jitter_eps(jitter_eps)
                       .init_std(init_std));
             }),
             py::arg("d_model"), py::arg("num_experts"), py::arg("top_k"), py::arg("bias") = false,
             py::arg("jitter_eps") = 0.0, py::arg("init_std") = 0.02, "See the class.");
  choice.def("reset_parameters", &ExpertChoiceRouterImpl::reset_parameters,
             "Draws the parameters anew.");
  bind_forward(choice, &ExpertChoiceRouterImpl::forward, py::arg("x"),
               py::arg("token_mask") = py::none(),
               "ExpertChoiceResult of x [..., d_model]; token_mask [...], True = real token.");

  auto dense = bind<DenseRouterImpl>(m, "DenseRouter", kDenseRouterDoc);
  dense.def(py::init([](int64_t d_model, int64_t num_experts, const std::string& score_function,
                        bool norm_topk_prob, double scaling_factor, bool bias, double jitter_eps,
                        double init_std) {
              return std::make_shared<DenseRouterImpl>(DenseRouterOptions(d_model, num_experts)
                                                           .score_function(score_function)
                                                           .norm_topk_prob(norm_topk_prob)
                                                           .scaling_factor(scaling_factor)
                                                           .bias(bias)
                                                           .jitter_eps(jitter_eps)
                                                           .init_std(init_std));
            }),
            py::arg("d_model"), py::arg("num_experts"), py::arg("score_function") = "softmax",
            py::arg("norm_topk_prob") = false, py::arg("scaling_factor") = 1.0,
            py::arg("bias") = false, py::arg("jitter_eps") = 0.0, py::arg("init_std") = 0.02,
            "See the class.");
  dense.def("reset_parameters", &DenseRouterImpl::reset_parameters, "Draws the parameters anew.");
  bind_forward(dense, &DenseRouterImpl::forward, py::arg("x"), py::arg("token_mask") = py::none(),
               "Routes x [..., d_model]; token_mask [...], True = real token.");

  auto loss_free = bind<LossFreeBalancerImpl>(m, "LossFreeBalancer", kLossFreeBalancerDoc);
  loss_free.def(
      py::init(
          [](int64_t num_experts, double bias_update_rate, const std::string& mode, bool center) {
            return std::make_shared<LossFreeBalancerImpl>(LossFreeBalancerOptions(num_experts)
                                                              .bias_update_rate(bias_update_rate)
                                                              .mode(mode)
                                                              .center(center));
          }),
      py::arg("num_experts"), py::arg("bias_update_rate") = 1e-3, py::arg("mode") = "sign",
      py::arg("center") = false, "See the class.");
  bind_balancer<LossFreeBalancerImpl>(m, loss_free);

  auto ema = bind<EMABalancerImpl>(m, "EMABalancer", kEMABalancerDoc);
  ema.def(py::init([](int64_t num_experts, double balancing_strength, double beta) {
            return std::make_shared<EMABalancerImpl>(
                EMABalancerOptions(num_experts).balancing_strength(balancing_strength).beta(beta));
          }),
          py::arg("num_experts"), py::arg("balancing_strength") = .05, py::arg("beta") = .9,
          "See the class.");
  bind_balancer<EMABalancerImpl>(m, ema);

  auto advanced = bind<AdvancedLoadBalancingLossImpl>(m, "AdvancedLoadBalancingLoss",
                                                      kAdvancedLoadBalancingLossDoc);
  advanced.def(py::init([](int64_t num_components, double lambda_uniform, double lambda_entropy,
                           double lambda_mi, double lambda_variance, const std::string& mi) {
                 return std::make_shared<AdvancedLoadBalancingLossImpl>(
                     AdvancedLoadBalancingLossOptions(num_components)
                         .lambda_uniform(lambda_uniform)
                         .lambda_entropy(lambda_entropy)
                         .lambda_mi(lambda_mi)
                         .lambda_variance(lambda_variance)
                         .mi(mi));
               }),
               py::arg("num_components"), py::arg("lambda_uniform") = .01,
               py::arg("lambda_entropy") = .01, py::arg("lambda_mi") = .005,
               py::arg("lambda_variance") = .01, py::arg("mi") = "similarity", "See the class.");
  bind_forward(advanced, &AdvancedLoadBalancingLossImpl::forward, py::arg("gating_weights"),
               py::arg("input_features") = py::none(),
               "Dict of the scaled terms and their total for gating_weights [B, N] and "
               "input_features [B, D].");

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
