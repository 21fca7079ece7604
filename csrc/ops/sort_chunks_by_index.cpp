// SPDX-License-Identifier: Apache-2.0
// sort_chunks_by_index: schema -> checks and shapes -> CPU -> autograd -> registration, top to
// bottom. The op makes the map of the rows; the rows are moved by moe_rows.cpp, as those of
// moe_permute with one slot each, and go back by moe_unpermute, which is the backward.
#include "sort_chunks_by_index.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../as_rows.h"
#include "../autograd.h"
#include "../checks.h"
#include "../library.h"
#include "moe_rows.h"
#include "moe_unpermute.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

namespace equipoise {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- schema -------------------------------------------------------------------------------------

constexpr const char* kOp = "sort_chunks_by_index";

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def(
      "sort_chunks_by_index(Tensor x, Tensor split_sizes, Tensor order, Tensor? probs=None) -> "
      "(Tensor sorted, Tensor sorted_probs, Tensor row_id_map)",
      {at::Tag::pt2_compliant_tag});
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

Results call_op(const Tensor& x, const Tensor& split_sizes, const Tensor& order,
                const OptionalTensor& probs) {
  static const auto op =
      find_op<Results(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&)>(kOp);
  return op.call(x, split_sizes, order, probs);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

void check_integers(const char* argument, const Tensor& tensor, const Tensor& x) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kLong || type == at::kInt, kOp, ": ", argument,
              " must be Long or Int, got ", type);
  TORCH_CHECK(tensor.dim() == 1, kOp, ": ", argument, " must have shape [C], got ",
              tensor.sym_sizes());
  check_device(kOp, argument, tensor, "x", x);
}

Results sort_chunks_by_index_meta(const Tensor& x, const Tensor& split_sizes, const Tensor& order,
                                  const OptionalTensor& probs) {
  check_movable(kOp, "x", x);
  TORCH_CHECK(x.dim() == 2, kOp, ": x must have shape [N, H], got ", x.sym_sizes());
  check_integers("split_sizes", split_sizes, x);
  check_integers("order", order, x);
  check_sizes(kOp, "order", order, split_sizes.sym_sizes(), "of split_sizes");
  if (probs) {
    check_floating(kOp, "probs", *probs);
    check_device(kOp, "probs", *probs, "x", x);
    check_sizes(kOp, "probs", *probs, {x.sym_size(0)}, "[N]");
  }
  return {at::empty_symint(x.sym_sizes(), x.options()),
          probs ? at::empty_symint(probs->sym_sizes(), probs->options())
                : at::empty({0}, x.options().dtype(accumulate_type(x.scalar_type()))),
          at::empty_symint({x.sym_size(0), 1}, x.options().dtype(at::kLong))};
}

template <auto make_map, auto scatter>
Results sort_chunks_by_index_run(const Tensor& x, const Tensor& split_sizes, const Tensor& order,
                                 const OptionalTensor& probs) {
  const auto results = sort_chunks_by_index_meta(x, split_sizes, order, probs);
  const auto& [sorted, sorted_probs, map] = results;
  make_map(split_sizes.to(at::kLong).contiguous(), order.to(at::kLong).contiguous(), map);
  if (sorted.numel() != 0) {
    scatter(as_rows(x), map, std::nullopt, sorted);
  }
  if (sorted_probs.numel() != 0) {
    scatter(probs->unsqueeze(1), map, std::nullopt, sorted_probs.unsqueeze(1));
  }
  return results;
}

// ---- CPU ----------------------------------------------------------------------------------------

void sort_chunks_map_cpu(const Tensor& split_sizes, const Tensor& order, const Tensor& row_id_map) {
  const int64_t num_chunks = order.numel(), num_rows = row_id_map.numel();
  const int64_t* size = split_sizes.const_data_ptr<int64_t>();
  const int64_t* chunk = order.const_data_ptr<int64_t>();
  int64_t* map = row_id_map.mutable_data_ptr<int64_t>();

  std::vector<int64_t> begin(num_chunks);  // of each chunk in x
  int64_t sum = 0;
  for (int64_t c = 0; c < num_chunks; ++c) {
    TORCH_CHECK(size[c] >= 0, kOp, ": split_sizes must be at least 0, got ", size[c]);
    // Larger ones could add up to N by overflow.
    TORCH_CHECK(size[c] <= num_rows - sum, kOp, ": split_sizes must have the sum N = ", num_rows,
                ", got more");
    begin[c] = sum;
    sum += size[c];
  }
  TORCH_CHECK(sum == num_rows, kOp, ": split_sizes must have the sum N = ", num_rows, ", got ",
              sum);
  std::vector<bool> placed(num_chunks);
  int64_t to = 0;
  for (int64_t i = 0; i < num_chunks; ++i) {
    const int64_t c = chunk[i];
    TORCH_CHECK(c >= 0 && c < num_chunks, kOp, ": order must be in [0, C = ", num_chunks, "), got ",
                c);
    TORCH_CHECK(!placed[c], kOp, ": order must name each chunk once, got ", c, " twice");
    placed[c] = true;
    for (int64_t row = begin[c]; row < begin[c] + size[c]; ++row) map[row] = to++;
  }
}

// ---- autograd -----------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Only results that have a gradient pass through; `results` receives all.
struct SortChunksByIndex : torch::autograd::Function<SortChunksByIndex> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& probs,
                               const Tensor& split_sizes, const Tensor& order, Results& results) {
    at::AutoDispatchBelowADInplaceOrView below;
    results = call_op(x, split_sizes, order, probs);
    const auto& [sorted, sorted_probs, map] = results;
    ctx->save_for_backward({map});
    ctx->set_materialize_grads(false);
    ctx->saved_data["of_x"] = requires_grad(x);
    variable_list outputs;
    if (requires_grad(x)) outputs.push_back(sorted);
    if (requires_grad(probs)) outputs.push_back(sorted_probs);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto map = ctx->get_saved_variables()[0];
    const bool of_x = ctx->saved_data["of_x"].toBool();
    Tensor grad_x, grad_probs;
    if (of_x && grads[0].defined()) grad_x = moe_unpermute(grads[0], map);
    if (const size_t i = of_x ? 1 : 0; i < grads.size() && grads[i].defined()) {
      grad_probs = moe_unpermute(grads[i].unsqueeze(1), map).squeeze(1);
    }
    return {grad_x, grad_probs, Tensor(), Tensor(), Tensor()};
  }
};

Results sort_chunks_by_index_autograd(const Tensor& x, const Tensor& split_sizes,
                                      const Tensor& order, const OptionalTensor& probs) {
  if (!differentiating(x, probs)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_op(x, split_sizes, order, probs);
  }
  check_has_gradient(kOp, "x", x);
  Results results;
  const auto outputs = SortChunksByIndex::apply(x, probs, split_sizes, order, results);
  if (requires_grad(x)) std::get<0>(results) = outputs.front();
  if (requires_grad(probs)) std::get<1>(results) = outputs.back();
  return results;
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) { m.impl(kOp, sort_chunks_by_index_meta); }
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl(kOp, sort_chunks_by_index_run<sort_chunks_map_cpu, moe_scatter_rows_cpu>);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl(kOp, sort_chunks_by_index_run<sort_chunks_map_cuda, moe_scatter_rows_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) { m.impl(kOp, sort_chunks_by_index_autograd); }

}  // namespace

SortedChunks sort_chunks_by_index(const Tensor& x, const Tensor& split_sizes, const Tensor& order,
                                  const OptionalTensor& probs) {
  auto [sorted, sorted_probs, map] = call_op(x, split_sizes, order, probs);
  return {sorted, sorted_probs, map};
}

}  // namespace equipoise
