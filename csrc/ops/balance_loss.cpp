// SPDX-License-Identifier: Apache-2.0
// balance_loss: schema -> checks and shapes -> CPU -> autograd -> registration, top to bottom.
// Everything here is of size E: the work of a loss on [T, E] is one term in topk_gating's backward,
// which the gradient of `sums` carries there. Only prob_sum, sum w lse^2 and sum w H have a
// gradient; load and W count as constants.
#include "balance_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "../autograd.h"
#include "../checks.h"
#include "../library.h"
#include "../optional_tensor.h"
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

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def(
      "balance_loss(Tensor sums, Tensor coefficients, str[] losses, int top_k, "
      "Tensor? gate_sums=None, Tensor? global_sums=None, str scope='batch', int num_devices=1, "
      "bool unbiased=False, str normalize='none', bool guard_dense=True) -> "
      "(Tensor total, Tensor values)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "balance_loss_backward(Tensor? grad_total, Tensor? grad_values, Tensor sums, "
      "Tensor coefficients, int[] kinds, int top_k) -> Tensor grad_sums",
      {at::Tag::pt2_compliant_tag});
}

/// The arguments of the schema behind `sums`, in its order.
struct Parameters {
  Tensor coefficients;
  Names losses;
  int64_t top_k;
  OptionalTensor gate_sums;
  OptionalTensor global_sums;
  std::string_view scope;
  int64_t num_devices;
  bool unbiased;
  std::string_view normalize;
  bool guard_dense;
};

using Results = std::tuple<Tensor, Tensor>;
using Signature = Results(const Tensor&, const Tensor&, Names, int64_t, const OptionalTensor&,
                          const OptionalTensor&, std::string_view, int64_t, bool, std::string_view,
                          bool);

Results call_op(const Tensor& sums, const Parameters& p) {
  static const auto op = find_op<Signature>("balance_loss");
  return op.call(sums, p.coefficients, p.losses, p.top_k, p.gate_sums, p.global_sums, p.scope,
                 p.num_devices, p.unbiased, p.normalize, p.guard_dense);
}

Tensor call_backward_op(const OptionalTensor& grad_total, const OptionalTensor& grad_values,
                        const Tensor& sums, const Tensor& coefficients, at::IntArrayRef kinds,
                        int64_t top_k) {
  static const auto op =
      find_op<Tensor(const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                     at::IntArrayRef, int64_t)>("balance_loss_backward");
  return op.call(grad_total, grad_values, sums, coefficients, kinds, top_k);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

constexpr const char* kOp = "balance_loss";
constexpr int64_t kLeftOut = -1;  // a kind that gives 0 with zero gradient

int64_t num_experts_of(const Tensor& sums) { return (sums.size(-1) - RoutingSums::kTail) / 2; }

/// The numbers of the losses asked for; with K = E those that compare experts are left out, since
/// nothing is chosen.
Kinds kinds_of(const Tensor& sums, const Parameters& p) {
  const bool dense = p.guard_dense && p.top_k == num_experts_of(sums);
  Kinds kinds;
  for (const std::string& name : p.losses.vec()) {
    if (name == "z") {
      kinds.push_back(static_cast<int64_t>(BalanceLossKind::kZ));
    } else {
      TORCH_CHECK(name == "switch", kOp,
                  ": losses must be among 'switch' and 'z' in this version, got '", name, "'");
      if (dense) {
        TORCH_WARN_ONCE(kOp, ": '", name, "' is left out because top_k equals num_experts (",
                        p.top_k,
                        "): every expert gets every token, so there is nothing to balance.");
      }
      kinds.push_back(dense ? kLeftOut : static_cast<int64_t>(BalanceLossKind::kSwitch));
    }
  }
  return kinds;
}

void check_sums(const char* op, const Tensor& sums, const Tensor& coefficients,
                int64_t num_losses) {
  TORCH_CHECK(sums.scalar_type() == at::kFloat || sums.scalar_type() == at::kDouble, op,
              ": sums must be float32 or float64, got ", sums.scalar_type());
  TORCH_CHECK(sums.dim() == 1 && sums.size(0) > RoutingSums::kTail && sums.size(0) % 2 == 1, op,
              ": sums must have shape [2 E + 5], as topk_gating with stats gives it, got ",
              sums.sym_sizes());
  check_dtype(op, "coefficients", coefficients, at::kFloat);
  check_device(op, "coefficients", coefficients, "sums", sums);
  check_sizes(op, "coefficients", coefficients, {num_losses}, "[number of losses]");
}

void check(const Tensor& sums, const Parameters& p) {
  check_sums(kOp, sums, p.coefficients, static_cast<int64_t>(p.losses.size()));
  const auto num_experts = num_experts_of(sums);
  TORCH_CHECK(p.top_k >= 1 && p.top_k <= num_experts, kOp,
              ": top_k must be from 1 to num_experts = ", num_experts, ", got ", p.top_k);
  TORCH_CHECK(!p.gate_sums && !p.global_sums, kOp,
              ": gate_sums and global_sums are not accepted in this version");
  TORCH_CHECK(p.scope == "batch", kOp, ": scope must be 'batch' in this version, got '", p.scope,
              "'");
  TORCH_CHECK(p.num_devices == 1, kOp, ": num_devices must be 1 in this version, got ",
              p.num_devices);
  TORCH_CHECK(p.normalize == "none", kOp, ": normalize must be 'none' in this version, got '",
              p.normalize, "'");
}

Results balance_loss_meta(const Tensor& sums, const Parameters& p) {
  check(sums, p);
  kinds_of(sums, p);
  return {at::empty({}, sums.options()),
          at::empty_symint({p.coefficients.sym_size(0)}, sums.options())};
}

template <auto backend>
Results balance_loss_run(const Tensor& sums, const Parameters& p) {
  check(sums, p);
  const Results results{at::empty({}, sums.options()),
                        at::empty({p.coefficients.size(0)}, sums.options())};
  backend(sums.contiguous(), p.coefficients.contiguous(), kinds_of(sums, p), p.top_k,
          std::get<0>(results), std::get<1>(results));
  return results;
}

Tensor balance_loss_backward_meta(const OptionalTensor& grad_total,
                                  const OptionalTensor& grad_values, const Tensor& sums,
                                  const Tensor& coefficients, at::IntArrayRef kinds, int64_t) {
  constexpr const char* op = "balance_loss_backward";
  check_sums(op, sums, coefficients, static_cast<int64_t>(kinds.size()));
  if (grad_total) {
    check_dtype(op, "grad_total", *grad_total, sums.scalar_type());
    check_device(op, "grad_total", *grad_total, "sums", sums);
    check_sizes(op, "grad_total", *grad_total, {}, "[]");
  }
  if (grad_values) {
    check_dtype(op, "grad_values", *grad_values, sums.scalar_type());
    check_device(op, "grad_values", *grad_values, "sums", sums);
    check_sizes(op, "grad_values", *grad_values, coefficients.sym_sizes(), "[number of losses]");
  }
  return at::empty_symint(sums.sym_sizes(), sums.options());
}

template <auto backend>
Tensor balance_loss_backward_run(const OptionalTensor& grad_total,
                                 const OptionalTensor& grad_values, const Tensor& sums,
                                 const Tensor& coefficients, at::IntArrayRef kinds, int64_t top_k) {
  auto grad_sums =
      balance_loss_backward_meta(grad_total, grad_values, sums, coefficients, kinds, top_k);
  backend(grad_total, contiguous(grad_values), sums.contiguous(), coefficients.contiguous(),
          kinds.vec(), top_k, grad_sums);
  return grad_sums;
}

// ---- CPU ----------------------------------------------------------------------------------------

void balance_loss_cpu(const Tensor& sums, const Tensor& coefficients, const Kinds& kinds,
                      int64_t top_k, const Tensor& total, const Tensor& values) {
  const float* coefficient = coefficients.const_data_ptr<float>();
  for (size_t l = 0; l < kinds.size(); ++l) {
    TORCH_CHECK(coefficient[l] >= 0, kOp, ": coefficients must be >= 0, got ", coefficient[l]);
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const int64_t num_experts = num_experts_of(sums);
    const T* s = sums.const_data_ptr<T>();
    const double weight = s[RoutingSums::weight(num_experts)];
    double sum = 0;
    for (size_t l = 0; l < kinds.size(); ++l) {
      double value = 0;
      if (weight > 0 && kinds[l] == static_cast<int64_t>(BalanceLossKind::kZ)) {
        value = s[RoutingSums::lse_squared(num_experts)] / weight;
      } else if (weight > 0 && num_experts > 1 &&
                 kinds[l] == static_cast<int64_t>(BalanceLossKind::kSwitch)) {
        for (int64_t e = 0; e < num_experts; ++e) {
          value +=
              static_cast<double>(s[RoutingSums::load(num_experts) + e]) * s[RoutingSums::prob + e];
        }
        value *= num_experts / (top_k * weight * weight);
      }
      values.mutable_data_ptr<T>()[l] = static_cast<T>(value);
      sum += coefficient[l] * value;
    }
    *total.mutable_data_ptr<T>() = static_cast<T>(sum);
  };
  sums.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
}

void balance_loss_backward_cpu(const OptionalTensor& grad_total, const OptionalTensor& grad_values,
                               const Tensor& sums, const Tensor& coefficients, const Kinds& kinds,
                               int64_t top_k, const Tensor& grad_sums) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const int64_t num_experts = num_experts_of(sums);
    const T* s = sums.const_data_ptr<T>();
    const double weight = s[RoutingSums::weight(num_experts)];
    T* grad = grad_sums.mutable_data_ptr<T>();
    for (int64_t i = 0; i < sums.numel(); ++i) grad[i] = 0;
    if (!(weight > 0)) return;
    for (size_t l = 0; l < kinds.size(); ++l) {
      double g = 0;
      if (grad_total)
        g += *grad_total->const_data_ptr<T>() *
             static_cast<double>(coefficients.const_data_ptr<float>()[l]);
      if (grad_values) g += grad_values->const_data_ptr<T>()[l];
      if (kinds[l] == static_cast<int64_t>(BalanceLossKind::kZ)) {
        grad[RoutingSums::lse_squared(num_experts)] += static_cast<T>(g / weight);
      } else if (num_experts > 1 && kinds[l] == static_cast<int64_t>(BalanceLossKind::kSwitch)) {
        const double scale = g * num_experts / (top_k * weight * weight);
        for (int64_t e = 0; e < num_experts; ++e) {
          grad[RoutingSums::prob + e] +=
              static_cast<T>(scale * s[RoutingSums::load(num_experts) + e]);
        }
      }
    }
  };
  sums.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
}

// ---- autograd -----------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct BalanceLoss : torch::autograd::Function<BalanceLoss> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& sums, const Parameters& p) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [total, values] = call_op(sums, p);
    ctx->save_for_backward({sums, p.coefficients});
    ctx->saved_data["kinds"] = kinds_of(sums, p);
    ctx->saved_data["top_k"] = p.top_k;
    ctx->set_materialize_grads(false);
    return {total, values};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined() && !grads[1].defined()) return {Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    return {
        call_backward_op(if_defined(grads[0]), if_defined(grads[1]), saved[0], saved[1],
                         ctx->saved_data["kinds"].toIntVector(), ctx->saved_data["top_k"].toInt()),
        Tensor()};
  }
};

Results balance_loss_autograd(const Tensor& sums, const Parameters& p) {
  TORCH_CHECK(!p.coefficients.requires_grad(), kOp, ": coefficients must not require a gradient");
  auto results = BalanceLoss::apply(sums, p);
  return {results[0], results[1]};
}

/// The backward in ATen calls: linear in the two gradients, with f and W constant.
Tensor balance_loss_backward_composite(const OptionalTensor& grad_total,
                                       const OptionalTensor& grad_values, const Tensor& sums,
                                       const Tensor& coefficients, at::IntArrayRef kinds,
                                       int64_t top_k) {
  const int64_t num_experts = num_experts_of(sums);
  const auto constant = sums.detach();
  const auto weight = constant.select(0, RoutingSums::weight(num_experts));
  const auto inverse = weight.reciprocal().masked_fill(weight <= 0, 0);
  auto grad = at::zeros({sums.size(0)}, sums.options());
  for (size_t l = 0; l < kinds.size(); ++l) {
    const auto index = static_cast<int64_t>(l);
    auto g = at::zeros({}, sums.options());
    if (grad_total) g = g + *grad_total * coefficients.select(0, index);
    if (grad_values) g = g + grad_values->select(0, index);
    auto slope = at::zeros({sums.size(0)}, sums.options());
    if (kinds[l] == static_cast<int64_t>(BalanceLossKind::kZ)) {
      slope.select(0, RoutingSums::lse_squared(num_experts)).copy_(inverse);
    } else if (num_experts > 1 && kinds[l] == static_cast<int64_t>(BalanceLossKind::kSwitch)) {
      const auto load = constant.narrow(0, RoutingSums::load(num_experts), num_experts);
      slope.narrow(0, RoutingSums::prob, num_experts)
          .copy_(load * inverse * inverse * num_experts / top_k);
    }
    grad = grad + g * slope;
  }
  return grad;
}

Tensor balance_loss_backward_autograd(const OptionalTensor& grad_total,
                                      const OptionalTensor& grad_values, const Tensor& sums,
                                      const Tensor& coefficients, at::IntArrayRef kinds,
                                      int64_t top_k) {
  if (differentiating(grad_total, grad_values)) {
    return balance_loss_backward_composite(grad_total, grad_values, sums, coefficients, kinds,
                                           top_k);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward_op(grad_total, grad_values, sums, coefficients, kinds, top_k);
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) {
  m.impl("balance_loss", WithSchema<balance_loss_meta, Parameters, Signature>::call);
  m.impl("balance_loss_backward", balance_loss_backward_meta);
}
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl("balance_loss",
         WithSchema<balance_loss_run<balance_loss_cpu>, Parameters, Signature>::call);
  m.impl("balance_loss_backward", balance_loss_backward_run<balance_loss_backward_cpu>);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl("balance_loss",
         WithSchema<balance_loss_run<balance_loss_cuda>, Parameters, Signature>::call);
  m.impl("balance_loss_backward", balance_loss_backward_run<balance_loss_backward_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {
  m.impl("balance_loss", WithSchema<balance_loss_autograd, Parameters, Signature>::call);
  m.impl("balance_loss_backward", balance_loss_backward_autograd);
}

// ---- the public functions -----------------------------------------------------------------------

LossReport report(const RoutingResult& routing,
                  const std::vector<std::pair<std::string, double>>& losses, bool guard_dense) {
  TORCH_CHECK(routing.sums.defined(), kOp, ": routing must come from topk_gating with stats");
  const auto sums = routing.sums.dim() == 2 ? routing.sums.sum(0) : routing.sums;  // of segments
  LossReport result;
  Names names;
  std::vector<double> coefficients;
  for (const auto& [name, coefficient] : losses) {
    TORCH_CHECK(coefficient >= 0, kOp, ": the coefficient of '", name, "' must be >= 0, got ",
                coefficient);
    names.push_back(name);
    coefficients.push_back(coefficient);
    result.names.push_back(name);
  }
  const auto tensor = at::tensor(coefficients, sums.options().dtype(at::kFloat));
  std::tie(result.total, result.values) =
      call_op(sums, {tensor, names, routing.top_k(), std::nullopt, std::nullopt, "batch", 1, false,
                     "none", guard_dense});
  return result;
}

}  // namespace

LossReport balance_loss(const RoutingResult& routing,
                        const std::vector<std::pair<std::string, double>>& losses) {
  return report(routing, losses, /*guard_dense=*/true);
}

Tensor switch_loss(const RoutingResult& routing) {
  return report(routing, {{"switch", 1.0}}, false).total;
}

Tensor z_loss(const RoutingResult& routing) { return report(routing, {{"z", 1.0}}, false).total; }

}  // namespace equipoise
