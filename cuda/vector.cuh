// SPDX-License-Identifier: Apache-2.0
// Rows in 16-byte pieces, and the type that arithmetic on them has.
#pragma once

#include <ATen/core/Tensor.h>

#include <type_traits>

namespace equipoise {

/// float64 for float64, else float32.
template <typename scalar_t>
using compute_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

/// kSize values that one thread loads or stores at once; Vector<scalar_t> has 16 bytes.
template <typename scalar_t, int kSize = 16 / sizeof(scalar_t)>
struct alignas(kSize * sizeof(scalar_t)) Vector {
  scalar_t values[kSize];
};

/// Whether each row of the matrix `rows` starts on a 16-byte boundary.
inline bool has_aligned_rows(const at::Tensor& rows) {
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 &&
         rows.stride(0) * rows.element_size() % 16 == 0;
}

}  // namespace equipoise
