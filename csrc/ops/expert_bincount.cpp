// SPDX-License-Identifier: Apache-2.0
// expert_bincount: schema -> checks and shapes -> CPU -> autograd -> registration, top to bottom.
// The CPU counts in bins of its own for each block of tokens. The shape alone decides the blocks
// and they are added up in their order, so that weighted sums have the same bits for any number of
// threads.
#include "expert_bincount.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../autograd.h"
#include "../checks.h"
#include "../library.h"
#include "../new_empty.h"
#include "../optional_tensor.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

namespace equipoise {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalSize = std::optional<c10::SymInt>;

// ---- schema -------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def(
      "expert_bincount(Tensor indices, SymInt num_experts, Tensor? weights=None, "
      "Tensor? token_mask=None, Tensor? segment_ids=None, SymInt? num_segments=None) -> "
      "(Tensor tokens_per_expert, Tensor num_invalid)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "expert_bincount_backward(Tensor grad, Tensor indices, Tensor? token_mask, "
      "ScalarType weights_dtype, Tensor? segment_ids=None) -> Tensor grad_weights",
      {at::Tag::pt2_compliant_tag});
}

using Results = std::tuple<Tensor, Tensor>;

Results call_op(const Tensor& indices, c10::SymInt num_experts, const OptionalTensor& weights,
                const OptionalTensor& token_mask, const OptionalTensor& segment_ids,
                OptionalSize num_segments) {
  static const auto op =
      find_op<Results(const Tensor&, c10::SymInt, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&, OptionalSize)>("expert_bincount");
  return op.call(indices, std::move(num_experts), weights, token_mask, segment_ids,
                 std::move(num_segments));
}

Tensor call_backward_op(const Tensor& grad, const Tensor& indices, const OptionalTensor& token_mask,
                        at::ScalarType weights_dtype, const OptionalTensor& segment_ids) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, at::ScalarType,
                     const OptionalTensor&)>("expert_bincount_backward");
  return op.call(grad, indices, token_mask, weights_dtype, segment_ids);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

constexpr const char* kOp = "expert_bincount";
constexpr const char* kBackwardOp = "expert_bincount_backward";

void check_indices(const char* op, const Tensor& indices, const OptionalTensor& token_mask) {
  check_dtype(op, "indices", indices, at::kLong);
  TORCH_CHECK(indices.dim() >= 1, op, ": indices must have shape [..., K], got a scalar");
  if (token_mask) {
    check_dtype(op, "token_mask", *token_mask, at::kBool);
    check_per_token(op, "token_mask", *token_mask, "indices", indices);
  }
}

/// Checks the arguments and allocates the results.
Results expert_bincount_meta(const Tensor& indices, c10::SymInt num_experts,
                             const OptionalTensor& weights, const OptionalTensor& token_mask,
                             const OptionalTensor& segment_ids, OptionalSize num_segments) {
  check_indices(kOp, indices, token_mask);
  TORCH_CHECK(num_experts >= 1, kOp, ": num_experts must be at least 1, got ", num_experts);
  if (weights) {
    check_floating(kOp, "weights", *weights);
    check_device(kOp, "weights", *weights, "indices", indices);
    check_sizes(kOp, "weights", *weights, indices.sym_sizes(), "of indices");
  }
  check_segments(kOp, segment_ids, num_segments, "indices", indices);
  const auto type = weights ? accumulate_type(weights->scalar_type()) : at::kLong;
  return {num_segments ? new_empty({*num_segments, num_experts}, type, indices)
                       : new_empty({num_experts}, type, indices),
          new_empty({}, at::kLong, indices)};
}

template <void (*backend)(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, const Tensor&, const Tensor&)>
Results expert_bincount_run(const Tensor& indices, c10::SymInt num_experts,
                            const OptionalTensor& weights, const OptionalTensor& token_mask,
                            const OptionalTensor& segment_ids, OptionalSize num_segments) {
  auto results = expert_bincount_meta(indices, num_experts, weights, token_mask, segment_ids,
                                      std::move(num_segments));
  const auto& [counts, num_invalid] = results;
  if (indices.numel() == 0) {
    counts.zero_();
    num_invalid.zero_();
  } else {
    backend(indices.contiguous(), contiguous(weights), contiguous(token_mask),
            contiguous(segment_ids), counts, num_invalid);
  }
  return results;
}

Tensor expert_bincount_backward_meta(const Tensor& grad, const Tensor& indices,
                                     const OptionalTensor& token_mask, at::ScalarType weights_dtype,
                                     const OptionalTensor& segment_ids) {
  check_indices(kBackwardOp, indices, token_mask);
  TORCH_CHECK(grad.dim() == (segment_ids ? 2 : 1), kBackwardOp, ": grad must have shape ",
              segment_ids ? "[S, E]" : "[E]", ", got ", grad.sym_sizes());
  check_dtype(kBackwardOp, "grad", grad, accumulate_type(weights_dtype));
  check_device(kBackwardOp, "grad", grad, "indices", indices);
  check_segments(kBackwardOp, segment_ids,
                 segment_ids ? OptionalSize(grad.sym_size(0)) : std::nullopt, "indices", indices);
  return new_empty(indices.sym_sizes(), weights_dtype, indices);
}

template <void (*backend)(const Tensor&, const Tensor&, const OptionalTensor&,
                          const OptionalTensor&, const Tensor&)>
Tensor expert_bincount_backward_run(const Tensor& grad, const Tensor& indices,
                                    const OptionalTensor& token_mask, at::ScalarType weights_dtype,
                                    const OptionalTensor& segment_ids) {
  auto grad_weights =
      expert_bincount_backward_meta(grad, indices, token_mask, weights_dtype, segment_ids);
  if (indices.numel() != 0) {
    backend(grad.contiguous(), indices.contiguous(), contiguous(token_mask),
            contiguous(segment_ids), grad_weights);
  }
  return grad_weights;
}

// ---- CPU ----------------------------------------------------------------------------------------

struct Slots {
  const int64_t* indices;      // [T, K]
  const bool* token_mask;      // [T] or null
  const int64_t* segment_ids;  // [T] or null; checked where the token is not masked
  int64_t num_tokens, top_k, num_experts, num_segments;

  Slots(const Tensor& indices, const OptionalTensor& token_mask, const OptionalTensor& segment_ids,
        const Tensor& counts)
      : indices(indices.const_data_ptr<int64_t>()),
        token_mask(data_or_null<bool>(token_mask)),
        segment_ids(data_or_null<int64_t>(segment_ids)),
        num_tokens(indices.numel() / indices.size(-1)),
        top_k(indices.size(-1)),
        num_experts(counts.size(-1)),
        num_segments(counts.numel() / num_experts) {}

  int64_t size() const { return num_tokens * top_k; }
  bool masked(int64_t token) const { return token_mask != nullptr && !token_mask[token]; }
  int64_t segment(int64_t token) const { return segment_ids == nullptr ? 0 : segment_ids[token]; }
};

/// For the first bad index; a kernel that has met one calls this.
[[noreturn]] void refuse_bad_index(const Slots& slots) {
  for (int64_t slot = 0; slot < slots.size(); ++slot) {
    if (slots.masked(slot / slots.top_k)) continue;
    check_expert(kOp, "indices", slots.indices[slot], slots.num_experts);
  }
  TORCH_INTERNAL_ASSERT(false);
}

/// How tokens of `top_k` slots are cut into blocks, each of which has `bins` bins of its own. The
/// shape alone decides, never the number of threads.
struct Blocks {
  int64_t num_tokens, tokens_per_block, count;

  static constexpr int64_t kSlotsPerBin = 4;  // fewer are not worth the bins

  Blocks(int64_t num_tokens, int64_t top_k, int64_t bins) : num_tokens(num_tokens) {
    constexpr int64_t kMinSlots = 16384;  // below this a second thread costs more than it brings
    constexpr int64_t kMaxBlocks = 256;
    const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t wanted =
        std::max({kMinSlots, kSlotsPerBin * bins, divide_up(num_tokens * top_k, kMaxBlocks)});
    tokens_per_block = divide_up(wanted, top_k);
    count = divide_up(num_tokens, tokens_per_block);
  }

  /// work(block, begin, end) for the tokens [begin, end) of each block.
  template <typename Work>
  void for_each(const Work& work) const {
    if (count == 1) return work(0, 0, num_tokens);
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * tokens_per_block;
        work(block, begin, std::min(num_tokens, begin + tokens_per_block));
      }
    });
  }
};

/// A call with one token would notice the heap.
template <typename T>
using Bins = c10::SmallVector<T, 4096 / sizeof(T)>;

/// Counts many slots without mask, weights and segments. Index i has bin i + 1, which is never
/// asked for by itself: the number of bins is a power of two above E, so a few indices at once are
/// seen to have one, and the bins behind expert E - 1 must stay empty. Neighbours are counted in
/// different lanes: the count of an expert waits for the one before it in its lane.
constexpr int64_t kLanes = 2;

uint64_t num_flat_bins(const Slots& slots) {
  uint64_t bins = 1;
  while (bins <= static_cast<uint64_t>(slots.num_experts)) bins *= 2;
  return bins;
}

/// Of the slots [begin, end).
void count_flat_block(const Slots& slots, int64_t begin, int64_t end, uint64_t num_bins,
                      uint32_t* counts) {
  constexpr int64_t kAtOnce = 8;
  uint32_t* const of_experts = counts + kLanes;  // -1 comes before them
  const int64_t* index = slots.indices + begin;
  const int64_t* const index_end = slots.indices + end;
  for (; index_end - index >= kAtOnce; index += kAtOnce) {
    uint64_t all = 0;
    for (int64_t i = 0; i < kAtOnce; ++i) all |= static_cast<uint64_t>(index[i]) + 1;
    if (all >= num_bins) refuse_bad_index(slots);
    for (int64_t i = 0; i < kAtOnce; ++i) ++of_experts[index[i] * kLanes + i % kLanes];
  }
  for (; index < index_end; ++index) {
    if (static_cast<uint64_t>(*index) + 1 >= num_bins) refuse_bad_index(slots);
    ++of_experts[*index * kLanes];
  }
}

void count_flat(const Slots& slots, int64_t* out) {
  const int64_t num_bins = num_flat_bins(slots), size = num_bins * kLanes;
  const Blocks blocks(slots.size(), /*top_k=*/1, size);  // a token may be cut
  Bins<uint32_t> counts(blocks.count * size, 0);
  blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
    count_flat_block(slots, begin, end, num_bins, counts.data() + block * size);
  });
  const int64_t num_experts = slots.num_experts;
  std::fill_n(out, num_experts, 0);
  uint32_t bad = 0;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const uint32_t* const lanes = counts.data() + block * size + kLanes;  // of expert 0
    for (int64_t e = 0; e < num_experts; ++e) {
      out[e] += int64_t{lanes[kLanes * e]} + lanes[kLanes * e + 1];
    }
    for (int64_t i = kLanes * num_experts; i < size - kLanes; ++i) bad |= lanes[i];
  }
  if (bad != 0) refuse_bad_index(slots);
}

/// Adds weight(slot) to bins[S, E] for each slot of the tokens [begin, end).
template <typename T, typename Weight>
void add_block(const Slots& slots, int64_t begin, int64_t end, T* bins, const Weight& weight) {
  for (int64_t token = begin; token < end; ++token) {
    if (slots.masked(token)) continue;
    T* const own = bins + slots.segment(token) * slots.num_experts;
    for (int64_t slot = token * slots.top_k; slot < (token + 1) * slots.top_k; ++slot) {
      const int64_t index = slots.indices[slot];
      if (static_cast<uint64_t>(index) < static_cast<uint64_t>(slots.num_experts)) {
        own[index] += weight(slot);
      } else if (index != -1) {
        refuse_bad_index(slots);
      }
    }
  }
}

/// out[S, E] = sums of weight(slot), which are added up in T.
template <typename T, typename Out, typename Weight>
void add_up(const Slots& slots, Out* out, const Weight& weight) {
  const int64_t size = slots.num_segments * slots.num_experts;
  const Blocks blocks(slots.num_tokens, slots.top_k, size);
  constexpr bool kInPlace = std::is_same_v<T, Out>;  // the bins of the first block are `out`
  Bins<T> bins((blocks.count - kInPlace) * size, T(0));
  const auto bins_of = [&](int64_t block) -> T* {
    if constexpr (kInPlace) {
      return block == 0 ? out : bins.data() + (block - 1) * size;
    } else {
      return bins.data() + block * size;
    }
  };
  T* const total = bins_of(0);
  if (kInPlace) std::fill_n(total, size, T(0));
  blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
    add_block(slots, begin, end, bins_of(block), weight);
  });
  for (int64_t block = 1; block < blocks.count; ++block) {
    const T* const other = bins_of(block);
    for (int64_t i = 0; i < size; ++i) total[i] += other[i];
  }
  if constexpr (!kInPlace) std::copy_n(total, size, out);
}

void expert_bincount_cpu(const Tensor& indices, const OptionalTensor& weights,
                         const OptionalTensor& token_mask, const OptionalTensor& segment_ids,
                         const Tensor& counts, const Tensor& num_invalid) {
  const Slots slots(indices, token_mask, segment_ids, counts);
  check_segment_values(kOp, segment_ids, slots.num_segments, slots.token_mask);
  *num_invalid.mutable_data_ptr<int64_t>() = 0;
  if (!weights) {
    auto* const out = counts.mutable_data_ptr<int64_t>();
    const bool flat = !token_mask && !segment_ids;
    if (flat && slots.size() >= Blocks::kSlotsPerBin * slots.num_experts) {
      count_flat(slots, out);
    } else {
      add_up<int64_t>(slots, out, [](int64_t) { return 1; });
    }
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights->scalar_type(), kOp, [&] {
    using Out = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto* const weight = weights->const_data_ptr<scalar_t>();
    add_up<double>(slots, counts.mutable_data_ptr<Out>(),
                   [&](int64_t slot) { return static_cast<double>(weight[slot]); });
  });
}

void expert_bincount_backward_cpu(const Tensor& grad, const Tensor& indices,
                                  const OptionalTensor& token_mask,
                                  const OptionalTensor& segment_ids, const Tensor& grad_weights) {
  constexpr int64_t kGrainSlots = 32768;
  const Slots slots(indices, token_mask, segment_ids, grad);
  const auto grain = std::max<int64_t>(1, kGrainSlots / slots.top_k);
  check_segment_values(kBackwardOp, segment_ids, slots.num_segments, slots.token_mask);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad_weights.scalar_type(), kOp, [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const T* const g = grad.const_data_ptr<T>();
    auto* const out = grad_weights.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, slots.num_tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const bool masked = slots.masked(token);
        const T* const own = masked ? nullptr : g + slots.segment(token) * slots.num_experts;
        for (int64_t slot = token * slots.top_k; slot < (token + 1) * slots.top_k; ++slot) {
          const int64_t e = slots.indices[slot];
          const bool counts = !masked && e >= 0 && e < slots.num_experts;
          out[slot] = static_cast<scalar_t>(counts ? own[e] : T(0));
        }
      }
    });
  });
}

// ---- autograd: linear in the weights ------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Only the sums have a gradient and pass through; `num_invalid` receives the other result.
struct ExpertBincount : torch::autograd::Function<ExpertBincount> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& weights, const Tensor& indices,
                        const c10::SymInt& num_experts, const OptionalTensor& token_mask,
                        const OptionalTensor& segment_ids, const OptionalSize& num_segments,
                        Tensor* num_invalid) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward(
        {indices, token_mask.value_or(Tensor()), segment_ids.value_or(Tensor())});
    ctx->saved_data["dtype"] = static_cast<int64_t>(weights.scalar_type());
    auto results = call_op(indices, num_experts, weights, token_mask, segment_ids, num_segments);
    *num_invalid = std::move(std::get<1>(results));
    return std::move(std::get<0>(results));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    return {call_backward_op(grads[0], saved[0], if_defined(saved[1]), dtype, if_defined(saved[2])),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

Results expert_bincount_autograd(const Tensor& indices, c10::SymInt num_experts,
                                 const OptionalTensor& weights, const OptionalTensor& token_mask,
                                 const OptionalTensor& segment_ids, OptionalSize num_segments) {
  if (!differentiating(weights)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_op(indices, std::move(num_experts), weights, token_mask, segment_ids,
                   std::move(num_segments));
  }
  Tensor num_invalid;
  auto sums = ExpertBincount::apply(*weights, indices, num_experts, token_mask, segment_ids,
                                    num_segments, &num_invalid);
  return {std::move(sums), std::move(num_invalid)};
}

struct ExpertBincountBackward : torch::autograd::Function<ExpertBincountBackward> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& indices,
                        const OptionalTensor& token_mask, at::ScalarType weights_dtype,
                        const OptionalTensor& segment_ids) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward(
        {indices, token_mask.value_or(Tensor()), segment_ids.value_or(Tensor())});
    if (segment_ids) ctx->saved_data["num_segments"] = grad.sym_size(0);
    ctx->saved_data["num_experts"] = grad.sym_size(-1);
    return call_backward_op(grad, indices, token_mask, weights_dtype, segment_ids);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto segment_ids = if_defined(saved[2]);
    const auto num_segments =
        segment_ids ? OptionalSize(ctx->saved_data["num_segments"].toSymInt()) : std::nullopt;
    auto [sums, num_invalid] = call_op(saved[0], ctx->saved_data["num_experts"].toSymInt(),
                                       grads[0], if_defined(saved[1]), segment_ids, num_segments);
    return {sums, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor expert_bincount_backward_autograd(const Tensor& grad, const Tensor& indices,
                                         const OptionalTensor& token_mask,
                                         at::ScalarType weights_dtype,
                                         const OptionalTensor& segment_ids) {
  if (differentiating(grad)) {
    return ExpertBincountBackward::apply(grad, indices, token_mask, weights_dtype, segment_ids);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward_op(grad, indices, token_mask, weights_dtype, segment_ids);
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

// ---- the public functions -----------------------------------------------------------------------

Tensor expert_bincount(const Tensor& indices, int64_t num_experts, const OptionalTensor& weights,
                       const OptionalTensor& token_mask, const OptionalTensor& segment_ids,
                       std::optional<int64_t> num_segments, Tensor* num_invalid) {
  auto results = call_op(indices, num_experts, weights, token_mask, segment_ids,
                         num_segments ? OptionalSize(*num_segments) : std::nullopt);
  if (num_invalid != nullptr) *num_invalid = std::move(std::get<1>(results));
  return std::move(std::get<0>(results));
}

Tensor expert_frequency(const Tensor& indices, int64_t num_experts,
                        const OptionalTensor& token_mask, const OptionalTensor& segment_ids,
                        std::optional<int64_t> num_segments) {
  const auto counts = expert_bincount(indices, num_experts, /*weights=*/std::nullopt, token_mask,
                                      segment_ids, num_segments);
  return counts.to(at::kFloat) / counts.sum(-1, /*keepdim=*/true).clamp_min(1);
}

}  // namespace equipoise
