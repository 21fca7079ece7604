// SPDX-License-Identifier: Apache-2.0
// topk_gating: schema -> checks and shapes -> CPU -> autograd -> registration, top to bottom.
// Kernels: ../cpu/topk_gating.cpp and ../../cuda/topk_gating.cu.
#include "topk_gating.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../as_rows.h"
#include "../autograd.h"
#include "../checks.h"
#include "../cpu/dispatch.h"
#include "../cpu/topk_gating.h"
#include "../huge_pages.h"
#include "../library.h"
#include "../new_empty.h"
#include "../optional_tensor.h"
#include "topk_gating_arguments.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

EQUIPOISE_DECLARE_CPU_KERNEL(template <typename scalar_t>
                             void topk_gating_rows(const TopKGatingRows<scalar_t>&, int64_t,
                                                   int64_t,
                                                   const TopKGatingTotals<compute_t<scalar_t>>&,
                                                   compute_t<scalar_t>*);
                             template <typename scalar_t>
                             void topk_gating_backward_rows(const TopKGatingBackwardRows<scalar_t>&,
                                                            int64_t, int64_t, compute_t<scalar_t>*))

namespace equipoise {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- schema -------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def(
      "topk_gating(Tensor logits, int top_k, str score_function='softmax', "
      "bool norm_topk_prob=False, float scaling_factor=1.0, Tensor? expert_bias=None, "
      "int num_groups=1, int? group_topk=None, str group_score='top2_sum', "
      "Tensor? token_mask=None, Tensor? segment_ids=None, SymInt? num_segments=None, "
      "Tensor? noise=None, Tensor? forced_indices=None, bool stats=True) -> "
      "(Tensor topk_weights, Tensor topk_indices, Tensor tokens_per_expert, Tensor? lse, "
      "Tensor? sums)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "topk_gating_backward(Tensor? grad_weights, Tensor? grad_lse, Tensor? grad_sums, "
      "Tensor logits, Tensor topk_indices, Tensor? lse, str score_function, "
      "bool norm_topk_prob, float scaling_factor, Tensor? token_mask=None, "
      "Tensor? segment_ids=None, SymInt? num_segments=None, Tensor? noise=None) -> "
      "Tensor grad_logits",
      {at::Tag::pt2_compliant_tag});
}

/// The arguments of the schema behind `logits`, in its order; refers to the caller's.
struct Parameters {
  int64_t top_k;
  std::string_view score_function;
  bool norm_topk_prob;
  double scaling_factor;
  const OptionalTensor& expert_bias;
  int64_t num_groups;
  std::optional<int64_t> group_topk;
  std::string_view group_score;
  const OptionalTensor& token_mask;
  const OptionalTensor& segment_ids;
  const std::optional<c10::SymInt>& num_segments;
  const OptionalTensor& noise;
  const OptionalTensor& forced_indices;
  bool stats;
};

using Results = std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor>;
using Signature = Results(const Tensor&, int64_t, std::string_view, bool, double,
                          const OptionalTensor&, int64_t, std::optional<int64_t>, std::string_view,
                          const OptionalTensor&, const OptionalTensor&, std::optional<c10::SymInt>,
                          const OptionalTensor&, const OptionalTensor&, bool);

Results call_op(const Tensor& logits, const Parameters& p) {
  static const auto op = find_op<Signature>("topk_gating");
  return op.call(logits, p.top_k, p.score_function, p.norm_topk_prob, p.scaling_factor,
                 p.expert_bias, p.num_groups, p.group_topk, p.group_score, p.token_mask,
                 p.segment_ids, p.num_segments, p.noise, p.forced_indices, p.stats);
}

using BackwardSignature = Tensor(const OptionalTensor&, const OptionalTensor&,
                                 const OptionalTensor&, const Tensor&, const Tensor&,
                                 const OptionalTensor&, std::string_view, bool, double,
                                 const OptionalTensor&, const OptionalTensor&,
                                 std::optional<c10::SymInt>, const OptionalTensor&);

/// The arguments of topk_gating_backward behind `grad_weights`, in the order of its schema; refers
/// to the caller's.
struct BackwardParameters {
  const OptionalTensor& grad_lse;
  const OptionalTensor& grad_sums;
  const Tensor& logits;
  const Tensor& topk_indices;
  const OptionalTensor& lse;
  std::string_view score_function;
  bool norm_topk_prob;
  double scaling_factor;
  const OptionalTensor& token_mask;
  const OptionalTensor& segment_ids;
  const std::optional<c10::SymInt>& num_segments;
  const OptionalTensor& noise;
};

Tensor call_backward_op(const OptionalTensor& grad_weights, const BackwardParameters& p) {
  static const auto op = find_op<BackwardSignature>("topk_gating_backward");
  return op.call(grad_weights, p.grad_lse, p.grad_sums, p.logits, p.topk_indices, p.lse,
                 p.score_function, p.norm_topk_prob, p.scaling_factor, p.token_mask, p.segment_ids,
                 p.num_segments, p.noise);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

constexpr const char* kOp = "topk_gating";

ScoreFunction parse_score_function(const char* op, std::string_view name, bool norm_topk_prob) {
  if (name == "softmax") return ScoreFunction::kSoftmax;
  if (name == "sigmoid") return ScoreFunction::kSigmoid;
  if (name == "sqrtsoftplus") return ScoreFunction::kSqrtSoftplus;
  TORCH_CHECK(name == "identity", op,
              ": score_function must be 'softmax', 'sigmoid', 'sqrtsoftplus' or 'identity', got '",
              name, "'");
  TORCH_CHECK(!norm_topk_prob, op,
              ": norm_topk_prob is not possible with score_function 'identity', whose weights may "
              "be negative");
  return ScoreFunction::kIdentity;
}

GroupScore parse_group_score(std::string_view name) {
  if (name == "max") return GroupScore::kMax;
  TORCH_CHECK(name == "top2_sum", kOp, ": group_score must be 'max' or 'top2_sum', got '", name,
              "'");
  return GroupScore::kTop2Sum;
}

void check_groups(const c10::SymInt& num_experts, const Parameters& p) {
  const auto groups = p.num_groups;
  TORCH_CHECK(groups >= 1, kOp, ": num_groups must be >= 1, got ", groups);
  TORCH_CHECK(num_experts % groups == 0, kOp,
              ": num_groups must divide num_experts = ", num_experts, ", got ", groups);
  TORCH_CHECK(p.group_topk || groups == 1, kOp,
              ": group_topk must be given with num_groups = ", groups);
  parse_group_score(p.group_score);
  if (!p.group_topk) return;
  TORCH_CHECK(*p.group_topk >= 1 && *p.group_topk <= groups, kOp,
              ": group_topk must be from 1 to num_groups = ", groups, ", got ", *p.group_topk);
  TORCH_CHECK(*p.group_topk * (num_experts / groups) >= p.top_k, kOp,
              ": group_topk = ", *p.group_topk, " groups of ", num_experts / groups,
              " experts hold fewer than top_k = ", p.top_k);
}

// What stands beside the logits of each token, in both directions.

void check_noise(const char* op, const Tensor& logits, const Tensor& noise) {
  check_device(op, "noise", noise, "logits", logits);
  check_dtype(op, "noise", noise, logits.scalar_type());
  check_sizes(op, "noise", noise, logits.sym_sizes(), "of logits");
}

void check(const Tensor& logits, const Parameters& p) {
  check_floating(kOp, "logits", logits);
  TORCH_CHECK(logits.dim() >= 1, kOp, ": logits must have shape [..., E], got a scalar");
  const auto num_experts = logits.sym_size(-1);
  TORCH_CHECK(num_experts >= 1, kOp,
              ": logits must have at least one expert in its last dimension, got ",
              logits.sym_sizes());
  TORCH_CHECK(p.top_k >= 1 && num_experts >= p.top_k, kOp,
              ": top_k must be from 1 to num_experts = ", num_experts, ", got ", p.top_k);
  parse_score_function(kOp, p.score_function, p.norm_topk_prob);
  if (p.expert_bias) {
    check_device(kOp, "expert_bias", *p.expert_bias, "logits", logits);
    const auto type = p.expert_bias->scalar_type();
    TORCH_CHECK(type == at::kFloat || (type == at::kDouble && logits.scalar_type() == at::kDouble),
                kOp, ": expert_bias must be float32 (a smaller type loses its updates), got ",
                type);
    check_sizes(kOp, "expert_bias", *p.expert_bias, {num_experts}, "[E]");
  }
  check_groups(num_experts, p);
  if (p.token_mask) check_token_mask(kOp, logits, *p.token_mask);
  check_segments(kOp, p.segment_ids, p.num_segments, "logits", logits);
  if (p.noise) check_noise(kOp, logits, *p.noise);
  if (p.forced_indices) {
    check_device(kOp, "forced_indices", *p.forced_indices, "logits", logits);
    check_dtype(kOp, "forced_indices", *p.forced_indices, at::kLong);
    c10::SymDimVector sizes(logits.sym_sizes().begin(), logits.sym_sizes().end());
    sizes.back() = p.top_k;
    check_sizes(kOp, "forced_indices", *p.forced_indices, sizes, "[..., K]");
  }
}

/// Without stats lse and sums are absent: each output makes a one-token call longer.
TopKGatingOutputs allocate(const Tensor& logits, const Parameters& p) {
  const auto num_experts = logits.sym_size(-1);
  const auto compute = accumulate_type(logits.scalar_type());
  c10::SymDimVector sizes(logits.sym_sizes().begin(), logits.sym_sizes().end());
  sizes.back() = p.top_k;
  const auto leading = c10::SymIntArrayRef(sizes).slice(0, sizes.size() - 1);
  const auto per_segment = [&](const c10::SymInt& width, at::ScalarType type) {
    return p.num_segments ? new_empty({*p.num_segments, width}, type, logits)
                          : new_empty({width}, type, logits);
  };
  return {new_empty(sizes, compute, logits), new_empty(sizes, at::kLong, logits),
          per_segment(num_experts, at::kLong),
          p.stats ? new_empty(leading, compute, logits) : Tensor(),
          p.stats ? per_segment(2 * num_experts + RoutingSums::kTail, compute) : Tensor()};
}

Results as_results(TopKGatingOutputs outputs) {
  return {std::move(outputs.topk_weights), std::move(outputs.topk_indices),
          std::move(outputs.tokens_per_expert), if_defined(std::move(outputs.lse)),
          if_defined(std::move(outputs.sums))};
}

Results topk_gating_meta(const Tensor& logits, const Parameters& p) {
  check(logits, p);
  return as_results(allocate(logits, p));
}

/// [..., last] as [T, last] with inner stride 1, without a copy where the layout allows it.
Tensor as_token_rows(const Tensor& tensor) {
  if (tensor.dim() == 2) return as_rows(tensor);
  return as_rows(tensor.reshape({tensor.numel() / tensor.size(-1), tensor.size(-1)}));
}

OptionalTensor as_token_rows(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_token_rows(*tensor)) : std::nullopt;
}

/// [...] as [T], contiguous.
OptionalTensor flat(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->reshape({-1}).contiguous()) : std::nullopt;
}

int64_t known_segments(const std::optional<c10::SymInt>& num_segments) {
  return num_segments ? num_segments->guard_int(__FILE__, __LINE__) : 1;
}

/// A mask as the kernels take it: bool, or weights of the compute type; contiguous.
OptionalTensor as_token_weights(const OptionalTensor& mask, at::ScalarType compute) {
  return !mask || mask->scalar_type() == at::kBool ? flat(mask) : flat(mask->to(compute));
}

template <void (*backend)(const TopKGatingArguments&, const TopKGatingOutputs&)>
Results topk_gating_run(const Tensor& logits, const Parameters& p) {
  check(logits, p);
  auto outputs = allocate(logits, p);
  if (logits.numel() == 0) {
    outputs.tokens_per_expert.zero_();
    if (p.stats) outputs.sums.zero_();
    return as_results(std::move(outputs));
  }
  const auto compute = accumulate_type(logits.scalar_type());
  const bool limited = p.group_topk && *p.group_topk < p.num_groups;
  backend(
      {as_token_rows(logits), as_token_rows(p.noise), p.top_k,
       parse_score_function(kOp, p.score_function, p.norm_topk_prob), p.norm_topk_prob,
       p.scaling_factor,
       p.expert_bias ? OptionalTensor(p.expert_bias->to(compute).contiguous()) : std::nullopt,
       limited ? p.num_groups : 1, limited ? *p.group_topk : 1, parse_group_score(p.group_score),
       p.forced_indices ? OptionalTensor(as_token_rows(*p.forced_indices).contiguous())
                        : std::nullopt,
       as_token_weights(p.token_mask, compute), flat(p.segment_ids), known_segments(p.num_segments),
       p.stats},
      outputs);
  return as_results(std::move(outputs));
}

void check_backward(const OptionalTensor& grad_weights, const BackwardParameters& p) {
  constexpr const char* op = "topk_gating_backward";
  const auto& logits = p.logits;
  check_floating(op, "logits", logits);
  TORCH_CHECK(logits.dim() >= 1 && p.topk_indices.dim() == logits.dim(), op,
              ": topk_indices must have shape [..., K] with the leading dimensions of logits, got ",
              p.topk_indices.sym_sizes());
  check_dtype(op, "topk_indices", p.topk_indices, at::kLong);
  check_device(op, "topk_indices", p.topk_indices, "logits", logits);
  const auto compute = accumulate_type(logits.scalar_type());
  const auto check_optional = [&](const char* name, const OptionalTensor& tensor,
                                  c10::SymIntArrayRef sizes, const char* meaning) {
    if (!tensor) return;
    check_dtype(op, name, *tensor, compute);
    check_device(op, name, *tensor, "logits", logits);
    check_sizes(op, name, *tensor, sizes, meaning);
  };
  const auto leading = logits.sym_sizes().slice(0, logits.dim() - 1);
  check_optional("grad_weights", grad_weights, p.topk_indices.sym_sizes(), "of topk_indices");
  check_optional("grad_lse", p.grad_lse, leading, "of logits without its last");
  check_optional("lse", p.lse, leading, "of logits without its last");
  if (p.token_mask) check_token_mask(op, logits, *p.token_mask);
  if (p.noise) check_noise(op, logits, *p.noise);
  const auto width = 2 * logits.sym_size(-1) + RoutingSums::kTail;
  check_segments(op, p.segment_ids, p.num_segments, "logits", logits);
  if (p.num_segments) {
    check_optional("grad_sums", p.grad_sums, {*p.num_segments, width}, "[S, 2 E + 5]");
  } else {
    check_optional("grad_sums", p.grad_sums, {width}, "[2 E + 5]");
  }
}

Tensor topk_gating_backward_meta(const OptionalTensor& grad_weights, const BackwardParameters& p) {
  check_backward(grad_weights, p);
  parse_score_function("topk_gating_backward", p.score_function, p.norm_topk_prob);
  return new_empty(p.logits.sym_sizes(), p.logits.scalar_type(), p.logits);
}

template <void (*backend)(const TopKGatingBackwardArguments&, const Tensor&)>
Tensor topk_gating_backward_run(const OptionalTensor& grad_weights, const BackwardParameters& p) {
  const auto grad_logits = topk_gating_backward_meta(grad_weights, p);
  if (p.logits.numel() == 0) return grad_logits;
  backend({contiguous(grad_weights), contiguous(p.grad_lse), contiguous(p.grad_sums),
           as_token_rows(p.logits), as_token_rows(p.noise),
           as_token_rows(p.topk_indices).contiguous(), contiguous(p.lse),
           parse_score_function("topk_gating_backward", p.score_function, p.norm_topk_prob),
           p.norm_topk_prob, p.scaling_factor,
           as_token_weights(p.token_mask, accumulate_type(p.logits.scalar_type())),
           flat(p.segment_ids), known_segments(p.num_segments)},
          as_token_rows(grad_logits));
  return grad_logits;
}

// ---- CPU ----------------------------------------------------------------------------------------

constexpr int64_t kSerialLogits = 16384;  // below this a second thread costs more than it brings
constexpr int64_t kMaxBlocks = 256;

/// What both directions know of the tokens; `token_weights` are of the compute type.
template <typename scalar_t, typename Arguments>
cpu::TopKGatingInput<scalar_t> input_rows(const Arguments& arguments, int64_t top_k,
                                          const OptionalTensor& token_weights) {
  using T = cpu::compute_t<scalar_t>;
  return {arguments.logits.template const_data_ptr<scalar_t>(),
          arguments.logits.stride(0),
          data_or_null<scalar_t>(arguments.noise),
          arguments.noise ? arguments.noise->stride(0) : 0,
          arguments.logits.size(1),
          top_k,
          arguments.score_function,
          arguments.norm_topk_prob,
          static_cast<T>(arguments.scaling_factor),
          data_or_null<T>(token_weights),
          data_or_null<int64_t>(arguments.segment_ids)};
}

/// Token weights of the compute type; values are checked here, before any kernel runs.
template <typename T>
OptionalTensor checked_token_weights(const OptionalTensor& mask) {
  if (!mask) return std::nullopt;
  const auto weights = mask->to(c10::CppTypeToScalarType<T>::value);
  if (mask->scalar_type() == at::kBool) return weights;
  const T* values = weights.template const_data_ptr<T>();
  for (int64_t t = 0; t < weights.numel(); ++t) {
    TORCH_CHECK(values[t] >= 0, kOp, ": token_mask must hold weights >= 0, got ", values[t],
                " for token ", t);
  }
  return weights;
}

void check_forced_values(const OptionalTensor& forced_indices, int64_t num_experts) {
  if (!forced_indices) return;
  const int64_t top_k = forced_indices->size(1);
  std::vector<int64_t> last_token(num_experts, -1);  // that was sent to an expert
  const int64_t* slot = forced_indices->const_data_ptr<int64_t>();
  for (int64_t t = 0; t < forced_indices->size(0); ++t) {
    for (int64_t k = 0; k < top_k; ++k, ++slot) {
      TORCH_CHECK(*slot >= -1 && *slot < num_experts, kOp,
                  ": forced_indices must be in [-1, num_experts) = [-1, ", num_experts, "), got ",
                  *slot, " for token ", t);
      if (*slot == -1) continue;
      TORCH_CHECK(last_token[*slot] != t, kOp, ": forced_indices must be different experts, got ",
                  *slot, " twice for token ", t);
      last_token[*slot] = t;
    }
  }
}

/// How a call is cut into blocks of tokens, each with partial results of its own for the segments
/// that it may meet. It depends on the shape and the segments only, and partial results are added
/// in the order of the blocks: the same bits for any number of threads.
struct BlockPlan {
  int64_t tokens_per_block, num_blocks;
  std::vector<int64_t> first_segment;  // [num_blocks] the lowest id in each block
  std::vector<int64_t> first_row;      // [num_blocks + 1] where its partial results begin
};

BlockPlan plan_blocks(int64_t num_tokens, int64_t num_experts, const OptionalTensor& segment_ids) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t block = std::max(
      {int64_t{64}, divide_up(kSerialLogits, num_experts), divide_up(num_tokens, kMaxBlocks)});
  const int64_t num_blocks = divide_up(num_tokens, block);
  const BlockPlan serial{num_tokens, 1, {}, {}};
  if (num_blocks == 1) return serial;
  BlockPlan plan{block, num_blocks, std::vector<int64_t>(num_blocks), {0}};
  for (int64_t b = 0; b < num_blocks; ++b) {
    int64_t rows = 1;
    if (segment_ids) {
      const int64_t* ids = segment_ids->const_data_ptr<int64_t>();
      const auto [low, high] =
          std::minmax_element(ids + b * block, ids + std::min(num_tokens, (b + 1) * block));
      plan.first_segment[b] = *low;
      rows = *high - *low + 1;
    }
    plan.first_row.push_back(plan.first_row.back() + rows);
  }
  // Many segments in no order: rather one block than memory without bound.
  constexpr int64_t kMaxPartials = int64_t{1} << 24;
  return plan.first_row.back() * RoutingSums::width(num_experts) > kMaxPartials ? serial : plan;
}

/// What a kernel works in, of one thread: on the stack for up to 256 experts, because a call
/// with one token would notice the heap.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t num_experts, int64_t top_k) {
    const int64_t needed = lines(cpu::topk_gating_scratch(num_experts, top_k));
    if (needed > kOnStack) on_heap_.reset(new Line[needed]);
  }
  T* get() { return (on_heap_ ? on_heap_.get() : on_stack_)->values; }

 private:
  struct alignas(64) Line {  // the widest vector
    T values[64 / sizeof(T)];
  };
  static constexpr int64_t lines(int64_t size) {
    return (size * static_cast<int64_t>(sizeof(T)) + 63) / 64;
  }
  static constexpr int64_t kOnStack = lines(cpu::topk_gating_scratch(256, 8));
  Line on_stack_[kOnStack];
  std::unique_ptr<Line[]> on_heap_;
};

void topk_gating_cpu(const TopKGatingArguments& arguments, const TopKGatingOutputs& outputs) {
  const int64_t num_tokens = arguments.logits.size(0), num_experts = arguments.logits.size(1);
  const int64_t num_segments = arguments.num_segments;
  check_segment_values(kOp, arguments.segment_ids, num_segments);
  check_forced_values(arguments.forced_indices, num_experts);
  const BlockPlan plan = plan_blocks(num_tokens, num_experts, arguments.segment_ids);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, arguments.logits.scalar_type(), kOp, [&] {
        using T = cpu::compute_t<scalar_t>;
        const auto token_weights = checked_token_weights<T>(arguments.token_mask);
        const cpu::TopKGatingRows<scalar_t> rows{
            input_rows<scalar_t>(arguments, arguments.top_k, token_weights),
            data_or_null<T>(arguments.expert_bias),
            arguments.num_groups,
            arguments.group_topk,
            arguments.group_score,
            data_or_null<int64_t>(arguments.forced_indices),
            outputs.topk_weights.mutable_data_ptr<T>(),
            outputs.topk_indices.mutable_data_ptr<int64_t>(),
            arguments.stats ? outputs.lse.mutable_data_ptr<T>() : nullptr};
        int64_t* const counts = outputs.tokens_per_expert.mutable_data_ptr<int64_t>();
        T* const sums = arguments.stats ? outputs.sums.mutable_data_ptr<T>() : nullptr;
        const int64_t width = arguments.stats ? RoutingSums::width(num_experts) : 0;
        std::fill_n(counts, num_segments * num_experts, 0);
        if (plan.num_blocks == 1) {
          std::fill_n(sums, num_segments * width, T(0));
          Scratch<T> scratch(num_experts, arguments.top_k);
          const cpu::TopKGatingTotals<T> totals{counts, sums, 0, num_segments};
          EQUIPOISE_CALL_CPU_KERNEL(topk_gating_rows<scalar_t>, rows, 0, num_tokens, totals,
                                    scratch.get());
          return;
        }

        const int64_t num_rows = plan.first_row.back();
        std::vector<int64_t> block_counts(num_rows * num_experts);
        std::vector<T> block_sums(num_rows * width);
        at::parallel_for(0, plan.num_blocks, 1, [&](int64_t begin, int64_t end) {
          Scratch<T> scratch(num_experts, arguments.top_k);
          for (int64_t b = begin; b < end; ++b) {
            const int64_t first_token = b * plan.tokens_per_block, row = plan.first_row[b];
            const cpu::TopKGatingTotals<T> totals{
                block_counts.data() + row * num_experts, block_sums.data() + row * width,
                plan.first_segment[b], plan.first_row[b + 1] - row};
            EQUIPOISE_CALL_CPU_KERNEL(topk_gating_rows<scalar_t>, rows, first_token,
                                      std::min(num_tokens, first_token + plan.tokens_per_block),
                                      totals, scratch.get());
          }
        });
        std::vector<double> total(num_segments * width);
        for (int64_t b = 0; b < plan.num_blocks; ++b) {
          for (int64_t row = plan.first_row[b]; row < plan.first_row[b + 1]; ++row) {
            const int64_t segment = plan.first_segment[b] + row - plan.first_row[b];
            for (int64_t e = 0; e < num_experts; ++e) {
              counts[segment * num_experts + e] += block_counts[row * num_experts + e];
            }
            for (int64_t i = 0; i < width; ++i) {
              total[segment * width + i] += block_sums[row * width + i];
            }
          }
        }
        std::copy(total.begin(), total.end(), sums);
      });
}

void topk_gating_backward_cpu(const TopKGatingBackwardArguments& arguments,
                              const Tensor& grad_logits) {
  const int64_t num_tokens = arguments.logits.size(0), num_experts = arguments.logits.size(1);
  const int64_t grain = std::max<int64_t>(1, kSerialLogits / num_experts);
  check_segment_values(kOp, arguments.segment_ids, arguments.num_segments);
  advise_huge_pages(grad_logits);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, arguments.logits.scalar_type(), kOp, [&] {
        using T = cpu::compute_t<scalar_t>;
        const auto token_weights = checked_token_weights<T>(arguments.token_mask);
        const cpu::TopKGatingBackwardRows<scalar_t> rows{
            input_rows<scalar_t>(arguments, arguments.topk_indices.size(1), token_weights),
            data_or_null<T>(arguments.grad_weights),
            data_or_null<T>(arguments.grad_lse),
            data_or_null<T>(arguments.grad_sums),
            arguments.topk_indices.const_data_ptr<int64_t>(),
            grad_logits.mutable_data_ptr<scalar_t>()};
        at::parallel_for(0, num_tokens, grain, [&](int64_t begin, int64_t end) {
          Scratch<T> scratch(num_experts, rows.top_k);
          EQUIPOISE_CALL_CPU_KERNEL(topk_gating_backward_rows<scalar_t>, rows, begin, end,
                                    scratch.get());
        });
      });
}

// ---- autograd -----------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Only results that have a gradient pass through, because each costs time; `results` receives all.
struct TopKGating : torch::autograd::Function<TopKGating> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& logits,
                               const OptionalTensor& noise, const Parameters& p, Results& results) {
    {
      at::AutoDispatchBelowADInplaceOrView below;
      results = call_op(logits, p);
    }
    const auto& [weights, indices, counts, lse, sums] = results;
    const auto detached = [](const OptionalTensor& tensor) {
      return tensor ? tensor->detach() : Tensor();
    };
    ctx->save_for_backward({logits, indices, lse.value_or(Tensor()), detached(p.token_mask),
                            detached(p.segment_ids), noise.value_or(Tensor())});
    ctx->saved_data["parameters"] =
        SavedParameters(p.score_function, p.norm_topk_prob, p.scaling_factor);
    if (p.num_segments) ctx->saved_data["num_segments"] = *p.num_segments;
    ctx->set_materialize_grads(false);
    if (!p.stats) return {weights};
    return {weights, *lse, *sums};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto grad_weights = if_defined(grads[0]);
    const auto grad_lse = grads.size() > 1 ? if_defined(grads[1]) : std::nullopt;
    const auto grad_sums = grads.size() > 1 ? if_defined(grads[2]) : std::nullopt;
    if (!grad_weights && !grad_lse && !grad_sums) return {Tensor(), Tensor(), Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const auto [score_function, norm_topk_prob, scaling_factor] =
        ctx->saved_data["parameters"].to<SavedParameters>();
    std::optional<c10::SymInt> num_segments;
    if (saved[4].defined()) num_segments = ctx->saved_data["num_segments"].toSymInt();
    const auto grad = call_backward_op(
        grad_weights, {grad_lse, grad_sums, saved[0], saved[1], if_defined(saved[2]),
                       score_function, norm_topk_prob, scaling_factor, if_defined(saved[3]),
                       if_defined(saved[4]), num_segments, if_defined(saved[5])});
    return {grad, saved[5].defined() ? grad : Tensor(), Tensor(), Tensor()};
  }

 private:
  /// score_function, norm_topk_prob, scaling_factor
  using SavedParameters = std::tuple<std::string, bool, double>;
};

Results topk_gating_autograd(const Tensor& logits, const Parameters& p) {
  if (!differentiating(logits, p.noise)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_op(logits, p);
  }
  Results results;
  const auto outputs = TopKGating::apply(logits, p.noise, p, results);
  auto& [weights, indices, counts, lse, sums] = results;
  weights = outputs[0];
  if (p.stats) {
    lse = outputs[1];
    sums = outputs[2];
  }
  return results;
}

/// y = log s(x) of scores that are not the softmax of x, and phi = dy/dx; x is finite.
std::pair<Tensor, Tensor> log_score(const Tensor& x, ScoreFunction score_function) {
  if (score_function == ScoreFunction::kSigmoid) return {at::log_sigmoid(x), at::sigmoid(-x)};
  // Further down softplus(x) is exp(x), to the last bit.
  const auto clamped = x.clamp_min(-37);
  const auto softplus = -at::log_sigmoid(-clamped);
  return {(softplus.log() + (x - clamped)) / 2, at::sigmoid(clamped) / (2 * softplus)};
}

/// The backward in ATen calls: what the kernels compute, differentiable to any order.
Tensor topk_gating_backward_composite(const OptionalTensor& grad_weights,
                                      const BackwardParameters& p) {
  const auto& indices = p.topk_indices;
  const auto score_function =
      parse_score_function("topk_gating_backward", p.score_function, p.norm_topk_prob);
  const bool scored =
      score_function == ScoreFunction::kSigmoid || score_function == ScoreFunction::kSqrtSoftplus;
  const auto compute = accumulate_type(p.logits.scalar_type());
  const auto negative_infinity = -std::numeric_limits<double>::infinity();
  const auto num_experts = p.logits.sym_size(-1);
  const auto wide = p.noise ? p.logits.to(compute) + p.noise->to(compute) : p.logits.to(compute);
  const auto absent = wide.isnan().logical_or(wide == negative_infinity);
  auto row_counts = absent.logical_not().any(-1, /*keepdim=*/true);
  if (p.token_mask) row_counts = row_counts.logical_and(p.token_mask->unsqueeze(-1) > 0);
  Tensor segment_ids;  // a bad one masks its token
  if (p.segment_ids) {
    segment_ids = p.segment_ids->clamp_min(0).clamp_max(*p.num_segments - 1);
    row_counts = row_counts.logical_and((segment_ids == *p.segment_ids).unsqueeze(-1));
  }
  // A masked row gets finite numbers and is zeroed at the end.
  const auto left_out = absent.logical_and(row_counts);
  const auto finite = wide.masked_fill(absent, 0).clamp_max(1e18);
  const auto x = finite.masked_fill(left_out, negative_infinity);
  Tensor y = finite, phi;
  if (scored) std::tie(y, phi) = log_score(finite, score_function);
  const auto log_prob = y.masked_fill(left_out, negative_infinity).log_softmax(-1);
  const auto prob = log_prob.exp();

  auto grad = at::zeros_like(prob);  // with respect to y
  if (grad_weights) {
    const auto slots = (indices >= 0).logical_and(row_counts);
    const auto safe = indices.clamp_min(0);
    const auto g = p.scaling_factor * grad_weights->masked_fill(slots.logical_not(), 0);
    if (p.norm_topk_prob) {
      // An empty slot gets a number so low that its weight is 0; a row of them stays finite.
      const auto r = y.gather(-1, safe).masked_fill(slots.logical_not(), -1e30).softmax(-1);
      const auto mean = (g * r).sum(-1, /*keepdim=*/true);
      grad = grad.scatter_add(-1, safe, (r * (g - mean)).masked_fill(slots.logical_not(), 0));
    } else if (score_function == ScoreFunction::kSoftmax) {
      const auto weighted = g * prob.gather(-1, safe);
      grad = grad.scatter_add(-1, safe, weighted) - prob * weighted.sum(-1, /*keepdim=*/true);
    } else {
      grad = grad.scatter_add(-1, safe, scored ? g * y.gather(-1, safe).exp() : g);
    }
  }
  const auto token_weight =
      p.token_mask ? p.token_mask->to(compute).unsqueeze(-1) : at::ones_like(prob.narrow(-1, 0, 1));
  Tensor grad_lse = p.grad_lse ? p.grad_lse->unsqueeze(-1) : Tensor();
  if (p.grad_sums) {
    auto grad_sums = *p.grad_sums;  // of each token, where there are segments
    if (p.segment_ids) {
      c10::SymDimVector sizes(p.logits.sym_sizes().begin(), p.logits.sym_sizes().end());
      sizes.back() = grad_sums.sym_size(1);
      grad_sums = grad_sums.index_select(0, segment_ids.reshape(-1)).view_symint(sizes);
    }
    const auto a = grad_sums.narrow_symint(-1, 0, num_experts);
    // RoutingSums::lse_squared and RoutingSums::entropy, with symbolic sizes.
    const auto grad_lse_squared = grad_sums.narrow_symint(-1, 2 * num_experts + 1, 1);
    const auto grad_entropy = grad_sums.narrow_symint(-1, 2 * num_experts + 2, 1);
    const auto finite_log_prob = log_prob.masked_fill(left_out, 0);
    const auto entropy = -(prob * finite_log_prob).sum(-1, /*keepdim=*/true);
    grad = grad + token_weight * prob *
                      (a - (a * prob).sum(-1, /*keepdim=*/true) -
                       grad_entropy * (finite_log_prob + entropy));
    const auto of_square = 2 * token_weight * grad_lse_squared * x.logsumexp(-1, /*keepdim=*/true);
    grad_lse = grad_lse.defined() ? grad_lse + of_square : of_square;
  }
  if (scored) grad = grad * phi;
  if (grad_lse.defined()) grad = grad + grad_lse * (scored ? x.softmax(-1) : prob);
  return grad.masked_fill(absent.logical_or(row_counts.logical_not()), 0)
      .to(p.logits.scalar_type());
}

Tensor topk_gating_backward_autograd(const OptionalTensor& grad_weights,
                                     const BackwardParameters& p) {
  if (differentiating(grad_weights, p.grad_lse, p.grad_sums, p.logits, p.noise)) {
    check_backward(grad_weights, p);
    return topk_gating_backward_composite(grad_weights, p);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward_op(grad_weights, p);
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) {
  m.impl("topk_gating", WithSchema<topk_gating_meta, Parameters, Signature>::call);
  m.impl("topk_gating_backward",
         WithSchema<topk_gating_backward_meta, BackwardParameters, BackwardSignature>::call);
}
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl("topk_gating", WithSchema<topk_gating_run<topk_gating_cpu>, Parameters, Signature>::call);
  m.impl("topk_gating_backward", WithSchema<topk_gating_backward_run<topk_gating_backward_cpu>,
                                            BackwardParameters, BackwardSignature>::call);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl("topk_gating", WithSchema<topk_gating_run<topk_gating_cuda>, Parameters, Signature>::call);
  m.impl("topk_gating_backward", WithSchema<topk_gating_backward_run<topk_gating_backward_cuda>,
                                            BackwardParameters, BackwardSignature>::call);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {
  m.impl("topk_gating", WithSchema<topk_gating_autograd, Parameters, Signature>::call);
  m.impl("topk_gating_backward",
         WithSchema<topk_gating_backward_autograd, BackwardParameters, BackwardSignature>::call);
}

}  // namespace

// ---- the public function ------------------------------------------------------------------------

RoutingResult topk_gating(const Tensor& logits, int64_t top_k, const TopKGatingOptions& options) {
  auto [weights, indices, counts, lse, sums] = call_op(
      logits, {top_k, options.score_function(), options.norm_topk_prob(), options.scaling_factor(),
               options.expert_bias(), options.num_groups(), options.group_topk(),
               options.group_score(), options.token_mask(), options.segment_ids(),
               options.num_segments(), options.noise(), options.forced_indices(), options.stats()});
  return {weights, indices, counts, lse.value_or(Tensor()), sums.value_or(Tensor())};
}

Tensor segment_ids_from_cu_seqlens(const Tensor& cu_seqlens, int64_t num_tokens) {
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1,
              "segment_ids_from_cu_seqlens: cu_seqlens must have shape [S + 1], got ",
              cu_seqlens.sizes());
  const auto tokens = at::arange(num_tokens, cu_seqlens.options().dtype(at::kLong));
  return at::bucketize(tokens, cu_seqlens.slice(0, 1).to(at::kLong), /*out_int32=*/false,
                       /*right=*/true);
}

namespace {
const Tensor& stats_of(const RoutingResult& routing) {
  TORCH_CHECK(routing.sums.defined(),
              "RoutingResult has no statistics: topk_gating got stats = false");
  return routing.sums;
}
}  // namespace

int64_t RoutingResult::num_experts() const { return tokens_per_expert.size(-1); }
int64_t RoutingResult::top_k() const { return topk_indices.size(-1); }
Tensor RoutingResult::prob_sum() const {
  return stats_of(*this).narrow(-1, RoutingSums::prob, num_experts());
}
Tensor RoutingResult::load() const {
  return stats_of(*this).narrow(-1, RoutingSums::load(num_experts()), num_experts());
}
Tensor RoutingResult::num_tokens() const {
  return stats_of(*this).select(-1, RoutingSums::weight(num_experts()));
}
Tensor RoutingResult::num_nan_rows() const {
  return stats_of(*this).select(-1, RoutingSums::nan_rows(num_experts())).sum();
}
Tensor RoutingResult::num_invalid() const {
  return stats_of(*this).select(-1, RoutingSums::invalid(num_experts())).sum();
}

}  // namespace equipoise
