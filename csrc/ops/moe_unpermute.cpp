// SPDX-License-Identifier: Apache-2.0
// moe_unpermute: schema -> checks and shapes -> autograd -> registration, top to bottom.
// The rows are moved by moe_rows.cpp on the CPU and by ../../cuda/moe_rows.cu on CUDA.
#include "moe_unpermute.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../as_rows.h"
#include "../autograd.h"
#include "../checks.h"
#include "../library.h"
#include "../optional_tensor.h"
#include "moe_rows.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

namespace equipoise {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- schema -------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def("moe_unpermute(Tensor permuted, Tensor row_id_map, Tensor? topk_weights=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "moe_unpermute_backward(Tensor grad, Tensor? permuted, Tensor row_id_map, "
      "Tensor? topk_weights, SymInt num_rows) -> (Tensor grad_permuted, Tensor grad_topk_weights)",
      {at::Tag::pt2_compliant_tag});
}

Tensor call_op(const Tensor& permuted, const Tensor& row_id_map,
               const OptionalTensor& topk_weights) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>("moe_unpermute");
  return op.call(permuted, row_id_map, topk_weights);
}

using Gradients = std::tuple<Tensor, Tensor>;

/// `permuted` is needed for the gradient of the weights only.
Gradients call_backward_op(const Tensor& grad, const OptionalTensor& permuted,
                           const Tensor& row_id_map, const OptionalTensor& topk_weights,
                           c10::SymInt num_rows) {
  static const auto op =
      find_op<Gradients(const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                        c10::SymInt)>("moe_unpermute_backward");
  return op.call(grad, permuted, row_id_map, topk_weights, num_rows);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

/// `rows` is named `name` in messages: the permuted rows, or the gradient of the output.
void check(const char* op, const char* name, const Tensor& rows, const Tensor& row_id_map,
           const OptionalTensor& topk_weights) {
  check_floating(op, name, rows);
  TORCH_CHECK(rows.dim() == 2, op, ": ", name, " must have two dimensions, the last one H, got ",
              rows.sym_sizes());
  check_dtype(op, "row_id_map", row_id_map, at::kLong);
  check_device(op, "row_id_map", row_id_map, name, rows);
  TORCH_CHECK(row_id_map.dim() == 2, op, ": row_id_map must have shape [T, K], got ",
              row_id_map.sym_sizes());
  if (topk_weights) {
    const auto type = topk_weights->scalar_type(), compute = accumulate_type(rows.scalar_type());
    TORCH_CHECK(type == compute || type == rows.scalar_type(), op, ": topk_weights must be ",
                compute, " or the dtype of ", name, " (", rows.scalar_type(), "), got ", type);
    check_device(op, "topk_weights", *topk_weights, name, rows);
    check_sizes(op, "topk_weights", *topk_weights, row_id_map.sym_sizes(), "[T, K]");
  }
}

/// Values can be looked at on the CPU only; on CUDA a row outside the buffer is skipped.
void check_rows(const char* op, const Tensor& row_id_map, int64_t num_rows) {
  if (!row_id_map.is_cpu()) return;
  const auto map = row_id_map.contiguous();
  const int64_t *begin = map.const_data_ptr<int64_t>(), *end = begin + map.numel();
  // First whether, then which: the signs of row + 1 and N - 1 - row need no comparison, and a loop
  // without an exit takes several rows at once.
  const auto rows = static_cast<uint64_t>(num_rows);
  uint64_t signs = 0;
  for (const int64_t* row = begin; row < end; ++row) {
    signs |= (static_cast<uint64_t>(*row) + 1) | (rows - 1 - static_cast<uint64_t>(*row));
  }
  TORCH_CHECK(static_cast<int64_t>(signs) >= 0, op, ": row_id_map must be in [-1, N = ", num_rows,
              "), got ",
              *std::find_if(begin, end, [&](int64_t row) { return row < -1 || row >= num_rows; }));
}

Tensor moe_unpermute_meta(const Tensor& permuted, const Tensor& row_id_map,
                          const OptionalTensor& topk_weights) {
  check("moe_unpermute", "permuted", permuted, row_id_map, topk_weights);
  return at::empty_symint({row_id_map.sym_size(0), permuted.sym_size(1)}, permuted.options());
}

template <auto gather>
Tensor moe_unpermute_run(const Tensor& permuted, const Tensor& row_id_map,
                         const OptionalTensor& topk_weights) {
  auto out = moe_unpermute_meta(permuted, row_id_map, topk_weights);
  check_rows("moe_unpermute", row_id_map, permuted.size(0));
  if (out.numel() != 0) {
    gather(as_rows(permuted), row_id_map.contiguous(), contiguous(topk_weights), out);
  }
  return out;
}

Gradients moe_unpermute_backward_meta(const Tensor& grad, const OptionalTensor& permuted,
                                      const Tensor& row_id_map, const OptionalTensor& topk_weights,
                                      c10::SymInt num_rows) {
  constexpr const char* op = "moe_unpermute_backward";
  check(op, "grad", grad, row_id_map, topk_weights);
  check_sizes(op, "grad", grad, {row_id_map.sym_size(0), grad.sym_size(1)}, "[T, H]");
  TORCH_CHECK(!permuted || topk_weights, op, ": permuted is wanted with topk_weights only");
  if (permuted) {
    check_dtype(op, "permuted", *permuted, grad.scalar_type());
    check_device(op, "permuted", *permuted, "grad", grad);
    check_sizes(op, "permuted", *permuted, {num_rows, grad.sym_size(1)}, "[N, H]");
  }
  return {at::empty_symint({num_rows, grad.sym_size(1)}, grad.options()),
          permuted ? at::empty_symint(row_id_map.sym_sizes(), topk_weights->options())
                   : at::empty({0}, grad.options())};
}

template <auto scatter, auto gather_backward>
Gradients moe_unpermute_backward_run(const Tensor& grad_in, const OptionalTensor& permuted,
                                     const Tensor& row_id_map, const OptionalTensor& topk_weights,
                                     c10::SymInt num_rows) {
  const auto results =
      moe_unpermute_backward_meta(grad_in, permuted, row_id_map, topk_weights, num_rows);
  const auto& [grad_permuted, grad_weights] = results;
  check_rows("moe_unpermute_backward", row_id_map, grad_permuted.size(0));
  const auto grad = as_rows(grad_in), map = row_id_map.contiguous();
  if (permuted) {
    gather_backward(grad, as_rows(*permuted), map, topk_weights->contiguous(), grad_permuted,
                    grad_weights);
  } else if (grad_permuted.numel() != 0) {
    scatter(grad, map, contiguous(topk_weights), grad_permuted);
  }
  return results;
}

// ---- autograd -----------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct MoeUnpermute : torch::autograd::Function<MoeUnpermute> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& permuted, const Tensor& row_id_map,
                        const OptionalTensor& topk_weights) {
    at::AutoDispatchBelowADInplaceOrView below;
    const bool weights_have_gradient = topk_weights && topk_weights->requires_grad();
    ctx->save_for_backward({weights_have_gradient ? permuted : Tensor(), row_id_map,
                            topk_weights ? *topk_weights : Tensor()});
    ctx->saved_data["num_rows"] = permuted.sym_size(0);
    return call_op(permuted, row_id_map, topk_weights);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto permuted = if_defined(saved[0]);
    auto [grad_permuted, grad_weights] = call_backward_op(
        grads[0], permuted, saved[1], if_defined(saved[2]), ctx->saved_data["num_rows"].toSymInt());
    return {grad_permuted, Tensor(), permuted ? grad_weights : Tensor()};
  }
};

Tensor moe_unpermute_autograd(const Tensor& permuted, const Tensor& row_id_map,
                              const OptionalTensor& topk_weights) {
  return MoeUnpermute::apply(permuted, row_id_map, topk_weights);
}

/// The backward in ATen calls, differentiable to any order.
Gradients moe_unpermute_backward_composite(const Tensor& grad, const OptionalTensor& permuted,
                                           const Tensor& row_id_map,
                                           const OptionalTensor& topk_weights,
                                           c10::SymInt num_rows) {
  const auto compute = accumulate_type(grad.scalar_type());
  const auto tokens = row_id_map.sym_size(0), top_k = row_id_map.sym_size(1),
             width = grad.sym_size(1);
  const auto empty_slot = (row_id_map < 0).unsqueeze(-1);
  const auto rows = row_id_map.clamp_min(0).reshape_symint({tokens * top_k});
  auto contribution = grad.to(compute).unsqueeze(1).expand_symint({tokens, top_k, width});
  if (topk_weights) contribution = contribution * topk_weights->to(compute).unsqueeze(-1);
  contribution = contribution.masked_fill(empty_slot, 0);
  const auto grad_permuted =
      at::zeros_symint({num_rows, width}, grad.options().dtype(compute))
          .index_add(0, rows, contribution.reshape_symint({tokens * top_k, width}))
          .to(grad.scalar_type());
  if (!permuted) return {grad_permuted, at::empty({0}, grad.options())};
  const auto gathered =
      permuted->to(compute).index_select(0, rows).reshape_symint({tokens, top_k, width});
  const auto grad_weights =
      (grad.to(compute).unsqueeze(1) * gathered.masked_fill(empty_slot, 0)).sum(-1);
  return {grad_permuted, grad_weights.to(topk_weights->scalar_type())};
}

Gradients moe_unpermute_backward_autograd(const Tensor& grad, const OptionalTensor& permuted,
                                          const Tensor& row_id_map,
                                          const OptionalTensor& topk_weights,
                                          c10::SymInt num_rows) {
  if (differentiating(grad, permuted, topk_weights)) {
    return moe_unpermute_backward_composite(grad, permuted, row_id_map, topk_weights, num_rows);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward_op(grad, permuted, row_id_map, topk_weights, num_rows);
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) {
  m.impl("moe_unpermute", moe_unpermute_meta);
  m.impl("moe_unpermute_backward", moe_unpermute_backward_meta);
}
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl("moe_unpermute", moe_unpermute_run<moe_gather_rows_cpu>);
  m.impl("moe_unpermute_backward",
         moe_unpermute_backward_run<moe_scatter_rows_cpu, moe_gather_rows_backward_cpu>);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl("moe_unpermute", moe_unpermute_run<moe_gather_rows_cuda>);
  m.impl("moe_unpermute_backward",
         moe_unpermute_backward_run<moe_scatter_rows_cuda, moe_gather_rows_backward_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {
  m.impl("moe_unpermute", moe_unpermute_autograd);
  m.impl("moe_unpermute_backward", moe_unpermute_backward_autograd);
}

}  // namespace

Tensor moe_unpermute(const Tensor& permuted, const Tensor& row_id_map,
                     const OptionalTensor& topk_weights) {
  return call_op(permuted, row_id_map, topk_weights);
}

}  // namespace equipoise
