// SPDX-License-Identifier: Apache-2.0
// moe_permute: schema -> checks and shapes -> CPU -> autograd -> registration, top to bottom.
// The order of the rows is a stable counting sort of the slots; the rows are moved by moe_rows.cpp.
// Its backward is the op moe_unpermute: the row of slot (t, k) goes back to token t, its weight
// back to (t, k).
#include "moe_permute.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

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

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def(
      "moe_permute(Tensor x, Tensor? topk_indices, SymInt num_experts, Tensor? topk_weights=None, "
      "Tensor? tokens_per_expert=None, Tensor? routing_map=None, SymInt? capacity=None, "
      "str drop_policy='position', bool pad_to_capacity=False, int align=1, int? seed=None, "
      "SymInt? output_rows=None) -> (Tensor permuted, Tensor permuted_weights, Tensor row_id_map, "
      "Tensor tokens_per_expert, Tensor expert_offsets, Tensor kept_per_expert, Tensor overflow)",
      {at::Tag::pt2_compliant_tag});
}

/// The arguments of the schema behind `x`, in its order.
struct Parameters {
  OptionalTensor topk_indices;
  c10::SymInt num_experts;
  OptionalTensor topk_weights;
  OptionalTensor tokens_per_expert;
  OptionalTensor routing_map;
  std::optional<c10::SymInt> capacity;
  std::string_view drop_policy;
  bool pad_to_capacity;
  int64_t align;
  std::optional<int64_t> seed;
  std::optional<c10::SymInt> output_rows;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Signature = Results(const Tensor&, const OptionalTensor&, c10::SymInt, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor&, std::optional<c10::SymInt>,
                          std::string_view, bool, int64_t, std::optional<int64_t>,
                          std::optional<c10::SymInt>);

Results call_op(const Tensor& x, const Parameters& p) {
  static const auto op = find_op<Signature>("moe_permute");
  return op.call(x, p.topk_indices, p.num_experts, p.topk_weights, p.tokens_per_expert,
                 p.routing_map, p.capacity, p.drop_policy, p.pad_to_capacity, p.align, p.seed,
                 p.output_rows);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

constexpr const char* kOp = "moe_permute";

void check(const Tensor& x, const Parameters& p) {
  check_floating(kOp, "x", x);
  TORCH_CHECK(x.dim() == 2, kOp, ": x must have shape [T, H], got ", x.sym_sizes());
  TORCH_CHECK(p.num_experts >= 1, kOp, ": num_experts must be at least 1, got ", p.num_experts);
  TORCH_CHECK(!p.routing_map, kOp,
              ": routing_map is not accepted in this version; pass topk_indices");
  TORCH_CHECK(p.topk_indices, kOp, ": topk_indices must be given");
  const auto& indices = *p.topk_indices;
  check_dtype(kOp, "topk_indices", indices, at::kLong);
  check_device(kOp, "topk_indices", indices, "x", x);
  TORCH_CHECK(indices.dim() == 2 && indices.sym_size(0) == x.sym_size(0), kOp,
              ": topk_indices must have shape [T, K] with T = ", x.sym_size(0), ", got ",
              indices.sym_sizes());
  if (p.topk_weights) {
    check_floating(kOp, "topk_weights", *p.topk_weights);
    check_device(kOp, "topk_weights", *p.topk_weights, "x", x);
    check_sizes(kOp, "topk_weights", *p.topk_weights, indices.sym_sizes(), "[T, K]");
  }
  if (p.tokens_per_expert) {
    check_dtype(kOp, "tokens_per_expert", *p.tokens_per_expert, at::kLong);
    check_device(kOp, "tokens_per_expert", *p.tokens_per_expert, "x", x);
    check_sizes(kOp, "tokens_per_expert", *p.tokens_per_expert, {p.num_experts}, "[E]");
  }
  TORCH_CHECK(!p.capacity && !p.pad_to_capacity, kOp, ": capacity is not accepted in this version");
  TORCH_CHECK(p.drop_policy == "position" && !p.seed, kOp,
              ": drop_policy must be 'position' in this version, got '", p.drop_policy, "'");
  TORCH_CHECK(p.align == 1, kOp, ": align must be 1 in this version, got ", p.align);
  TORCH_CHECK(!p.output_rows, kOp, ": output_rows is not accepted in this version");
}

Results moe_permute_meta(const Tensor& x, const Parameters& p) {
  check(x, p);
  const auto integer = x.options().dtype(at::kLong);
  const auto num_rows = p.topk_indices->sym_numel();
  const auto weights = p.topk_weights
                           ? at::empty_symint({num_rows}, p.topk_weights->options())
                           : at::empty({0}, x.options().dtype(accumulate_type(x.scalar_type())));
  return {at::empty_symint({num_rows, x.sym_size(1)}, x.options()),
          weights,
          at::empty_symint(p.topk_indices->sym_sizes(), integer),
          at::empty_symint({p.num_experts}, integer),
          at::empty_symint({p.num_experts + 1}, integer),
          at::empty_symint({p.num_experts}, integer),
          at::empty({}, integer)};
}

/// A [T, K] tensor as T K tokens of one element with one slot each: how weights travel with the
/// rows.
Tensor as_column(const Tensor& slots) { return slots.reshape({slots.numel(), 1}); }

template <auto index, auto scatter>
Results moe_permute_run(const Tensor& x, const Parameters& p) {
  const auto results = moe_permute_meta(x, p);
  const auto& [permuted, weights, map, counts, offsets, kept, overflow] = results;
  const auto indices = p.topk_indices->contiguous();
  index(indices, p.tokens_per_expert, map, counts, offsets);
  if (permuted.numel() != 0) {
    scatter(x.size(1) == 1 || x.stride(1) == 1 ? x : x.contiguous(), map, std::nullopt, permuted);
  }
  if (p.topk_weights && weights.numel() != 0) {
    scatter(as_column(p.topk_weights->contiguous()), as_column(map), std::nullopt,
            as_column(weights));
  }
  kept.copy_(counts);
  overflow.zero_();
  return results;
}

// ---- CPU ----------------------------------------------------------------------------------------

constexpr int64_t kBlockSlots =
    8192;  // a block counts its slots, then places them behind the blocks before it

void moe_permute_index_cpu(const Tensor& indices, const OptionalTensor& tokens_per_expert,
                           const Tensor& row_id_map, const Tensor& counts, const Tensor& offsets) {
  const int64_t num_slots = indices.numel(), num_experts = counts.numel();
  const int64_t num_blocks = (num_slots + kBlockSlots - 1) / kBlockSlots;
  const int64_t* expert = indices.const_data_ptr<int64_t>();
  int64_t* map = row_id_map.mutable_data_ptr<int64_t>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  const auto given = tokens_per_expert ? tokens_per_expert->contiguous() : counts;

  std::vector<int64_t> tables(num_blocks *
                              num_experts);  // counts of each block, then its next free row
  std::atomic<int64_t> bad{-1};
  at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      int64_t* table = tables.data() + block * num_experts;
      for (int64_t slot = block * kBlockSlots;
           slot < std::min(num_slots, (block + 1) * kBlockSlots); ++slot) {
        if (static_cast<uint64_t>(expert[slot]) < static_cast<uint64_t>(num_experts)) {
          ++table[expert[slot]];
        } else if (expert[slot] != -1) {
          bad.store(slot, std::memory_order_relaxed);
        }
      }
    }
  });
  TORCH_CHECK(bad.load() < 0, kOp, ": topk_indices must be in [-1, num_experts = ", num_experts,
              "), got ", expert[bad.load()]);
  int64_t next = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    offset[e] = next;
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t here = tables[block * num_experts + e];
      tables[block * num_experts + e] = next;
      next += here;
    }
    count[e] = next - offset[e];
    TORCH_CHECK(given.const_data_ptr<int64_t>()[e] == count[e], kOp,
                ": tokens_per_expert must be the counts of topk_indices, got ",
                given.const_data_ptr<int64_t>()[e], " for expert ", e, ", which has ", count[e]);
  }
  offset[num_experts] = next;
  at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      int64_t* table = tables.data() + block * num_experts;
      for (int64_t slot = block * kBlockSlots;
           slot < std::min(num_slots, (block + 1) * kBlockSlots); ++slot) {
        map[slot] = expert[slot] >= 0 ? table[expert[slot]]++ : -1;
      }
    }
  });
}

#ifdef EQUIPOISE_WITH_CUDA
/// The counts that were passed in cannot be compared without waiting for the device; they are made
/// again.
void index_cuda(const Tensor& indices, const OptionalTensor& /*tokens_per_expert*/,
                const Tensor& row_id_map, const Tensor& counts, const Tensor& offsets) {
  moe_permute_index_cuda(indices, row_id_map, counts, offsets);
}
#endif

// ---- autograd -----------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Only results that have a gradient pass through; `results` receives all.
struct MoePermute : torch::autograd::Function<MoePermute> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const OptionalTensor& topk_weights, const Parameters& p,
                               Results& results) {
    at::AutoDispatchBelowADInplaceOrView below;
    results = call_op(x, p);
    const auto& [permuted, weights, map, counts, offsets, kept, overflow] = results;
    ctx->save_for_backward({map});
    ctx->set_materialize_grads(false);
    if (requires_grad(topk_weights)) return {permuted, weights};
    return {permuted};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto map = ctx->get_saved_variables()[0];
    Tensor grad_x, grad_weights;
    if (grads[0].defined()) grad_x = moe_unpermute(grads[0], map);
    if (grads.size() > 1 && grads[1].defined()) {
      const auto slots = map.sym_numel();
      grad_weights =
          moe_unpermute(grads[1].unsqueeze(1), map.reshape_symint({slots, c10::SymInt(1)}))
              .reshape_symint(map.sym_sizes());
    }
    return {grad_x, grad_weights, Tensor(), Tensor()};
  }
};

Results moe_permute_autograd(const Tensor& x, const Parameters& p) {
  if (!differentiating(x, p.topk_weights)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_op(x, p);
  }
  Results results;
  const auto outputs = MoePermute::apply(x, p.topk_weights, p, results);
  std::get<0>(results) = outputs[0];
  if (outputs.size() > 1) std::get<1>(results) = outputs[1];
  return results;
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) {
  m.impl("moe_permute", WithSchema<moe_permute_meta, Parameters, Signature>::call);
}
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl("moe_permute", WithSchema<moe_permute_run<moe_permute_index_cpu, moe_scatter_rows_cpu>,
                                   Parameters, Signature>::call);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl(
      "moe_permute",
      WithSchema<moe_permute_run<index_cuda, moe_scatter_rows_cuda>, Parameters, Signature>::call);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {
  m.impl("moe_permute", WithSchema<moe_permute_autograd, Parameters, Signature>::call);
}

}  // namespace

PermuteResult moe_permute(const Tensor& x, const OptionalTensor& topk_indices, int64_t num_experts,
                          const MoEPermuteOptions& o) {
  auto [permuted, weights, map, counts, offsets, kept, overflow] =
      call_op(x, {topk_indices, num_experts, o.topk_weights(), o.tokens_per_expert(),
                  o.routing_map(), o.capacity(), o.drop_policy(), o.pad_to_capacity(), o.align(),
                  o.seed(), o.output_rows()});
  return {permuted, weights, map, counts, offsets, kept, overflow};
}

}  // namespace equipoise
