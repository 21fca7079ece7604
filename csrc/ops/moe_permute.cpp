// SPDX-License-Identifier: Apache-2.0
// moe_permute: schema -> checks and shapes -> CPU -> autograd -> registration, top to bottom.
// Which row each slot gets is decided by slot_sort.cpp; the rows are moved by moe_rows.cpp.
// Its backward is the op moe_unpermute: the row of slot (t, k) goes back to token t, its weight
// back to (t, k).
#include "moe_permute.h"

#include <ATen/ops/sub.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../as_rows.h"
#include "../autograd.h"
#include "../checks.h"
#include "../library.h"
#include "../new_empty.h"
#include "moe_rows.h"
#include "moe_unpermute.h"
#include "slot_sort.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

namespace equipoise {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- schema -------------------------------------------------------------------------------------

// All but where the rows go.
#define ARGUMENTS                                                                            \
  "Tensor x, Tensor? topk_indices, SymInt num_experts, Tensor? topk_weights=None, "          \
  "Tensor? tokens_per_expert=None, Tensor? routing_map=None, SymInt? capacity=None, "        \
  "str drop_policy='position', bool pad_to_capacity=False, int align=1, SymInt? seed=None, " \
  "SymInt? output_rows=None"
#define RESULTS                                                                                   \
  "Tensor permuted_weights, Tensor row_id_map, Tensor tokens_per_expert, Tensor expert_offsets, " \
  "Tensor kept_per_expert, Tensor overflow, Tensor num_invalid"

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def("moe_permute(" ARGUMENTS ") -> (Tensor permuted, " RESULTS ")",
        {at::Tag::pt2_compliant_tag});
  m.def("moe_permute_out(" ARGUMENTS ", *, Tensor(a!) out) -> (" RESULTS ")",
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
  std::optional<c10::SymInt> seed;
  std::optional<c10::SymInt> output_rows;
  OptionalTensor out = std::nullopt;  // of moe_permute_out
};

/// What both ops return: everything but the rows.
using Layout = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
template <typename Return, typename... Out>
using SignatureOf = Return(const Tensor&, const OptionalTensor&, c10::SymInt, const OptionalTensor&,
                           const OptionalTensor&, const OptionalTensor&, std::optional<c10::SymInt>,
                           std::string_view, bool, int64_t, std::optional<c10::SymInt>,
                           std::optional<c10::SymInt>, Out...);
using Signature = SignatureOf<Results>;
using OutSignature = SignatureOf<Layout, Tensor&>;

template <typename Operator, typename... Out>
auto call(const Operator& op, const Tensor& x, const Parameters& p, Out&... out) {
  return op.call(x, p.topk_indices, p.num_experts, p.topk_weights, p.tokens_per_expert,
                 p.routing_map, p.capacity, p.drop_policy, p.pad_to_capacity, p.align, p.seed,
                 p.output_rows, out...);
}
Results call_op(const Tensor& x, const Parameters& p) {
  static const auto op = find_op<Signature>("moe_permute");
  return call(op, x, p);
}
Layout call_out_op(const Tensor& x, const Parameters& p) {
  static const auto op = find_op<OutSignature>("moe_permute_out");
  Tensor out = *p.out;
  return call(op, x, p, out);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

constexpr const char* kOp = "moe_permute";

void check(const Tensor& x, const Parameters& p) {
  check_movable(kOp, "x", x);
  TORCH_CHECK(x.dim() == 2, kOp, ": x must have shape [T, H], got ", x.sym_sizes());
  TORCH_CHECK(p.num_experts >= 1, kOp, ": num_experts must be at least 1, got ", p.num_experts);
  TORCH_CHECK(p.topk_indices.has_value() != p.routing_map.has_value(), kOp,
              ": topk_indices must be given, or routing_map in its place");
  const char* meaning = "[T, K]";
  if (p.topk_indices) {
    check_dtype(kOp, "topk_indices", *p.topk_indices, at::kLong);
    check_device(kOp, "topk_indices", *p.topk_indices, "x", x);
    TORCH_CHECK(p.topk_indices->dim() == 2 && p.topk_indices->sym_size(0) == x.sym_size(0), kOp,
                ": topk_indices must have shape [T, K] with T = ", x.sym_size(0), ", got ",
                p.topk_indices->sym_sizes());
  } else {
    meaning = "[T, E]";
    check_dtype(kOp, "routing_map", *p.routing_map, at::kBool);
    check_device(kOp, "routing_map", *p.routing_map, "x", x);
    check_sizes(kOp, "routing_map", *p.routing_map, {x.sym_size(0), p.num_experts}, meaning);
  }
  if (p.topk_weights) {
    check_floating(kOp, "topk_weights", *p.topk_weights);
    check_device(kOp, "topk_weights", *p.topk_weights, "x", x);
    const auto& slots = p.topk_indices ? *p.topk_indices : *p.routing_map;
    check_sizes(kOp, "topk_weights", *p.topk_weights, slots.sym_sizes(), meaning);
  }
  if (p.tokens_per_expert) {
    check_dtype(kOp, "tokens_per_expert", *p.tokens_per_expert, at::kLong);
    check_device(kOp, "tokens_per_expert", *p.tokens_per_expert, "x", x);
    check_sizes(kOp, "tokens_per_expert", *p.tokens_per_expert, {p.num_experts}, "[E]");
  }
  const bool probs = p.drop_policy == "probs", random = p.drop_policy == "random";
  TORCH_CHECK(probs || random || p.drop_policy == "position", kOp,
              ": drop_policy must be 'position', 'probs' or 'random', got '", p.drop_policy, "'");
  if (p.capacity) {
    TORCH_CHECK(*p.capacity >= 0, kOp, ": capacity must be at least 0, got ", *p.capacity);
    TORCH_CHECK(!probs || p.topk_weights, kOp,
                ": topk_weights must be given for drop_policy 'probs'");
    TORCH_CHECK(!random || p.seed, kOp, ": seed must be given for drop_policy 'random'");
  }
  TORCH_CHECK(p.align >= 1, kOp, ": align must be at least 1, got ", p.align);
  if (p.output_rows) {
    TORCH_CHECK(*p.output_rows >= 0, kOp, ": output_rows must be at least 0, got ", *p.output_rows);
  }
  if (p.pad_to_capacity) {
    TORCH_CHECK(p.capacity, kOp, ": capacity must be given for pad_to_capacity");
    TORCH_CHECK(p.align == 1, kOp, ": align must be 1 with pad_to_capacity, got ", p.align);
    TORCH_CHECK(!p.output_rows, kOp, ": output_rows must be absent with pad_to_capacity, got ",
                *p.output_rows);
  }
}

/// The slots as they are given: experts [T, K], or the routing map [T, E].
const Tensor& slots_of(const Parameters& p) {
  return p.topk_indices ? *p.topk_indices : *p.routing_map;
}

c10::SymInt num_rows(const Parameters& p) {
  if (p.pad_to_capacity) return p.num_experts * *p.capacity;
  if (p.output_rows) return *p.output_rows;
  const auto slots = slots_of(p).sym_numel();
  if (p.align == 1) return slots;
  return (slots + p.num_experts * (p.align - 1) + (p.align - 1)) / p.align * p.align;
}

Layout allocate_layout(const Tensor& x, const Parameters& p) {
  check(x, p);
  const auto experts = p.num_experts;
  return {p.topk_weights ? new_empty({num_rows(p)}, p.topk_weights->scalar_type(), x)
                         : new_empty({0}, accumulate_type(x.scalar_type()), x),
          new_empty(slots_of(p).sym_sizes(), at::kLong, x),
          new_empty({experts}, at::kLong, x),
          new_empty({experts + 1}, at::kLong, x),
          new_empty({experts}, at::kLong, x),
          new_empty({}, at::kLong, x),
          new_empty({}, at::kLong, x)};
}

Results moe_permute_meta(const Tensor& x, const Parameters& p) {
  auto layout = allocate_layout(x, p);
  return std::tuple_cat(std::tuple(new_empty({num_rows(p), x.sym_size(1)}, x.scalar_type(), x)),
                        std::move(layout));
}

Layout moe_permute_out_meta(const Tensor& x, const Parameters& p) {
  auto layout = allocate_layout(x, p);
  const auto& out = *p.out;
  check_dtype(kOp, "out", out, x.scalar_type());
  check_device(kOp, "out", out, "x", x);
  check_sizes(kOp, "out", out, {num_rows(p), x.sym_size(1)}, "[N, H]");
  TORCH_CHECK(out.is_contiguous(), kOp, ": out must be contiguous, got strides ",
              out.sym_strides());
  return layout;
}

/// A [T, K] tensor as T K tokens of one element with one slot each: how weights travel with the
/// rows.
Tensor as_column(const Tensor& slots) { return slots.reshape({slots.numel(), 1}); }

/// Fills the rows and the layout.
template <auto sort, auto scatter>
void fill(const Tensor& x, const Parameters& p, const Tensor& permuted, const Layout& layout) {
  const auto& [weights, map, counts, offsets, kept, overflow, num_invalid] = layout;
  SlotSort slots{};
  slots.op = kOp;
  slots.slots = slots_of(p).contiguous();
  if (p.tokens_per_expert) slots.tokens_per_expert = p.tokens_per_expert->contiguous();
  if (p.capacity) slots.layout.capacity = p.capacity->expect_int();
  slots.layout.align = p.align;
  slots.layout.pad_to_capacity = p.pad_to_capacity;
  slots.layout.num_rows = permuted.size(0);
  if (p.drop_policy == "probs" && p.topk_weights) {
    slots.drop_policy = DropPolicy::kProbs;
    slots.probs = p.topk_weights->contiguous();
  } else if (p.drop_policy == "random" && p.seed) {
    slots.drop_policy = DropPolicy::kRandom;
    slots.seed = static_cast<uint64_t>(p.seed->expect_int());
  }
  std::tie(slots.row_id_map, slots.counts, slots.expert_offsets, slots.kept_per_expert,
           slots.overflow, slots.num_invalid) =
      std::tie(map, counts, offsets, kept, overflow, num_invalid);
  sort(slots);
  if (permuted.numel() != 0) {
    scatter(as_rows(x), map, std::nullopt, permuted);
  }
  if (p.topk_weights && weights.numel() != 0) {
    scatter(as_column(p.topk_weights->contiguous()), as_column(map), std::nullopt,
            as_column(weights));
  }
}

template <auto sort, auto scatter>
Results moe_permute_run(const Tensor& x, const Parameters& p) {
  const auto results = moe_permute_meta(x, p);
  std::apply([&](const Tensor& permuted,
                 const auto&... layout) { fill<sort, scatter>(x, p, permuted, {layout...}); },
             results);
  return results;
}

template <auto sort, auto scatter>
Layout moe_permute_out_run(const Tensor& x, const Parameters& p) {
  const auto layout = moe_permute_out_meta(x, p);
  fill<sort, scatter>(x, p, *p.out, layout);
  return layout;
}

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
    const auto &permuted = std::get<0>(results), &weights = std::get<1>(results),
               &map = std::get<2>(results);
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
  check_has_gradient(kOp, "x", x);
  Results results;
  const auto outputs = MoePermute::apply(x, p.topk_weights, p, results);
  std::get<0>(results) = outputs[0];
  if (outputs.size() > 1) std::get<1>(results) = outputs[1];
  return results;
}

Layout moe_permute_out_autograd(const Tensor& x, const Parameters& p) {
  TORCH_CHECK(!differentiating(x, p.topk_weights, *p.out), kOp,
              ": out must be absent where a gradient is wanted");
  Layout layout;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    layout = call_out_op(x, p);
  }
  if (!p.out->is_inference()) p.out->unsafeGetTensorImpl()->bump_version();
  return layout;
}

// ---- registration -------------------------------------------------------------------------------

template <auto function>
constexpr auto* kWithSchema = WithSchema<function, Parameters, Signature>::call;
template <auto function>
constexpr auto* kOutWithSchema = WithSchema<function, Parameters, OutSignature>::call;

TORCH_LIBRARY_IMPL(equipoise, Meta, m) {
  m.impl("moe_permute", kWithSchema<moe_permute_meta>);
  m.impl("moe_permute_out", kOutWithSchema<moe_permute_out_meta>);
}
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl("moe_permute", kWithSchema<moe_permute_run<slot_sort_cpu, moe_scatter_rows_cpu>>);
  m.impl("moe_permute_out",
         kOutWithSchema<moe_permute_out_run<slot_sort_cpu, moe_scatter_rows_cpu>>);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl("moe_permute", kWithSchema<moe_permute_run<slot_sort_cuda, moe_scatter_rows_cuda>>);
  m.impl("moe_permute_out",
         kOutWithSchema<moe_permute_out_run<slot_sort_cuda, moe_scatter_rows_cuda>>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {
  m.impl("moe_permute", kWithSchema<moe_permute_autograd>);
  m.impl("moe_permute_out", kOutWithSchema<moe_permute_out_autograd>);
}

}  // namespace

PermuteResult moe_permute(const Tensor& x, const OptionalTensor& topk_indices, int64_t num_experts,
                          const MoEPermuteOptions& o) {
  const Parameters p{topk_indices,    num_experts,  o.topk_weights(), o.tokens_per_expert(),
                     o.routing_map(), o.capacity(), o.drop_policy(),  o.pad_to_capacity(),
                     o.align(),       o.seed(),     o.output_rows(),  o.out()};
  const auto named = [](const auto&... fields) { return PermuteResult{fields...}; };
  if (!p.out) return std::apply(named, call_op(x, p));
  return std::apply(named, std::tuple_cat(std::tuple(*p.out), call_out_op(x, p)));
}

Tensor PermuteResult::dropped_per_expert() const {
  return at::sub(tokens_per_expert, kept_per_expert);
}

int64_t expert_capacity(int64_t num_tokens, int64_t top_k, int64_t num_experts,
                        double capacity_factor, int64_t min_capacity) {
  constexpr const char* op = "expert_capacity";
  TORCH_CHECK(num_tokens >= 0, op, ": num_tokens must be at least 0, got ", num_tokens);
  TORCH_CHECK(top_k >= 0, op, ": top_k must be at least 0, got ", top_k);
  TORCH_CHECK(num_experts >= 1, op, ": num_experts must be at least 1, got ", num_experts);
  TORCH_CHECK(capacity_factor >= 0, op, ": capacity_factor must be at least 0, got ",
              capacity_factor);
  TORCH_CHECK(min_capacity >= 0, op, ": min_capacity must be at least 0, got ", min_capacity);
  // What is an integer but for rounding stays that integer.
  const auto share = static_cast<double>(num_tokens) * top_k / num_experts;
  const auto wanted = static_cast<int64_t>(std::ceil(capacity_factor * share - 1e-9));
  return std::min(num_tokens, std::max(min_capacity, wanted));
}

}  // namespace equipoise
