// SPDX-License-Identifier: Apache-2.0
// Argument checks shared by the Meta, CPU and CUDA side of every op. Each names the op, the
// argument, what is allowed and what came. Sizes are SymInt, so that the same check serves tracing.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <optional>

namespace equipoise {

inline void check_floating(const char* op, const char* argument, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op,
      ": ", argument, " must be float32, float64, bfloat16 or float16, got ", type);
}

inline bool has_8_bits(at::ScalarType type) {
  return type == at::kByte || type == at::kChar || c10::isFloat8Type(type);
}

/// Rows that are only moved may be of any floating dtype, and of any of 8 bits.
inline void check_movable(const char* op, const char* argument, const at::Tensor& tensor) {
  if (!has_8_bits(tensor.scalar_type())) check_floating(op, argument, tensor);
}

/// For the autograd part of an op that moves rows: those of 8 bits cannot be added up.
inline void check_has_gradient(const char* op, const char* argument, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(!tensor.requires_grad() || !has_8_bits(type), op, ": ", argument,
              " of 8 bits has no gradient, got ", type, " that requires one");
}

inline void check_dtype(const char* op, const char* argument, const at::Tensor& tensor,
                        at::ScalarType wanted) {
  TORCH_CHECK(tensor.scalar_type() == wanted, op, ": ", argument, " must be ", wanted, ", got ",
              tensor.scalar_type());
}

/// `tensor` must live where `anchor` (named `anchor_name`) lives.
inline void check_device(const char* op, const char* argument, const at::Tensor& tensor,
                         const char* anchor_name, const at::Tensor& anchor) {
  TORCH_CHECK(tensor.device() == anchor.device(), op, ": ", argument, " must be on the device of ",
              anchor_name, " (", anchor.device(), "), got ", tensor.device());
}

inline bool has_sizes(const at::Tensor& tensor, c10::SymIntArrayRef wanted) {
  bool same = tensor.dim() == static_cast<int64_t>(wanted.size());
  for (size_t i = 0; same && i < wanted.size(); ++i) same = tensor.sym_size(i) == wanted[i];
  return same;
}

/// `tensor` must have exactly the sizes `wanted`; `meaning` spells them with names, as "[T, K]".
inline void check_sizes(const char* op, const char* argument, const at::Tensor& tensor,
                        c10::SymIntArrayRef wanted, const char* meaning) {
  TORCH_CHECK(has_sizes(tensor, wanted), op, ": ", argument, " must have shape ", meaning, " = ",
              wanted, ", got ", tensor.sym_sizes());
}

/// `tensor` must have one value for each token: the sizes of `anchor` (named `anchor_name`) without
/// its last, and its device.
inline void check_per_token(const char* op, const char* argument, const at::Tensor& tensor,
                            const char* anchor_name, const at::Tensor& anchor) {
  check_device(op, argument, tensor, anchor_name, anchor);
  const auto wanted = anchor.sym_sizes().slice(0, anchor.dim() - 1);
  TORCH_CHECK(has_sizes(tensor, wanted), op, ": ", argument, " must have shape of ", anchor_name,
              " without its last = ", wanted, ", got ", tensor.sym_sizes());
}

/// token_mask [...] beside logits [..., E]: true = real token, or weights.
inline void check_token_mask(const char* op, const at::Tensor& logits, const at::Tensor& mask) {
  TORCH_CHECK(mask.scalar_type() == at::kBool || mask.is_floating_point(), op,
              ": token_mask must be bool or floating weights, got ", mask.scalar_type());
  check_per_token(op, "token_mask", mask, "logits", logits);
}

/// segment_ids [...] int64 and num_segments >= 1 must come together.
inline void check_segments(const char* op, const std::optional<at::Tensor>& segment_ids,
                           const std::optional<c10::SymInt>& num_segments, const char* anchor_name,
                           const at::Tensor& anchor) {
  TORCH_CHECK(num_segments || !segment_ids, op, ": segment_ids needs num_segments");
  TORCH_CHECK(segment_ids || !num_segments, op, ": num_segments needs segment_ids");
  if (!segment_ids) return;
  check_dtype(op, "segment_ids", *segment_ids, at::kLong);
  check_per_token(op, "segment_ids", *segment_ids, anchor_name, anchor);
  TORCH_CHECK(*num_segments >= 1, op, ": num_segments must be >= 1, got ", *num_segments);
}

/// On the CPU, where values can be looked at: contiguous segment_ids are in [0, num_segments). Of a
/// token that `token_mask` (null: none) leaves out it may be anything.
inline void check_segment_values(const char* op, const std::optional<at::Tensor>& segment_ids,
                                 int64_t num_segments, const bool* token_mask = nullptr) {
  if (!segment_ids) return;
  const int64_t* ids = segment_ids->const_data_ptr<int64_t>();
  for (int64_t t = 0; t < segment_ids->numel(); ++t) {
    TORCH_CHECK((ids[t] >= 0 && ids[t] < num_segments) || (token_mask && !token_mask[t]), op,
                ": segment_ids must be in [0, num_segments) = [0, ", num_segments, "), got ",
                ids[t], " for token ", t);
  }
}

/// Of a value of `argument` on the CPU: an expert, or -1.
inline void check_expert(const char* op, const char* argument, int64_t expert,
                         int64_t num_experts) {
  TORCH_CHECK(expert >= -1 && expert < num_experts, op, ": ", argument,
              " must be in [-1, num_experts = ", num_experts, "), got ", expert);
}

/// The dtype that arithmetic and float results of an op on `type` have: float64 stays, the rest is
/// float32.
inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace equipoise
