// SPDX-License-Identifier: Apache-2.0
// copy: out[map[t, k]] = tokens[t];  scatter: out[map[t, k]] = w tokens[t] and, where wanted, dots
// <tokens[t], rows[map[t, k]]>;  gather: out[t] = sum_k w rows[map[t, k]]. One token after the
// other. Sums run in slot order, in float32 (float64 for float64), and are rounded once; a row is
// taken in pieces that stay in registers, so each is read once.
#include "moe_rows.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

constexpr int64_t kVectorBytes = sizeof(Vectorized<float>);

/// Writes one vector past the caches; `to` is a multiple of kVectorBytes.
inline void stream(void* to, const void* from) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_si256(static_cast<__m256i*>(to),
                      _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#else
  __builtin_memcpy(to, from, kVectorBytes);
#endif
}

/// What was streamed is seen by others behind this.
inline void end_of_stream() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

/// Elements up to the first place that can be streamed to.
template <typename scalar_t>
int64_t size_of_head(const scalar_t* to, int64_t width) {
  const int64_t bytes = -reinterpret_cast<uintptr_t>(to) % kVectorBytes;
  const int64_t head = bytes / static_cast<int64_t>(sizeof(scalar_t));
  return head < width ? head : width;
}

inline void stream_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
  int64_t i = size_of_head(to, count);
  __builtin_memcpy(to, from, i);
  for (; i + kVectorBytes <= count; i += kVectorBytes) stream(to + i, from + i);
  __builtin_memcpy(to + i, from + i, count - i);
}

/// Copies a row and asks for the one that is written `next`: rows lie anywhere, the processor sees
/// no pattern in them, and a store to a line that is not there yet waits for it.
inline void copy_bytes(const uint8_t* from, int64_t count, uint8_t* to, uint8_t* next) {
  int64_t i = 0;
  for (; i + kVectorBytes <= count; i += kVectorBytes) {
    __builtin_prefetch(next + i, 1);
    __builtin_memcpy(to + i, from + i, kVectorBytes);
  }
  __builtin_memcpy(to + i, from + i, count - i);
}

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
  Vectorized<scalar_t> narrow() const {
    if constexpr (kParts == 1) {
      return part[0];
    } else {
      return at::vec::convert_from_float<scalar_t>(part[0], part[1]);
    }
  }
  void store(scalar_t* to, int64_t count) const {
    narrow().store(to, count >= kSize ? kSize : count);
  }
};

/// to = weight from.
template <bool kStream, typename scalar_t>
void scale_row(const scalar_t* from, compute_t<scalar_t> factor, int64_t width, scalar_t* to) {
  using P = Piece<scalar_t>;
  const typename P::Vec weight(factor);
  const auto scaled = [&](int64_t h, int64_t count) {
    auto piece = P::load(from + h, count);
    for (auto& part : piece.part) part = part * weight;
    return piece;
  };
  int64_t h = 0;
  if constexpr (kStream) {
    h = size_of_head(to, width);
    if (h > 0) scaled(0, h).store(to, h);
  }
  for (; h + P::kSize <= width; h += P::kSize) {
    if constexpr (kStream) {
      const auto values = scaled(h, P::kSize).narrow();
      stream(to + h, &values);
    } else {
      scaled(h, P::kSize).store(to + h, P::kSize);
    }
  }
  if (h < width) scaled(h, width - h).store(to + h, width - h);
}

/// Asks for the row `next` on the way: rows lie anywhere, and the processor sees no pattern in
/// them.
template <typename scalar_t>
compute_t<scalar_t> dot(const scalar_t* a, const scalar_t* b, int64_t width, const scalar_t* next) {
  using P = Piece<scalar_t>;
  auto sum = P::zero();
  for (int64_t h = 0; h < width; h += P::kSize) {
    const auto x = P::load(a + h, width - h), y = P::load(b + h, width - h);
    __builtin_prefetch(next + h);
    for (int64_t i = 0; i < P::kParts; ++i)
      sum.part[i] = at::vec::fmadd(x.part[i], y.part[i], sum.part[i]);
  }
  compute_t<scalar_t> result = 0;
  for (const auto& part : sum.part) {
    result +=
        at::vec::vec_reduce_all<compute_t<scalar_t>>([](auto& x, auto& y) { return x + y; }, part);
  }
  return result;
}

template <bool kStream, typename scalar_t, typename weight_t>
void scatter(const MoeRows<scalar_t, weight_t>& m, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const scalar_t* token = m.tokens + t * m.token_stride;
    for (int64_t slot = t * m.top_k; slot < (t + 1) * m.top_k; ++slot) {
      const int64_t row = m.map[slot];
      compute_t<scalar_t> product = 0;
      if (row >= 0) {
        // Row by row, so that the order of the sum is that of the columns wherever `out` starts;
        // the token stays in the cache.
        if (m.dots != nullptr) {
          const int64_t following = slot + 1 < end * m.top_k ? m.map[slot + 1] : -1;
          const scalar_t* values = m.rows + row * m.row_stride;
          product = dot(token, values, m.width,
                        following >= 0 ? m.rows + following * m.row_stride : values);
        }
        scale_row<kStream>(token, static_cast<compute_t<scalar_t>>(m.weights[slot]), m.width,
                           m.out + row * m.width);
      }
      if (m.dots != nullptr) m.dots[slot] = static_cast<weight_t>(product);
    }
  }
  if constexpr (kStream) end_of_stream();
}

/// Calls function(token, row of out, row of out of the next slot) for each slot that has a row;
/// next is the same row where the next slot has none.
template <typename F>
void for_each_slot(const MoeRows<uint8_t, uint8_t>& m, int64_t begin, int64_t end,
                   const F& function) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t slot = t * m.top_k; slot < (t + 1) * m.top_k; ++slot) {
      const int64_t row = m.map[slot];
      if (row < 0) continue;
      const int64_t following = slot + 1 < end * m.top_k ? m.map[slot + 1] : -1;
      function(m.tokens + t * m.token_stride, m.out + row * m.width,
               m.out + (following >= 0 ? following : row) * m.width);
    }
  }
}

/// Rows of one number, as weights are.
template <typename scalar_t, typename weight_t>
void gather_numbers(const MoeRows<scalar_t, weight_t>& m, int64_t begin, int64_t end) {
  using T = compute_t<scalar_t>;
  for (int64_t t = begin; t < end; ++t) {
    T sum = 0;
    for (int64_t slot = t * m.top_k; slot < (t + 1) * m.top_k; ++slot) {
      if (m.map[slot] < 0) continue;
      const T weight = m.weights != nullptr ? static_cast<T>(m.weights[slot]) : T(1);
      sum += weight * static_cast<T>(m.rows[m.map[slot] * m.row_stride]);
    }
    m.out[t] = static_cast<scalar_t>(sum);
  }
}

constexpr int64_t kUnroll = 4;  // so many pieces of a token's sum stay in registers

/// kUnroll pieces of out[t] from column h on; kWhole: all of them are within the row.
/// for_each_row calls its argument with each slot k that has a row, and the row that slot k of the
/// next token has, or -1: it is asked for on the way, as in dot().
template <bool kWhole, typename scalar_t, typename weight_t, typename F>
void gather_columns(const MoeRows<scalar_t, weight_t>& m, int64_t t, int64_t h,
                    const F& for_each_row) {
  using P = Piece<scalar_t>;
  using T = compute_t<scalar_t>;
  const auto left = [&](int64_t u) { return kWhole ? P::kSize : m.width - h - u * P::kSize; };
  P sum[kUnroll];
  for (auto& s : sum) s = P::zero();
  for_each_row([&](int64_t k, int64_t following) {
    const int64_t slot = t * m.top_k + k, row = m.map[slot];
    const scalar_t* from = m.rows + row * m.row_stride + h;
    const scalar_t* next = m.rows + (following >= 0 ? following : row) * m.row_stride + h;
    const typename P::Vec weight(m.weights != nullptr ? static_cast<T>(m.weights[slot]) : T(1));
    for (int64_t u = 0; u < kUnroll && left(u) > 0; ++u) {
      const auto piece = P::load(from + u * P::kSize, left(u));
      __builtin_prefetch(next + u * P::kSize);
      for (int64_t j = 0; j < P::kParts; ++j)
        sum[u].part[j] = at::vec::fmadd(weight, piece.part[j], sum[u].part[j]);
    }
  });
  scalar_t* out = m.out + t * m.width + h;
  for (int64_t u = 0; u < kUnroll && left(u) > 0; ++u) sum[u].store(out + u * P::kSize, left(u));
}

}  // namespace

void copy_rows(const MoeRows<uint8_t, uint8_t>& m, int64_t begin, int64_t end) {
  if (m.stream) {
    for_each_slot(m, begin, end, [&](const uint8_t* from, uint8_t* to, uint8_t*) {
      stream_bytes(from, m.width, to);
    });
    return end_of_stream();
  }
  const auto copy = [&](auto size) {
    for_each_slot(m, begin, end, [&](const uint8_t* from, uint8_t* to, uint8_t*) {
      __builtin_memcpy(to, from, size);
    });
  };
  switch (m.width) {  // weights move like rows, and a move of a known size is not a call
    case 2:
      return copy(std::integral_constant<int64_t, 2>{});
    case 4:
      return copy(std::integral_constant<int64_t, 4>{});
    case 8:
      return copy(std::integral_constant<int64_t, 8>{});
    default:
      return for_each_slot(m, begin, end, [&](const uint8_t* from, uint8_t* to, uint8_t* next) {
        copy_bytes(from, m.width, to, next);
      });
  }
}

template <typename scalar_t, typename weight_t>
void scatter_rows(const MoeRows<scalar_t, weight_t>& m, int64_t begin, int64_t end) {
  m.stream ? scatter<true>(m, begin, end) : scatter<false>(m, begin, end);
}

/// `listed` has room for K numbers.
template <typename scalar_t, typename weight_t>
void gather_rows(const MoeRows<scalar_t, weight_t>& m, int64_t begin, int64_t end,
                 int64_t* listed) {
  if (m.width == 1) return gather_numbers(m, begin, end);
  constexpr int64_t kManySlots = 32;  // most of so many have no row: one look for those that have
  constexpr int64_t kColumns = kUnroll * Piece<scalar_t>::kSize;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t* map = m.map + t * m.top_k;
    const int64_t* next_map = t + 1 < end ? map + m.top_k : map;
    int64_t num_listed = 0;
    if (m.top_k > kManySlots) {
      for (int64_t k = 0; k < m.top_k; ++k) {
        listed[num_listed] = k;
        num_listed += map[k] >= 0;
      }
    }
    const auto for_each_row = [&](const auto& add) {
      if (m.top_k > kManySlots) {
        for (int64_t i = 0; i < num_listed; ++i) add(listed[i], next_map[listed[i]]);
      } else {
        for (int64_t k = 0; k < m.top_k; ++k) {
          if (map[k] >= 0) add(k, next_map[k]);
        }
      }
    };
    int64_t h = 0;
    for (; h + kColumns <= m.width; h += kColumns) gather_columns<true>(m, t, h, for_each_row);
    if (h < m.width) gather_columns<false>(m, t, h, for_each_row);
  }
}

#define INSTANTIATE(scalar_t, weight_t)                                                       \
  template void scatter_rows<scalar_t, weight_t>(const MoeRows<scalar_t, weight_t>&, int64_t, \
                                                 int64_t);                                    \
  template void gather_rows<scalar_t, weight_t>(const MoeRows<scalar_t, weight_t>&, int64_t,  \
                                                int64_t, int64_t*);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(c10::BFloat16, float)
INSTANTIATE(c10::BFloat16, c10::BFloat16)
INSTANTIATE(c10::Half, float)
INSTANTIATE(c10::Half, c10::Half)
#undef INSTANTIATE

}  // namespace equipoise::cpu::CPU_CAPABILITY
