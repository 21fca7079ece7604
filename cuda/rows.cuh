// SPDX-License-Identifier: Apache-2.0
// Rows of a matrix in 16-byte pieces, the type that arithmetic on them has, and weights of rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <type_traits>

namespace equipoise {

/// float64 for float64, else float32.
template <typename scalar_t>
using compute_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

/// Values in 16 bytes.
template <typename scalar_t>
constexpr int kPieceSize = 16 / sizeof(scalar_t);

/// kSize neighbouring values that one thread loads or stores at once.
template <typename scalar_t, int kSize = kPieceSize<scalar_t>>
struct alignas(kSize * sizeof(scalar_t)) Piece {
  scalar_t values[kSize];

  static __device__ Piece load(const scalar_t* from) {
    return *reinterpret_cast<const Piece*>(from);
  }
  __device__ void store(scalar_t* to) const { *reinterpret_cast<Piece*>(to) = *this; }
};

/// Whether each row of the matrix `rows` starts on a 16-byte boundary.
inline bool has_aligned_rows(const at::Tensor& rows) {
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 &&
         rows.stride(0) * rows.element_size() % 16 == 0;
}

/// Whether the matrix can be read and written in whole 16-byte pieces.
inline bool has_whole_pieces(const at::Tensor& rows) {
  return has_aligned_rows(rows) && rows.size(1) * rows.element_size() % 16 == 0;
}

template <typename T>
const T* pointer_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

/// Weights of rows in the compute type of the rows or in their own type; 1 if there are none.
template <typename scalar_t>
struct RowWeights {
  using compute_t = compute_type<scalar_t>;
  const compute_t* wide = nullptr;
  const scalar_t* narrow = nullptr;

  explicit RowWeights(const std::optional<at::Tensor>& weights) {
    if (!weights.has_value()) return;
    if (weights->scalar_type() == c10::CppTypeToScalarType<compute_t>::value) {
      wide = weights->const_data_ptr<compute_t>();
    } else {
      narrow = weights->const_data_ptr<scalar_t>();
    }
  }
  __device__ compute_t operator[](int64_t slot) const {
    if (wide != nullptr) return wide[slot];
    return narrow != nullptr ? static_cast<compute_t>(narrow[slot]) : compute_t(1);
  }
};

}  // namespace equipoise
