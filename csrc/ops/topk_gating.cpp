// SPDX-License-Identifier: Apache-2.0
// topk_gating: schema -> checks and shapes -> CPU -> autograd -> registration, top to bottom.
// Kernels: ../cpu/topk_gating.cpp and ../../cuda/topk_gating.cu.
#include "topk_gating.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../autograd.h"
#include "../checks.h"
#include "../cpu/dispatch.h"
#include "../cpu/topk_gating.h"
#include "../library.h"
#include "../optional_tensor.h"
#include "topk_gating_arguments.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

EQUIPOISE_DECLARE_CPU_KERNEL(template <typename scalar_t>
                             void topk_gating_rows(const TopKGatingRows<scalar_t>&, int64_t,
                                                   int64_t, int64_t*, compute_t<scalar_t>*,
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
      "(Tensor topk_weights, Tensor topk_indices, Tensor tokens_per_expert, Tensor lse, "
      "Tensor sums)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "topk_gating_backward(Tensor? grad_weights, Tensor? grad_lse, Tensor? grad_sums, "
      "Tensor logits, Tensor topk_indices, Tensor? lse, str score_function, "
      "bool norm_topk_prob, float scaling_factor, Tensor? token_mask=None, "
      "Tensor? segment_ids=None, Tensor? noise=None) -> Tensor grad_logits",
      {at::Tag::pt2_compliant_tag});
}

/// The arguments of the schema behind `logits`, in its order.
struct Parameters {
  int64_t top_k;
  std::string_view score_function;
  bool norm_topk_prob;
  double scaling_factor;
  OptionalTensor expert_bias;
  int64_t num_groups;
  std::optional<int64_t> group_topk;
  std::string_view group_score;
  OptionalTensor token_mask;
  OptionalTensor segment_ids;
  std::optional<c10::SymInt> num_segments;
  OptionalTensor noise;
  OptionalTensor forced_indices;
  bool stats;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
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
                                 const OptionalTensor&);

Tensor call_backward_op(const OptionalTensor& grad_weights, const OptionalTensor& grad_lse,
                        const OptionalTensor& grad_sums, const Tensor& logits,
                        const Tensor& topk_indices, const OptionalTensor& lse,
                        std::string_view score_function, bool norm_topk_prob, double scaling_factor,
                        const OptionalTensor& token_mask) {
  static const auto op = find_op<BackwardSignature>("topk_gating_backward");
  return op.call(grad_weights, grad_lse, grad_sums, logits, topk_indices, lse, score_function,
                 norm_topk_prob, scaling_factor, token_mask, std::nullopt, std::nullopt);
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

constexpr const char* kOp = "topk_gating";

void check_score_function(std::string_view name) {
  TORCH_CHECK(name == "softmax", kOp, ": score_function must be 'softmax' in this version, got '",
              name, "'");
}

void check_token_mask(const Tensor& logits, const Tensor& mask) {
  check_device(kOp, "token_mask", mask, "logits", logits);
  TORCH_CHECK(mask.scalar_type() == at::kBool || mask.is_floating_point(), kOp,
              ": token_mask must be bool or floating weights, got ", mask.scalar_type());
  check_sizes(kOp, "token_mask", mask, logits.sym_sizes().slice(0, logits.dim() - 1),
              "of logits without its last");
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
  check_score_function(p.score_function);
  if (p.expert_bias) {
    check_device(kOp, "expert_bias", *p.expert_bias, "logits", logits);
    const auto type = p.expert_bias->scalar_type();
    TORCH_CHECK(type == at::kFloat || (type == at::kDouble && logits.scalar_type() == at::kDouble),
                kOp, ": expert_bias must be float32 (a smaller type loses its updates), got ",
                type);
    check_sizes(kOp, "expert_bias", *p.expert_bias, {num_experts}, "[E]");
  }
  if (p.token_mask) check_token_mask(logits, *p.token_mask);
  TORCH_CHECK(p.num_groups == 1 && !p.group_topk, kOp,
              ": num_groups must be 1 in this version, got ", p.num_groups);
  TORCH_CHECK(!p.segment_ids && !p.num_segments, kOp,
              ": segment_ids are not accepted in this version");
  TORCH_CHECK(!p.noise, kOp, ": noise is not accepted in this version; add it to the logits");
  TORCH_CHECK(!p.forced_indices, kOp, ": forced_indices are not accepted in this version");
}

Results allocate(const Tensor& logits, const Parameters& p) {
  const auto num_experts = logits.sym_size(-1);
  const auto compute = logits.options().dtype(accumulate_type(logits.scalar_type()));
  const auto integer = logits.options().dtype(at::kLong);
  c10::SymDimVector sizes(logits.sym_sizes().begin(), logits.sym_sizes().end());
  sizes.back() = p.top_k;
  const auto weights = at::empty_symint(sizes, compute);
  const auto indices = at::empty_symint(sizes, integer);
  sizes.pop_back();
  const auto counts = at::empty_symint({num_experts}, integer);
  if (!p.stats) return {weights, indices, counts, at::empty({0}, compute), at::empty({0}, compute)};
  return {weights, indices, counts, at::empty_symint(sizes, compute),
          at::empty_symint({2 * num_experts + RoutingSums::kTail}, compute)};
}

Results topk_gating_meta(const Tensor& logits, const Parameters& p) {
  check(logits, p);
  return allocate(logits, p);
}

/// [..., last] as [T, last] with inner stride 1, without a copy where the layout allows it.
Tensor as_rows(const Tensor& tensor) {
  const auto rows = tensor.dim() == 2
                        ? tensor
                        : tensor.reshape({tensor.numel() / tensor.size(-1), tensor.size(-1)});
  return rows.size(1) == 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

/// A mask as the kernels take it: bool, or weights of the compute type; contiguous.
OptionalTensor as_token_weights(const OptionalTensor& mask, at::ScalarType compute) {
  if (!mask) return std::nullopt;
  return (mask->scalar_type() == at::kBool ? *mask : mask->to(compute)).reshape({-1}).contiguous();
}

template <void (*backend)(const TopKGatingArguments&, const TopKGatingOutputs&)>
Results topk_gating_run(const Tensor& logits, const Parameters& p) {
  check(logits, p);
  const auto results = allocate(logits, p);
  const auto& [weights, indices, counts, lse, sums] = results;
  if (logits.numel() == 0) {
    counts.zero_();
    sums.zero_();
    return results;
  }
  const auto compute = accumulate_type(logits.scalar_type());
  TopKGatingArguments arguments{as_rows(logits),  p.top_k,
                                p.norm_topk_prob, p.scaling_factor,
                                std::nullopt,     as_token_weights(p.token_mask, compute),
                                p.stats};
  if (p.expert_bias) arguments.expert_bias = p.expert_bias->to(compute).contiguous();
  backend(arguments, {as_rows(weights), as_rows(indices), counts, lse, sums});
  return results;
}

void check_backward(const OptionalTensor& grad_weights, const OptionalTensor& grad_lse,
                    const OptionalTensor& grad_sums, const Tensor& logits,
                    const Tensor& topk_indices, const OptionalTensor& lse) {
  constexpr const char* op = "topk_gating_backward";
  check_floating(op, "logits", logits);
  TORCH_CHECK(logits.dim() >= 1 && topk_indices.dim() == logits.dim(), op,
              ": topk_indices must have shape [..., K] with the leading dimensions of logits, got ",
              topk_indices.sym_sizes());
  check_dtype(op, "topk_indices", topk_indices, at::kLong);
  check_device(op, "topk_indices", topk_indices, "logits", logits);
  const auto compute = accumulate_type(logits.scalar_type());
  const auto check_optional = [&](const char* name, const OptionalTensor& tensor,
                                  c10::SymIntArrayRef sizes, const char* meaning) {
    if (!tensor) return;
    check_dtype(op, name, *tensor, compute);
    check_device(op, name, *tensor, "logits", logits);
    check_sizes(op, name, *tensor, sizes, meaning);
  };
  const auto width = 2 * logits.sym_size(-1) + RoutingSums::kTail;
  const auto leading = logits.sym_sizes().slice(0, logits.dim() - 1);
  check_optional("grad_weights", grad_weights, topk_indices.sym_sizes(), "of topk_indices");
  check_optional("grad_lse", grad_lse, leading, "of logits without its last");
  check_optional("lse", lse, leading, "of logits without its last");
  check_optional("grad_sums", grad_sums, {width}, "[2 E + 5]");
}

Tensor topk_gating_backward_meta(const OptionalTensor& grad_weights, const OptionalTensor& grad_lse,
                                 const OptionalTensor& grad_sums, const Tensor& logits,
                                 const Tensor& topk_indices, const OptionalTensor& lse,
                                 std::string_view score_function, bool, double,
                                 const OptionalTensor& token_mask, const OptionalTensor&,
                                 const OptionalTensor&) {
  check_backward(grad_weights, grad_lse, grad_sums, logits, topk_indices, lse);
  check_score_function(score_function);
  if (token_mask) check_token_mask(logits, *token_mask);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

template <void (*backend)(const TopKGatingBackwardArguments&, const Tensor&)>
Tensor topk_gating_backward_run(const OptionalTensor& grad_weights, const OptionalTensor& grad_lse,
                                const OptionalTensor& grad_sums, const Tensor& logits,
                                const Tensor& topk_indices, const OptionalTensor& lse,
                                std::string_view score_function, bool norm_topk_prob,
                                double scaling_factor, const OptionalTensor& token_mask,
                                const OptionalTensor& segment_ids, const OptionalTensor& noise) {
  const auto grad_logits = topk_gating_backward_meta(
      grad_weights, grad_lse, grad_sums, logits, topk_indices, lse, score_function, norm_topk_prob,
      scaling_factor, token_mask, segment_ids, noise);
  if (logits.numel() == 0) return grad_logits;
  backend({contiguous(grad_weights), contiguous(grad_lse), contiguous(grad_sums), as_rows(logits),
           as_rows(topk_indices).contiguous(), contiguous(lse),
           as_token_weights(token_mask, accumulate_type(logits.scalar_type())), norm_topk_prob,
           scaling_factor},
          as_rows(grad_logits));
  return grad_logits;
}

// ---- CPU ----------------------------------------------------------------------------------------

constexpr int64_t kSerialLogits = 16384;  // below this a second thread costs more than it brings
constexpr int64_t kMaxBlocks = 256;

/// Tokens per block. Partial sums are kept per block and added in block order, so this must depend
/// on the shape only: then the result has the same bits for any number of threads.
int64_t block_tokens(int64_t num_tokens, int64_t num_experts) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  return std::max(
      {int64_t{64}, divide_up(kSerialLogits, num_experts), divide_up(num_tokens, kMaxBlocks)});
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

void topk_gating_cpu(const TopKGatingArguments& arguments, const TopKGatingOutputs& outputs) {
  const int64_t num_tokens = arguments.logits.size(0), num_experts = arguments.logits.size(1);
  const int64_t block = block_tokens(num_tokens, num_experts);
  const int64_t num_blocks = (num_tokens + block - 1) / block;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, arguments.logits.scalar_type(), kOp, [&] {
        using T = cpu::compute_t<scalar_t>;
        const auto token_weights = checked_token_weights<T>(arguments.token_mask);
        const cpu::TopKGatingRows<scalar_t> rows{
            arguments.logits.const_data_ptr<scalar_t>(),
            arguments.logits.stride(0),
            num_experts,
            arguments.top_k,
            arguments.norm_topk_prob,
            static_cast<T>(arguments.scaling_factor),
            data_or_null<T>(arguments.expert_bias),
            data_or_null<T>(token_weights),
            outputs.topk_weights.mutable_data_ptr<T>(),
            outputs.topk_indices.mutable_data_ptr<int64_t>(),
            arguments.stats ? outputs.lse.mutable_data_ptr<T>() : nullptr};
        int64_t* counts = outputs.tokens_per_expert.mutable_data_ptr<int64_t>();
        T* sums = arguments.stats ? outputs.sums.mutable_data_ptr<T>() : nullptr;
        const int64_t width = outputs.sums.numel();

        std::vector<int64_t> block_counts(num_blocks * num_experts);
        std::vector<T> block_sums(num_blocks * width);
        at::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
          std::vector<T> scratch(cpu::topk_gating_scratch(num_experts));
          for (int64_t b = begin; b < end; ++b) {
            EQUIPOISE_CALL_CPU_KERNEL(topk_gating_rows<scalar_t>, rows, b * block,
                                      std::min(num_tokens, (b + 1) * block),
                                      block_counts.data() + b * num_experts,
                                      block_sums.data() + b * width, scratch.data());
          }
        });
        for (int64_t e = 0; e < num_experts; ++e) {
          counts[e] = 0;
          for (int64_t b = 0; b < num_blocks; ++b) counts[e] += block_counts[b * num_experts + e];
        }
        for (int64_t i = 0; i < width; ++i) {
          double total = 0;
          for (int64_t b = 0; b < num_blocks; ++b) total += block_sums[b * width + i];
          sums[i] = static_cast<T>(total);
        }
      });
}

void topk_gating_backward_cpu(const TopKGatingBackwardArguments& arguments,
                              const Tensor& grad_logits) {
  const int64_t num_tokens = arguments.logits.size(0), num_experts = arguments.logits.size(1);
  const int64_t grain = std::max<int64_t>(1, kSerialLogits / num_experts);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, arguments.logits.scalar_type(), kOp, [&] {
        using T = cpu::compute_t<scalar_t>;
        const auto token_weights = checked_token_weights<T>(arguments.token_mask);
        const cpu::TopKGatingBackwardRows<scalar_t> rows{
            data_or_null<T>(arguments.grad_weights),
            data_or_null<T>(arguments.grad_lse),
            data_or_null<T>(arguments.grad_sums),
            arguments.logits.const_data_ptr<scalar_t>(),
            arguments.logits.stride(0),
            num_experts,
            arguments.topk_indices.size(1),
            arguments.norm_topk_prob,
            static_cast<T>(arguments.scaling_factor),
            arguments.topk_indices.const_data_ptr<int64_t>(),
            data_or_null<T>(token_weights),
            grad_logits.mutable_data_ptr<scalar_t>()};
        at::parallel_for(0, num_tokens, grain, [&](int64_t begin, int64_t end) {
          std::vector<T> scratch(cpu::topk_gating_scratch(num_experts));
          EQUIPOISE_CALL_CPU_KERNEL(topk_gating_backward_rows<scalar_t>, rows, begin, end,
                                    scratch.data());
        });
      });
}

// ---- autograd -----------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct TopKGating : torch::autograd::Function<TopKGating> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Parameters& p) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [weights, indices, counts, lse, sums] = call_op(logits, p);
    ctx->save_for_backward({logits, indices, p.stats ? lse : Tensor(),
                            p.token_mask ? p.token_mask->detach() : Tensor()});
    ctx->saved_data["score_function"] = std::string(p.score_function);
    ctx->saved_data["norm_topk_prob"] = p.norm_topk_prob;
    ctx->saved_data["scaling_factor"] = p.scaling_factor;
    ctx->set_materialize_grads(false);
    if (p.stats) {
      ctx->mark_non_differentiable({indices, counts});
    } else {
      ctx->mark_non_differentiable({indices, counts, lse, sums});
    }
    return {weights, indices, counts, lse, sums};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto &grad_weights = grads[0], &grad_lse = grads[3], &grad_sums = grads[4];
    if (!grad_weights.defined() && !grad_lse.defined() && !grad_sums.defined())
      return {Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    return {call_backward_op(if_defined(grad_weights), if_defined(grad_lse), if_defined(grad_sums),
                             saved[0], saved[1], if_defined(saved[2]),
                             ctx->saved_data["score_function"].toStringRef(),
                             ctx->saved_data["norm_topk_prob"].toBool(),
                             ctx->saved_data["scaling_factor"].toDouble(), if_defined(saved[3])),
            Tensor()};
  }
};

Results topk_gating_autograd(const Tensor& logits, const Parameters& p) {
  auto results = TopKGating::apply(logits, p);
  return {results[0], results[1], results[2], results[3], results[4]};
}

/// The backward in ATen calls: what the kernels compute, differentiable to any order.
Tensor topk_gating_backward_composite(const OptionalTensor& grad_weights,
                                      const OptionalTensor& grad_lse,
                                      const OptionalTensor& grad_sums, const Tensor& logits,
                                      const Tensor& indices, bool norm_topk_prob,
                                      double scaling_factor, const OptionalTensor& token_mask) {
  const auto compute = accumulate_type(logits.scalar_type());
  const auto negative_infinity = -std::numeric_limits<double>::infinity();
  const auto num_experts = logits.sym_size(-1);
  const auto wide = logits.to(compute);
  const auto absent = wide.isnan().logical_or(wide == negative_infinity);
  auto row_counts =
      indices.narrow(-1, 0, 1) >= 0;  // [..., 1]; its first slot is filled unless the row is masked
  if (token_mask) row_counts = row_counts.logical_and(token_mask->unsqueeze(-1) > 0);
  const auto left_out =
      absent.logical_and(row_counts);  // a masked row gets finite numbers and is zeroed at the end
  const auto x =
      wide.masked_fill(absent, 0).clamp_max(1e18).masked_fill(left_out, negative_infinity);
  const auto log_p = x.log_softmax(-1);
  const auto p = log_p.exp();
  const auto finite_log_p = log_p.masked_fill(left_out, 0);
  const auto token_weight =
      token_mask ? token_mask->to(compute).unsqueeze(-1) : at::zeros_like(p).narrow(-1, 0, 1) + 1;

  auto grad = at::zeros_like(p);
  if (grad_weights) {
    const auto slots = (indices >= 0).logical_and(row_counts);
    const auto safe = indices.clamp_min(0);
    const auto g = grad_weights->masked_fill(slots.logical_not(), 0);
    if (norm_topk_prob) {
      // An empty slot gets the lowest finite number: its weight is 0, and a masked row stays
      // finite.
      const auto q = x.gather(-1, safe).masked_fill(slots.logical_not(), -1e30).softmax(-1);
      const auto mean = (g * q).sum(-1, /*keepdim=*/true);
      grad = grad.scatter_add(
          -1, safe, (scaling_factor * q * (g - mean)).masked_fill(slots.logical_not(), 0));
    } else {
      const auto weighted = scaling_factor * g * p.gather(-1, safe);
      grad = grad.scatter_add(-1, safe, weighted) - p * weighted.sum(-1, /*keepdim=*/true);
    }
  }
  if (grad_sums) {
    const auto a = grad_sums->narrow_symint(0, 0, num_experts);
    // RoutingSums::lse_squared and RoutingSums::entropy, with symbolic sizes.
    const auto grad_lse_squared = grad_sums->narrow_symint(0, 2 * num_experts + 1, 1);
    const auto grad_entropy = grad_sums->narrow_symint(0, 2 * num_experts + 2, 1);
    const auto lse = x.logsumexp(-1, /*keepdim=*/true);
    const auto entropy = -(p * finite_log_p).sum(-1, /*keepdim=*/true);
    grad = grad + token_weight * p *
                      (a - (a * p).sum(-1, /*keepdim=*/true) + 2 * grad_lse_squared * lse -
                       grad_entropy * (finite_log_p + entropy));
  }
  if (grad_lse) grad = grad + grad_lse->unsqueeze(-1) * p;
  return grad.masked_fill(absent.logical_or(row_counts.logical_not()), 0).to(logits.scalar_type());
}

Tensor topk_gating_backward_autograd(const OptionalTensor& grad_weights,
                                     const OptionalTensor& grad_lse,
                                     const OptionalTensor& grad_sums, const Tensor& logits,
                                     const Tensor& topk_indices, const OptionalTensor& lse,
                                     std::string_view score_function, bool norm_topk_prob,
                                     double scaling_factor, const OptionalTensor& token_mask,
                                     const OptionalTensor&, const OptionalTensor&) {
  if (differentiating(grad_weights, grad_lse, grad_sums, logits)) {
    check_backward(grad_weights, grad_lse, grad_sums, logits, topk_indices, lse);
    return topk_gating_backward_composite(grad_weights, grad_lse, grad_sums, logits, topk_indices,
                                          norm_topk_prob, scaling_factor, token_mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward_op(grad_weights, grad_lse, grad_sums, logits, topk_indices, lse,
                          score_function, norm_topk_prob, scaling_factor, token_mask);
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) {
  m.impl("topk_gating", WithSchema<topk_gating_meta, Parameters, Signature>::call);
  m.impl("topk_gating_backward", topk_gating_backward_meta);
}
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl("topk_gating", WithSchema<topk_gating_run<topk_gating_cpu>, Parameters, Signature>::call);
  m.impl("topk_gating_backward", topk_gating_backward_run<topk_gating_backward_cpu>);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl("topk_gating", WithSchema<topk_gating_run<topk_gating_cuda>, Parameters, Signature>::call);
  m.impl("topk_gating_backward", topk_gating_backward_run<topk_gating_backward_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {
  m.impl("topk_gating", WithSchema<topk_gating_autograd, Parameters, Signature>::call);
  m.impl("topk_gating_backward", topk_gating_backward_autograd);
}

}  // namespace

// ---- the public function ------------------------------------------------------------------------

RoutingResult topk_gating(const Tensor& logits, int64_t top_k, const TopKGatingOptions& options) {
  auto [weights, indices, counts, lse, sums] = call_op(
      logits, {top_k, options.score_function(), options.norm_topk_prob(), options.scaling_factor(),
               options.expert_bias(), options.num_groups(), options.group_topk(),
               options.group_score(), options.token_mask(), options.segment_ids(),
               options.num_segments(), options.noise(), options.forced_indices(), options.stats()});
  return {weights, indices, counts, lse, sums};
}

int64_t RoutingResult::num_experts() const { return tokens_per_expert.size(-1); }
int64_t RoutingResult::top_k() const { return topk_indices.size(-1); }
Tensor RoutingResult::prob_sum() const { return sums.narrow(-1, RoutingSums::prob, num_experts()); }
Tensor RoutingResult::load() const {
  return sums.narrow(-1, RoutingSums::load(num_experts()), num_experts());
}
Tensor RoutingResult::num_tokens() const {
  return sums.select(-1, RoutingSums::weight(num_experts()));
}
Tensor RoutingResult::num_nan_rows() const {
  return sums.select(-1, RoutingSums::nan_rows(num_experts()));
}

}  // namespace equipoise
