// SPDX-License-Identifier: Apache-2.0
// scatter: out[map[t, k]] = w tokens[t];  gather: out[t] = sum_k w rows[map[t, k]];  dot:
// <tokens[t], rows[map[t, k]]>. One token after the other. Sums run in slot order, in float32
// (float64 for float64), and are rounded once; a row is taken in pieces that stay in registers, so
// each is read once.
#include "moe_rows.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

/// As many elements as one vector of scalar_t holds, widened: one or two vectors of the compute
/// type.
template <typename scalar_t>
struct Piece {
  using T = compute_t<scalar_t>;
  using Vec = Vectorized<T>;
  static constexpr int64_t kSize = Vectorized<scalar_t>::size();
  static constexpr int64_t kParts = kSize / Vec::size();
  Vec part[kParts];

  static Piece zero() {
    Piece piece;
    for (auto& p : piece.part) p = Vec(0);
    return piece;
  }
  static Piece load(const scalar_t* from, int64_t count) {
    const auto in = count >= kSize ? Vectorized<scalar_t>::loadu(from)
                                   : Vectorized<scalar_t>::loadu(from, count);
    Piece piece;
    if constexpr (kParts == 1) {
      piece.part[0] = in;
    } else {
      const auto [low, high] = at::vec::convert_to_float<scalar_t>(in);
      piece.part[0] = low;
      piece.part[1] = high;
    }
    return piece;
  }
  void store(scalar_t* to, int64_t count) const {
    Vectorized<scalar_t> out;
    if constexpr (kParts == 1) {
      out = part[0];
    } else {
      out = at::vec::convert_from_float<scalar_t>(part[0], part[1]);
    }
    out.store(to, count >= kSize ? kSize : count);
  }
};

}  // namespace

template <typename scalar_t, typename weight_t>
void scatter_rows(const MoeRows<scalar_t, weight_t>& m, int64_t begin, int64_t end) {
  using P = Piece<scalar_t>;
  using T = compute_t<scalar_t>;
  for (int64_t t = begin; t < end; ++t) {
    const scalar_t* token = m.tokens + t * m.token_stride;
    for (int64_t k = 0; k < m.top_k; ++k) {
      const int64_t row = m.map[t * m.top_k + k];
      if (row < 0) continue;
      scalar_t* out = m.out + row * m.width;
      if (m.weights == nullptr) {
        __builtin_memcpy(out, token, m.width * sizeof(scalar_t));
        continue;
      }
      const typename P::Vec weight(static_cast<T>(m.weights[t * m.top_k + k]));
      for (int64_t h = 0; h < m.width; h += P::kSize) {
        auto piece = P::load(token + h, m.width - h);
        for (auto& part : piece.part) part = part * weight;
        piece.store(out + h, m.width - h);
      }
    }
  }
}

template <typename scalar_t, typename weight_t>
void gather_rows(const MoeRows<scalar_t, weight_t>& m, int64_t begin, int64_t end) {
  using P = Piece<scalar_t>;
  using T = compute_t<scalar_t>;
  constexpr int64_t kUnroll =
      4;  // so many pieces of the token's sum are kept in registers while k runs
  for (int64_t t = begin; t < end; ++t) {
    const int64_t* map = m.map + t * m.top_k;
    scalar_t* out = m.out + t * m.width;
    for (int64_t h = 0; h < m.width; h += kUnroll * P::kSize) {
      P sum[kUnroll];
      for (auto& s : sum) s = P::zero();
      for (int64_t k = 0; k < m.top_k; ++k) {
        if (map[k] < 0) continue;
        const scalar_t* row = m.rows + map[k] * m.width;
        const typename P::Vec weight(
            m.weights != nullptr ? static_cast<T>(m.weights[t * m.top_k + k]) : T(1));
        for (int64_t u = 0; u < kUnroll; ++u) {
          const int64_t at = h + u * P::kSize;
          if (at >= m.width) break;
          const auto piece = P::load(row + at, m.width - at);
          for (int64_t i = 0; i < P::kParts; ++i)
            sum[u].part[i] = at::vec::fmadd(weight, piece.part[i], sum[u].part[i]);
        }
      }
      for (int64_t u = 0; u < kUnroll; ++u) {
        const int64_t at = h + u * P::kSize;
        if (at < m.width) sum[u].store(out + at, m.width - at);
      }
    }
  }
}

template <typename scalar_t, typename weight_t>
void dot_rows(const MoeRows<scalar_t, weight_t>& m, int64_t begin, int64_t end) {
  using P = Piece<scalar_t>;
  using T = compute_t<scalar_t>;
  for (int64_t t = begin; t < end; ++t) {
    const scalar_t* token = m.tokens + t * m.token_stride;
    for (int64_t k = 0; k < m.top_k; ++k) {
      const int64_t row = m.map[t * m.top_k + k];
      T dot = 0;
      if (row >= 0) {
        auto sum = P::zero();
        for (int64_t h = 0; h < m.width; h += P::kSize) {
          const auto a = P::load(token + h, m.width - h);
          const auto b = P::load(m.rows + row * m.width + h, m.width - h);
          for (int64_t i = 0; i < P::kParts; ++i)
            sum.part[i] = at::vec::fmadd(a.part[i], b.part[i], sum.part[i]);
        }
        for (const auto& part : sum.part) {
          dot += at::vec::vec_reduce_all<T>([](auto& x, auto& y) { return x + y; }, part);
        }
      }
      m.dots[t * m.top_k + k] = static_cast<weight_t>(dot);
    }
  }
}

#define INSTANTIATE(scalar_t, weight_t)                                                       \
  template void scatter_rows<scalar_t, weight_t>(const MoeRows<scalar_t, weight_t>&, int64_t, \
                                                 int64_t);                                    \
  template void gather_rows<scalar_t, weight_t>(const MoeRows<scalar_t, weight_t>&, int64_t,  \
                                                int64_t);                                     \
  template void dot_rows<scalar_t, weight_t>(const MoeRows<scalar_t, weight_t>&, int64_t, int64_t);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(c10::BFloat16, float)
INSTANTIATE(c10::BFloat16, c10::BFloat16)
INSTANTIATE(c10::Half, float)
INSTANTIATE(c10::Half, c10::Half)
#undef INSTANTIATE

}  // namespace equipoise::cpu::CPU_CAPABILITY
