// SPDX-License-Identifier: Apache-2.0
// expert_bincount: schema -> checks and shapes -> CPU -> autograd -> registration, top to bottom.
// The CPU counts in fixed blocks of slots, so that weighted sums have the same bits for any number
// of threads.
#include "expert_bincount.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../autograd.h"
#include "../checks.h"
#include "../library.h"
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
      "expert_bincount(Tensor indices, SymInt num_experts, Tensor? weights=None, "
      "Tensor? token_mask=None, Tensor? segment_ids=None, SymInt? num_segments=None) -> "
      "Tensor tokens_per_expert",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "expert_bincount_backward(Tensor grad, Tensor indices, Tensor? token_mask, "
      "ScalarType weights_dtype) -> Tensor grad_weights",
      {at::Tag::pt2_compliant_tag});
}

Tensor call_op(const Tensor& indices, c10::SymInt num_experts, const OptionalTensor& weights,
               const OptionalTensor& token_mask) {
  static const auto op =
      find_op<Tensor(const Tensor&, c10::SymInt, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, std::optional<c10::SymInt>)>("expert_bincount");
  return op.call(indices, num_experts, weights, token_mask, std::nullopt, std::nullopt);
}

Tensor call_backward_op(const Tensor& grad, const Tensor& indices, const OptionalTensor& token_mask,
                        at::ScalarType weights_dtype) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, at::ScalarType)>(
          "expert_bincount_backward");
  return op.call(grad, indices, token_mask, weights_dtype);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

constexpr const char* kOp = "expert_bincount";

void check_indices(const char* op, const Tensor& indices, const OptionalTensor& token_mask) {
  check_dtype(op, "indices", indices, at::kLong);
  TORCH_CHECK(indices.dim() >= 1, op, ": indices must have shape [..., K], got a scalar");
  if (token_mask) {
    check_dtype(op, "token_mask", *token_mask, at::kBool);
    check_device(op, "token_mask", *token_mask, "indices", indices);
    check_sizes(op, "token_mask", *token_mask, indices.sym_sizes().slice(0, indices.dim() - 1),
                "of indices without its last");
  }
}

Tensor expert_bincount_meta(const Tensor& indices, c10::SymInt num_experts,
                            const OptionalTensor& weights, const OptionalTensor& token_mask,
                            const OptionalTensor& segment_ids,
                            std::optional<c10::SymInt> num_segments) {
  check_indices(kOp, indices, token_mask);
  TORCH_CHECK(num_experts >= 1, kOp, ": num_experts must be at least 1, got ", num_experts);
  if (weights) {
    check_floating(kOp, "weights", *weights);
    check_device(kOp, "weights", *weights, "indices", indices);
    check_sizes(kOp, "weights", *weights, indices.sym_sizes(), "of indices");
  }
  TORCH_CHECK(!segment_ids && !num_segments, kOp, ": segment_ids are not accepted in this version");
  return at::empty_symint(
      {num_experts},
      indices.options().dtype(weights ? accumulate_type(weights->scalar_type()) : at::kLong));
}

Tensor as_slots(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}).contiguous(); }

OptionalTensor as_flat(const OptionalTensor& mask) {
  return mask ? OptionalTensor(mask->reshape({-1}).contiguous()) : std::nullopt;
}

template <void (*backend)(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                          const Tensor&)>
Tensor expert_bincount_run(const Tensor& indices, c10::SymInt num_experts,
                           const OptionalTensor& weights, const OptionalTensor& token_mask,
                           const OptionalTensor& segment_ids,
                           std::optional<c10::SymInt> num_segments) {
  auto counts =
      expert_bincount_meta(indices, num_experts, weights, token_mask, segment_ids, num_segments);
  if (indices.numel() == 0) return counts.zero_();
  backend(as_slots(indices), weights ? OptionalTensor(as_slots(*weights)) : std::nullopt,
          as_flat(token_mask), counts);
  return counts;
}

Tensor expert_bincount_backward_meta(const Tensor& grad, const Tensor& indices,
                                     const OptionalTensor& token_mask,
                                     at::ScalarType weights_dtype) {
  check_indices("expert_bincount_backward", indices, token_mask);
  TORCH_CHECK(grad.dim() == 1, "expert_bincount_backward: grad must have shape [E], got ",
              grad.sym_sizes());
  check_dtype("expert_bincount_backward", "grad", grad, accumulate_type(weights_dtype));
  check_device("expert_bincount_backward", "grad", grad, "indices", indices);
  return at::empty_symint(indices.sym_sizes(), indices.options().dtype(weights_dtype));
}

template <void (*backend)(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&)>
Tensor expert_bincount_backward_run(const Tensor& grad, const Tensor& indices,
                                    const OptionalTensor& token_mask,
                                    at::ScalarType weights_dtype) {
  auto grad_weights = expert_bincount_backward_meta(grad, indices, token_mask, weights_dtype);
  if (indices.numel() != 0)
    backend(grad.contiguous(), as_slots(indices), as_flat(token_mask), grad_weights);
  return grad_weights;
}

// ---- CPU ----------------------------------------------------------------------------------------

constexpr int64_t kBlockSlots =
    32768;  // shape alone decides the blocks: same bits for any number of threads
constexpr int64_t kLanes =
    4;  // neighbouring slots count into different tables: no store waits for a load

/// Calls count(slot, expert, lane) for every slot of [begin, end) that counts; notes a bad index in
/// `bad`.
template <typename Count>
void for_each_slot(const int64_t* indices, const bool* mask, int64_t top_k, int64_t num_experts,
                   int64_t begin, int64_t end, std::atomic<int64_t>& bad, const Count& count) {
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t expert = indices[slot];
    if (static_cast<uint64_t>(expert) >= static_cast<uint64_t>(num_experts)) {
      if (expert != -1) bad.store(slot, std::memory_order_relaxed);
    } else if (mask == nullptr || mask[slot / top_k]) {
      count(slot, expert, slot % kLanes);
    }
  }
}

void expert_bincount_cpu(const Tensor& indices, const OptionalTensor& weights,
                         const OptionalTensor& token_mask, const Tensor& counts) {
  const int64_t num_slots = indices.numel(), top_k = indices.size(1), num_experts = counts.size(0);
  const int64_t num_blocks = (num_slots + kBlockSlots - 1) / kBlockSlots;
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const bool* mask = token_mask ? token_mask->const_data_ptr<bool>() : nullptr;
  std::atomic<int64_t> bad{-1};

  const auto run = [&](auto zero, const auto& value_of) {
    using T = decltype(zero);
    std::vector<T> tables(num_blocks * kLanes * num_experts);
    at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        T* table = tables.data() + block * kLanes * num_experts;
        for_each_slot(index, mask, top_k, num_experts, block * kBlockSlots,
                      std::min(num_slots, (block + 1) * kBlockSlots), bad,
                      [&](int64_t slot, int64_t e, int64_t lane) {
                        table[lane * num_experts + e] += value_of(slot);
                      });
      }
    });
    TORCH_CHECK(bad.load() < 0, kOp, ": indices must be in [-1, num_experts = ", num_experts,
                "), got ", index[bad.load()]);
    return tables;
  };
  const auto reduce = [&](const auto& tables, auto* out, auto zero) {
    for (int64_t e = 0; e < num_experts; ++e) {
      auto total = zero;
      for (int64_t part = 0; part < num_blocks * kLanes; ++part)
        total += tables[part * num_experts + e];
      out[e] = total;
    }
  };
  if (!weights) {
    reduce(run(int64_t{0}, [](int64_t) { return 1; }), counts.mutable_data_ptr<int64_t>(),
           int64_t{0});
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights->scalar_type(), kOp, [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto* weight = weights->const_data_ptr<scalar_t>();
    reduce(run(T{0}, [&](int64_t slot) { return static_cast<T>(weight[slot]); }),
           counts.mutable_data_ptr<T>(), 0.0);
  });
}

void expert_bincount_backward_cpu(const Tensor& grad, const Tensor& indices,
                                  const OptionalTensor& token_mask, const Tensor& grad_weights) {
  const int64_t num_slots = indices.numel(), top_k = indices.size(1), num_experts = grad.size(0);
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const bool* mask = token_mask ? token_mask->const_data_ptr<bool>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad_weights.scalar_type(), kOp, [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const T* g = grad.const_data_ptr<T>();
    auto* out = grad_weights.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_slots, kBlockSlots, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t e = index[slot];
        const bool counts = e >= 0 && e < num_experts && (mask == nullptr || mask[slot / top_k]);
        out[slot] = static_cast<scalar_t>(counts ? g[e] : T(0));
      }
    });
  });
}

// ---- autograd: linear in the weights ------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct ExpertBincount : torch::autograd::Function<ExpertBincount> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& weights, const Tensor& indices,
                        c10::SymInt num_experts, const OptionalTensor& token_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({indices, token_mask ? *token_mask : Tensor()});
    ctx->saved_data["dtype"] = static_cast<int64_t>(weights.scalar_type());
    return call_op(indices, num_experts, weights, token_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    return {call_backward_op(grads[0], saved[0], if_defined(saved[1]), dtype), Tensor(), Tensor(),
            Tensor()};
  }
};

Tensor expert_bincount_autograd(const Tensor& indices, c10::SymInt num_experts,
                                const OptionalTensor& weights, const OptionalTensor& token_mask,
                                const OptionalTensor& segment_ids,
                                std::optional<c10::SymInt> num_segments) {
  TORCH_CHECK(!segment_ids && !num_segments, kOp, ": segment_ids are not accepted in this version");
  if (weights && differentiating(weights))
    return ExpertBincount::apply(*weights, indices, num_experts, token_mask);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_op(indices, num_experts, weights, token_mask);
}

struct ExpertBincountBackward : torch::autograd::Function<ExpertBincountBackward> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& indices,
                        const OptionalTensor& token_mask, at::ScalarType weights_dtype) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({indices, token_mask ? *token_mask : Tensor()});
    ctx->saved_data["num_experts"] = grad.sym_size(0);
    return call_backward_op(grad, indices, token_mask, weights_dtype);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {call_op(saved[0], ctx->saved_data["num_experts"].toSymInt(), grads[0],
                    if_defined(saved[1])),
            Tensor(), Tensor(), Tensor()};
  }
};

Tensor expert_bincount_backward_autograd(const Tensor& grad, const Tensor& indices,
                                         const OptionalTensor& token_mask,
                                         at::ScalarType weights_dtype) {
  return ExpertBincountBackward::apply(grad, indices, token_mask, weights_dtype);
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) {
  m.impl("expert_bincount", expert_bincount_meta);
  m.impl("expert_bincount_backward", expert_bincount_backward_meta);
}
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl("expert_bincount", expert_bincount_run<expert_bincount_cpu>);
  m.impl("expert_bincount_backward", expert_bincount_backward_run<expert_bincount_backward_cpu>);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl("expert_bincount", expert_bincount_run<expert_bincount_cuda>);
  m.impl("expert_bincount_backward", expert_bincount_backward_run<expert_bincount_backward_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {
  m.impl("expert_bincount", expert_bincount_autograd);
  m.impl("expert_bincount_backward", expert_bincount_backward_autograd);
}

}  // namespace

Tensor expert_bincount(const Tensor& indices, int64_t num_experts, const OptionalTensor& weights,
                       const OptionalTensor& token_mask) {
  return call_op(indices, num_experts, weights, token_mask);
}

}  // namespace equipoise
