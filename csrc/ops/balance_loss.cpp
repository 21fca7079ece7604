// SPDX-License-Identifier: Apache-2.0
// balance_loss: schema -> checks and shapes -> CPU -> autograd -> registration, top to bottom.
// Everything here is of size E: the work of a loss on [T, E] is one term in topk_gating's backward,
// which the gradient of `sums` carries there. Only prob_sum, sum w lse^2, sum w H and the sums of
// the gates have a gradient; load and W count as constants.
#include "balance_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../autograd.h"
#include "../checks.h"
#include "../library.h"
#include "../optional_tensor.h"
#include "balance_loss_arguments.h"
#include "expert_bincount.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

namespace equipoise {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Names = c10::List<std::string>;
using Kinds = std::vector<int64_t>;

// ---- schema -------------------------------------------------------------------------------------

// Each row of `sums` is a segment; how their losses become one, part_of_loss says.
TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def(
      "balance_loss(Tensor sums, Tensor coefficients, str[] losses, int top_k, "
      "Tensor? gate_sums=None, Tensor? expert_weights=None, int num_devices=1, "
      "bool unbiased=False, str normalize='none', bool guard_dense=True) -> "
      "(Tensor total, Tensor values)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "balance_loss_backward(Tensor? grad_total, Tensor? grad_values, Tensor sums, "
      "Tensor coefficients, Tensor? gate_sums, Tensor? expert_weights, int[] kinds, int top_k, "
      "int num_devices, bool unbiased) -> (Tensor grad_sums, Tensor grad_gate_sums)",
      {at::Tag::pt2_compliant_tag});
}

/// The arguments of the schema behind `sums`, in its order.
struct Parameters {
  Tensor coefficients;
  Names losses;
  int64_t top_k;
  OptionalTensor gate_sums;
  OptionalTensor expert_weights;
  int64_t num_devices;
  bool unbiased;
  std::string_view normalize;
  bool guard_dense;
};

using Results = std::tuple<Tensor, Tensor>;
using Signature = Results(const Tensor&, const Tensor&, Names, int64_t, const OptionalTensor&,
                          const OptionalTensor&, int64_t, bool, std::string_view, bool);

Results call_op(const Tensor& sums, const Parameters& p) {
  static const auto op = find_op<Signature>("balance_loss");
  return op.call(sums, p.coefficients, p.losses, p.top_k, p.gate_sums, p.expert_weights,
                 p.num_devices, p.unbiased, p.normalize, p.guard_dense);
}

/// The arguments of the backward's schema behind its two gradients, in its order.
struct BackwardParameters {
  Tensor sums;
  Tensor coefficients;
  OptionalTensor gate_sums;
  OptionalTensor expert_weights;
  at::IntArrayRef kinds;
  int64_t top_k;
  int64_t num_devices;
  bool unbiased;
};

using BackwardSignature = Results(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                  const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                  at::IntArrayRef, int64_t, int64_t, bool);

Results call_backward_op(const OptionalTensor& grad_total, const OptionalTensor& grad_values,
                         const BackwardParameters& p) {
  static const auto op = find_op<BackwardSignature>("balance_loss_backward");
  return op.call(grad_total, grad_values, p.sums, p.coefficients, p.gate_sums, p.expert_weights,
                 p.kinds, p.top_k, p.num_devices, p.unbiased);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

constexpr const char* kOp = "balance_loss";
constexpr int64_t kLeftOut = -1;  // a kind that gives 0 with zero gradient

constexpr int64_t number(BalanceLossKind kind) { return static_cast<int64_t>(kind); }

/// Of the losses that are functions of the sums, in the order of the documentation.
constexpr std::array<std::pair<std::string_view, BalanceLossKind>, 10> kLosses{{
    {"switch", BalanceLossKind::kSwitch},
    {"device", BalanceLossKind::kDevice},
    {"importance", BalanceLossKind::kImportance},
    {"importance_of_probs", BalanceLossKind::kImportanceOfProbs},
    {"z", BalanceLossKind::kZ},
    {"uniform_kl", BalanceLossKind::kUniformKl},
    {"entropy", BalanceLossKind::kEntropy},
    {"variance", BalanceLossKind::kVariance},
    {"mutual_information", BalanceLossKind::kMutualInformation},
    {"token_entropy", BalanceLossKind::kTokenEntropy},
}};

/// Losses that need more than the sums, and what computes them.
constexpr std::array<std::pair<std::string_view, std::string_view>, 6> kOtherLosses{{
    {"load", "load_loss"},
    {"communication", "communication_loss"},
    {"router_l2", "router_l2_loss"},
    {"similarity_correlation", "similarity_correlation"},
    {"infonce", "infonce"},
    {"mine", "mine"},
}};

int64_t kind_of(const std::string& name) {
  for (const auto& [known, kind] : kLosses) {
    if (name == known) return number(kind);
  }
  for (const auto& [known, function] : kOtherLosses) {
    TORCH_CHECK(name != known, kOp, ": '", name, "' is not a function of the sums, call ", function,
                " for it");
  }
  std::string all;
  for (const auto& [known, kind] : kLosses) all += (all.empty() ? "" : ", ") + std::string(known);
  TORCH_CHECK(false, kOp, ": losses must be among ", all, "; got '", name, "'");
}

int64_t num_experts_of(const Tensor& sums) { return (sums.size(-1) - RoutingSums::kTail) / 2; }

/// The numbers of the losses asked for; with K = E those that compare experts are left out, since
/// nothing is chosen.
Kinds kinds_of(const Tensor& sums, const Parameters& p) {
  const bool dense = p.guard_dense && p.top_k == num_experts_of(sums);
  Kinds kinds;
  for (const std::string& name : p.losses.vec()) {
    const auto kind = kind_of(name);
    const bool left_out = dense && !is_token_mean(BalanceLossKind{kind});
    if (left_out) {
      TORCH_WARN_ONCE(kOp, ": '", name, "' is left out because top_k equals num_experts (", p.top_k,
                      "): every expert gets every token, so there is nothing to balance.");
    }
    kinds.push_back(left_out ? kLeftOut : kind);
  }
  return kinds;
}

/// With Hugging Face's normalisation f adds up to K, as if K were 1.
int64_t top_k_of_share(const Parameters& p) { return p.normalize == "hf" ? 1 : p.top_k; }

void check_sums(const char* op, const Tensor& sums, const Tensor& coefficients, int64_t num_losses,
                const OptionalTensor& gate_sums, const OptionalTensor& expert_weights,
                int64_t num_devices) {
  const auto type = sums.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble, op,
              ": sums must be float32 or float64, got ", type);
  TORCH_CHECK((sums.dim() == 1 || sums.dim() == 2) && sums.size(-1) > RoutingSums::kTail &&
                  sums.size(-1) % 2 == 1,
              op, ": sums must have shape [2 E + 5] or [S, 2 E + 5], as topk_gating with stats ",
              "gives it, got ", sums.sym_sizes());
  check_dtype(op, "coefficients", coefficients, at::kFloat);
  check_device(op, "coefficients", coefficients, "sums", sums);
  check_sizes(op, "coefficients", coefficients, {num_losses}, "[number of losses]");
  const auto num_experts = num_experts_of(sums);
  if (gate_sums) {
    check_dtype(op, "gate_sums", *gate_sums, type);
    check_device(op, "gate_sums", *gate_sums, "sums", sums);
    check_sizes(op, "gate_sums", *gate_sums, {num_experts}, "[E]");
  }
  if (expert_weights) {
    check_dtype(op, "expert_weights", *expert_weights, type);
    check_device(op, "expert_weights", *expert_weights, "sums", sums);
    check_sizes(op, "expert_weights", *expert_weights, {num_experts}, "[E]");
  }
  TORCH_CHECK(num_devices >= 1 && num_experts % num_devices == 0, op,
              ": num_devices must divide num_experts = ", num_experts, ", got ", num_devices);
}

void check(const Tensor& sums, const Parameters& p) {
  check_sums(kOp, sums, p.coefficients, static_cast<int64_t>(p.losses.size()), p.gate_sums,
             p.expert_weights, p.num_devices);
  const auto num_experts = num_experts_of(sums);
  TORCH_CHECK(p.top_k >= 1 && p.top_k <= num_experts, kOp,
              ": top_k must be from 1 to num_experts = ", num_experts, ", got ", p.top_k);
  TORCH_CHECK(p.normalize == "none" || p.normalize == "hf", kOp,
              ": normalize must be 'none' or 'hf', got '", p.normalize, "'");
  for (const std::string& name : p.losses.vec()) {
    TORCH_CHECK(name != "importance" || p.gate_sums, kOp, ": 'importance' needs gate_sums");
  }
}

Results balance_loss_meta(const Tensor& sums, const Parameters& p) {
  check(sums, p);
  kinds_of(sums, p);
  return {at::empty({}, sums.options()),
          at::empty_symint({p.coefficients.sym_size(0)}, sums.options())};
}

/// As the kernels want them: contiguous, and with a dimension of segments.
BalanceLossArguments arguments(const Tensor& sums, const Tensor& coefficients,
                               const OptionalTensor& gate_sums,
                               const OptionalTensor& expert_weights, Kinds kinds, int64_t top_k,
                               int64_t num_devices, bool unbiased) {
  return {sums.dim() == 1 ? sums.unsqueeze(0).contiguous() : sums.contiguous(),
          coefficients.contiguous(),
          contiguous(gate_sums),
          contiguous(expert_weights),
          std::move(kinds),
          top_k,
          num_devices,
          unbiased};
}

template <auto backend>
Results balance_loss_run(const Tensor& sums, const Parameters& p) {
  check(sums, p);
  const Results results{at::empty({}, sums.options()),
                        at::empty({p.coefficients.size(0)}, sums.options())};
  backend(arguments(sums, p.coefficients, p.gate_sums, p.expert_weights, kinds_of(sums, p),
                    top_k_of_share(p), p.num_devices, p.unbiased),
          std::get<0>(results), std::get<1>(results));
  return results;
}

Results balance_loss_backward_meta(const OptionalTensor& grad_total,
                                   const OptionalTensor& grad_values, const BackwardParameters& p) {
  constexpr const char* op = "balance_loss_backward";
  const auto& sums = p.sums;
  check_sums(op, sums, p.coefficients, static_cast<int64_t>(p.kinds.size()), p.gate_sums,
             p.expert_weights, p.num_devices);
  if (grad_total) {
    check_dtype(op, "grad_total", *grad_total, sums.scalar_type());
    check_device(op, "grad_total", *grad_total, "sums", sums);
    check_sizes(op, "grad_total", *grad_total, {}, "[]");
  }
  if (grad_values) {
    check_dtype(op, "grad_values", *grad_values, sums.scalar_type());
    check_device(op, "grad_values", *grad_values, "sums", sums);
    check_sizes(op, "grad_values", *grad_values, p.coefficients.sym_sizes(), "[number of losses]");
  }
  return {at::empty_symint(sums.sym_sizes(), sums.options()),
          p.gate_sums ? at::empty_symint(p.gate_sums->sym_sizes(), sums.options())
                      : at::empty({0}, sums.options())};
}

template <auto backend>
Results balance_loss_backward_run(const OptionalTensor& grad_total,
                                  const OptionalTensor& grad_values, const BackwardParameters& p) {
  const auto results = balance_loss_backward_meta(grad_total, grad_values, p);
  backend(grad_total, contiguous(grad_values),
          arguments(p.sums, p.coefficients, p.gate_sums, p.expert_weights, p.kinds.vec(), p.top_k,
                    p.num_devices, p.unbiased),
          std::get<0>(results), std::get<1>(results));
  return results;
}

/// `run` as a kernel of the schema, which lists the parameters one by one.
template <auto run>
Results balance_loss_backward(const OptionalTensor& grad_total, const OptionalTensor& grad_values,
                              const Tensor& sums, const Tensor& coefficients,
                              const OptionalTensor& gate_sums, const OptionalTensor& expert_weights,
                              at::IntArrayRef kinds, int64_t top_k, int64_t num_devices,
                              bool unbiased) {
  return run(grad_total, grad_values,
             BackwardParameters{sums, coefficients, gate_sums, expert_weights, kinds, top_k,
                                num_devices, unbiased});
}

// ---- CPU ----------------------------------------------------------------------------------------

/// What balance_loss_terms.h calls `sum` and `each`.
struct SerialSum {
  template <typename F>
  double operator()(int64_t count, const F& f) const {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += f(i);
    return sum;
  }
};
struct SerialEach {
  template <typename F>
  void operator()(int64_t count, const F& f) const {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
};

/// Calls f(s, sums of segment s) for each segment.
template <typename T, typename F>
void for_each_segment(const BalanceLossArguments& a, const F& f) {
  auto segment = a.first_segment<T>();
  for (int64_t s = 0; s < a.sums.size(0); ++s) {
    f(s, segment);
    segment.sums += RoutingSums::width(segment.experts);
  }
}

void balance_loss_cpu(const BalanceLossArguments& a, const Tensor& total, const Tensor& values) {
  const float* coefficient = a.coefficients.const_data_ptr<float>();
  for (size_t l = 0; l < a.kinds.size(); ++l) {
    TORCH_CHECK(coefficient[l] >= 0 || a.kinds[l] == number(BalanceLossKind::kTokenEntropy), kOp,
                ": coefficients must be >= 0, except that of token_entropy, got ", coefficient[l]);
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    for (int64_t e = 0; a.expert_weights && e < a.num_experts(); ++e) {
      const T weight = a.expert_weights->const_data_ptr<T>()[e];
      TORCH_CHECK(weight >= 0 && std::isfinite(weight), kOp, ": expert_weights must be finite and ",
                  ">= 0 (target_shares in (0, inf)), got ", weight, " for expert ", e);
    }
    const auto totals = segment_totals(a.first_segment<T>(), a.sums.size(0), SerialSum{});
    double sum = 0;
    for (size_t l = 0; l < a.kinds.size(); ++l) {
      const BalanceLossKind kind{a.kinds[l]};
      double value = 0;
      for_each_segment<T>(a, [&](int64_t s, const SegmentSums<T>& segment) {
        const double part = part_of_loss(kind, s, segment, totals);
        if (part > 0) value += part * loss_value(kind, segment, SerialSum{});
      });
      values.mutable_data_ptr<T>()[l] = static_cast<T>(value);
      sum += coefficient[l] * value;
    }
    *total.mutable_data_ptr<T>() = static_cast<T>(sum);
  };
  a.sums.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
}

void balance_loss_backward_cpu(const OptionalTensor& grad_total, const OptionalTensor& grad_values,
                               const BalanceLossArguments& a, const Tensor& grad_sums,
                               const Tensor& grad_gate_sums) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    T* to = grad_sums.mutable_data_ptr<T>();
    T* to_gates = grad_gate_sums.mutable_data_ptr<T>();
    std::fill_n(to, grad_sums.numel(), zero);
    std::fill_n(to_gates, grad_gate_sums.numel(), zero);
    const auto totals = segment_totals(a.first_segment<T>(), a.sums.size(0), SerialSum{});
    for (size_t l = 0; l < a.kinds.size(); ++l) {
      const BalanceLossKind kind{a.kinds[l]};
      double grad = 0;
      if (grad_total) {
        grad += *grad_total->const_data_ptr<T>() *
                static_cast<double>(a.coefficients.const_data_ptr<float>()[l]);
      }
      if (grad_values) grad += grad_values->const_data_ptr<T>()[l];
      for_each_segment<T>(a, [&](int64_t s, const SegmentSums<T>& segment) {
        const double part = part_of_loss(kind, s, segment, totals);
        if (part == 0) return;
        add_loss_gradient(kind, segment, grad * part, SerialSum{}, SerialEach{},
                          to + s * RoutingSums::width(segment.experts), to_gates);
      });
    }
  };
  a.sums.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
}

// ---- autograd -----------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct BalanceLoss : torch::autograd::Function<BalanceLoss> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& sums,
                               const OptionalTensor& gate_sums, const Parameters& p) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [total, values] = call_op(sums, p);
    ctx->save_for_backward(
        {sums, p.coefficients, gate_sums.value_or(Tensor()), p.expert_weights.value_or(Tensor())});
    ctx->saved_data["kinds"] = kinds_of(sums, p);
    ctx->saved_data["top_k"] = top_k_of_share(p);
    ctx->saved_data["num_devices"] = p.num_devices;
    ctx->saved_data["unbiased"] = p.unbiased;
    ctx->set_materialize_grads(false);
    return {total, values};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined() && !grads[1].defined()) return {Tensor(), Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const auto kinds = ctx->saved_data["kinds"].toIntVector();
    const auto [grad_sums, grad_gate_sums] =
        call_backward_op(if_defined(grads[0]), if_defined(grads[1]),
                         {saved[0], saved[1], if_defined(saved[2]), if_defined(saved[3]), kinds,
                          ctx->saved_data["top_k"].toInt(), ctx->saved_data["num_devices"].toInt(),
                          ctx->saved_data["unbiased"].toBool()});
    return {grad_sums, saved[2].defined() ? grad_gate_sums : Tensor(), Tensor()};
  }
};

Results balance_loss_autograd(const Tensor& sums, const Parameters& p) {
  TORCH_CHECK(!p.coefficients.requires_grad(), kOp, ": coefficients must not require a gradient");
  TORCH_CHECK(!requires_grad(p.expert_weights), kOp,
              ": expert_weights must not require a gradient");
  auto results = BalanceLoss::apply(sums, p.gate_sums, p);
  return {results[0], results[1]};
}

/// The slopes of one loss in ATen calls, for each segment: by prob_sum [S, E] and by the scalar
/// behind it that kind names, or by the gate sums [E].
struct Composite {
  const BackwardParameters& p;
  int64_t num_experts;
  Tensor rows;        // [S, 2 E + 5]
  Tensor num_tokens;  // [S]
  Tensor inverse;     // [S, 1], 1 / W, 0 without tokens

  explicit Composite(const BackwardParameters& parameters)
      : p(parameters),
        num_experts(num_experts_of(p.sums)),
        rows(p.sums.dim() == 1 ? p.sums.unsqueeze(0) : p.sums),
        num_tokens(rows.detach().select(1, RoutingSums::weight(num_experts))),
        inverse(num_tokens.reciprocal().masked_fill(num_tokens <= 0, 0).unsqueeze(1)) {}

  Tensor prob_sum() const { return rows.narrow(1, RoutingSums::prob, num_experts); }
  Tensor prob() const { return prob_sum() * inverse; }
  Tensor clamped_prob() const {
    const bool wide = rows.scalar_type() == at::kDouble;
    return prob().clamp_min(wide ? std::numeric_limits<double>::min()
                                 : std::numeric_limits<float>::min());
  }
  /// E f_e.
  Tensor share() const {
    const auto load = rows.detach().narrow(1, RoutingSums::load(num_experts), num_experts);
    return load * inverse * num_experts / p.top_k;
  }
  /// d(variance / mean^2) / d(of_expert), along the last dimension.
  Tensor slope_of_importance(const Tensor& of_expert) const {
    const auto mean = of_expert.mean(-1, /*keepdim=*/true);
    const auto divisor = mean.masked_fill(mean == 0, 1);
    const auto apart = of_expert - mean;
    const auto degrees = static_cast<double>(p.unbiased ? num_experts - 1 : num_experts);
    const auto variance = apart.square().sum(-1, /*keepdim=*/true) / degrees;
    const auto slope =
        2 * apart / (degrees * divisor.square()) - 2 * variance / (num_experts * divisor.pow(3));
    return slope.masked_fill(mean == 0, 0);
  }
  /// By prob_sum, [S, E].
  Tensor slope(BalanceLossKind kind) const {
    switch (kind) {
      case BalanceLossKind::kSwitch:
        return (p.expert_weights ? share() * *p.expert_weights : share()) * inverse;
      case BalanceLossKind::kDevice:
        return share()
                   .unflatten(1, at::IntArrayRef{p.num_devices, num_experts / p.num_devices})
                   .mean(2)
                   .repeat_interleave(num_experts / p.num_devices, 1) *
               inverse;
      case BalanceLossKind::kImportanceOfProbs:
        return slope_of_importance(prob_sum());
      case BalanceLossKind::kUniformKl:
        return -inverse / (num_experts * clamped_prob());
      case BalanceLossKind::kEntropy:
      case BalanceLossKind::kMutualInformation:
        return ((num_experts * clamped_prob()).log() + 1) * inverse;
      case BalanceLossKind::kVariance:
        return 2 * (prob() - prob().mean(1, /*keepdim=*/true)) / (num_experts - 1) * inverse;
      default:
        return at::zeros_like(prob_sum());
    }
  }
};

/// The backward where it is to be differentiated itself.
Results balance_loss_backward_composite(const OptionalTensor& grad_total,
                                        const OptionalTensor& grad_values,
                                        const BackwardParameters& p) {
  const Composite c(p);
  const auto used = c.num_tokens > 0;
  const auto no_tail = at::zeros({c.rows.size(0), c.num_experts + RoutingSums::kTail},
                                 p.sums.options());  // load and the scalars
  auto grad_rows = at::zeros_like(c.rows);
  auto grad_gates = at::zeros({p.gate_sums ? c.num_experts : 0}, p.sums.options());
  for (size_t l = 0; l < p.kinds.size(); ++l) {
    const BalanceLossKind kind{p.kinds[l]};
    if (p.kinds[l] < 0 || (c.num_experts == 1 && !is_token_mean(kind))) continue;
    const auto index = static_cast<int64_t>(l);
    auto grad = at::zeros({}, p.sums.options());
    if (grad_total) grad = grad + *grad_total * p.coefficients.select(0, index);
    if (grad_values) grad = grad + grad_values->select(0, index);
    if (kind == BalanceLossKind::kImportance) {
      grad_gates = grad_gates + grad * c.slope_of_importance(*p.gate_sums);
      continue;
    }
    const auto counted = is_token_mean(kind) ? c.num_tokens : used.to(c.num_tokens.scalar_type());
    const auto part =
        (grad * counted / counted.sum()).masked_fill(~used, 0).unsqueeze(1);  // [S, 1]
    auto of_scalars = no_tail;
    if (is_token_mean(kind) || kind == BalanceLossKind::kMutualInformation) {
      const auto scalar = kind == BalanceLossKind::kZ ? RoutingSums::lse_squared(c.num_experts)
                                                      : RoutingSums::entropy(c.num_experts);
      of_scalars = no_tail.clone();
      of_scalars.select(1, scalar - c.num_experts).fill_(1);
      of_scalars = of_scalars * c.inverse;
    }
    grad_rows = grad_rows + part * at::cat({c.slope(kind), of_scalars}, 1);
  }
  return {grad_rows.view_symint(p.sums.sym_sizes()), grad_gates};
}

Results balance_loss_backward_autograd(const OptionalTensor& grad_total,
                                       const OptionalTensor& grad_values,
                                       const BackwardParameters& p) {
  if (differentiating(grad_total, grad_values, p.sums, p.gate_sums)) {
    return balance_loss_backward_composite(grad_total, grad_values, p);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward_op(grad_total, grad_values, p);
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) {
  m.impl("balance_loss", WithSchema<balance_loss_meta, Parameters, Signature>::call);
  m.impl("balance_loss_backward", balance_loss_backward<balance_loss_backward_meta>);
}
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl("balance_loss",
         WithSchema<balance_loss_run<balance_loss_cpu>, Parameters, Signature>::call);
  m.impl("balance_loss_backward",
         balance_loss_backward<balance_loss_backward_run<balance_loss_backward_cpu>>);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl("balance_loss",
         WithSchema<balance_loss_run<balance_loss_cuda>, Parameters, Signature>::call);
  m.impl("balance_loss_backward",
         balance_loss_backward<balance_loss_backward_run<balance_loss_backward_cuda>>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {
  m.impl("balance_loss", WithSchema<balance_loss_autograd, Parameters, Signature>::call);
  m.impl("balance_loss_backward", balance_loss_backward<balance_loss_backward_autograd>);
}

// ---- the public functions -----------------------------------------------------------------------

LossReport report(const RoutingResult& routing,
                  const std::vector<std::pair<std::string, double>>& losses,
                  const BalanceLossOptions& options, bool guard_dense) {
  TORCH_CHECK(routing.sums.defined(), kOp, ": routing must come from topk_gating with stats");
  TORCH_CHECK(options.scope() == "batch" || options.scope() == "sequence", kOp,
              ": scope must be 'batch' or 'sequence', got '", options.scope(), "'");
  TORCH_CHECK(options.importance_of() == "gates" || options.importance_of() == "probs", kOp,
              ": importance_of must be 'gates' or 'probs', got '", options.importance_of(), "'");
  const bool add_up = options.scope() == "batch" && routing.sums.dim() == 2;
  const auto sums = add_up ? routing.sums.sum(0) : routing.sums;
  LossReport result;
  Names names;
  std::vector<double> coefficients;
  OptionalTensor gate_sums;
  for (const auto& [name, coefficient] : losses) {
    TORCH_CHECK(coefficient >= 0 || name == "token_entropy", kOp, ": the coefficient of '", name,
                "' must be >= 0, got ", coefficient);
    const bool of_probs = name == "importance" && options.importance_of() == "probs";
    names.push_back(of_probs ? "importance_of_probs" : name);
    coefficients.push_back(coefficient);
    result.names.push_back(name);
    if (name == "importance" && !of_probs) {
      auto weights = routing.topk_weights;
      if (options.token_weights()) weights = weights * options.token_weights()->unsqueeze(-1);
      gate_sums = expert_bincount(routing.topk_indices, routing.num_experts(),
                                  weights.to(sums.scalar_type()));
    }
  }
  auto expert_weights = options.expert_weights();
  if (expert_weights) expert_weights = expert_weights->to(sums.scalar_type());
  const auto tensor = at::tensor(coefficients, sums.options().dtype(at::kFloat));
  std::tie(result.total, result.values) =
      call_op(sums, {tensor, names, routing.top_k(), gate_sums, expert_weights,
                     options.num_devices(), options.unbiased(), options.normalize(), guard_dense});
  return result;
}

/// The value of one loss, whatever K is.
Tensor value_of(const RoutingResult& routing, const std::string& name,
                const BalanceLossOptions& options = {}) {
  return report(routing, {{name, 1.0}}, options, /*guard_dense=*/false).total;
}

}  // namespace

LossReport balance_loss(const RoutingResult& routing,
                        const std::vector<std::pair<std::string, double>>& losses,
                        const BalanceLossOptions& options) {
  return report(routing, losses, options, /*guard_dense=*/true);
}

Tensor switch_loss(const RoutingResult& routing, const std::string& scope) {
  return value_of(routing, "switch", BalanceLossOptions().scope(scope));
}
Tensor device_loss(const RoutingResult& routing, int64_t num_devices) {
  return value_of(routing, "device", BalanceLossOptions().num_devices(num_devices));
}
Tensor importance_loss(const RoutingResult& routing, const std::string& of, bool unbiased) {
  return value_of(routing, "importance", BalanceLossOptions().importance_of(of).unbiased(unbiased));
}
Tensor z_loss(const RoutingResult& routing) { return value_of(routing, "z"); }
Tensor uniform_kl_loss(const RoutingResult& routing) { return value_of(routing, "uniform_kl"); }
Tensor entropy_loss(const RoutingResult& routing) { return value_of(routing, "entropy"); }
Tensor variance_loss(const RoutingResult& routing) { return value_of(routing, "variance"); }
Tensor mutual_information_loss(const RoutingResult& routing) {
  return value_of(routing, "mutual_information");
}
Tensor token_entropy_loss(const RoutingResult& routing) {
  return value_of(routing, "token_entropy");
}

}  // namespace equipoise
