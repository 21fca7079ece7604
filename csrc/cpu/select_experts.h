// SPDX-License-Identifier: Apache-2.0
// Which experts a row chooses; for kernels of csrc/cpu, compiled once per instruction set.
//
// Selection looks at few experts and takes no branch that depends on the data: the maxima of 16
// interleaved groups of the row bound the K-th largest key from below (the K-th largest of the
// maxima, of 16 rows at a time by a sorting network), about 1.4 K experts pass that bound and are
// packed together, and up to 16 of them are put in order by counting how many come before each.
// Large K or rows with many ties go through a heap instead. The steps are separate
// functions, so that a kernel can take each for several rows before the next: what one row stores
// in pieces and loads as a whole is in cache then.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

#include "scores.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kGroups = 16;  // interleaved groups of a row: expert e belongs to group e % 16

/// The maxima of the 16 groups.
template <typename T>
void group_maxima(const T* keys, int64_t padded, T* maxima) {
  using Vec = Vectorized<T>;
  constexpr int64_t kParts = kGroups / Vec::size();
  Vec best[kParts];
  for (auto& b : best) b = Vec(kNegativeInfinity<T>);
  for (int64_t e = 0; e < padded; e += kGroups) {
    for (int64_t i = 0; i < kParts; ++i) {
      best[i] = at::vec::clamp_min(best[i], Vec::loadu(keys + e + i * Vec::size()));
    }
  }
  for (int64_t i = 0; i < kParts; ++i) best[i].store(maxima + i * Vec::size());
}

/// Whether any of 16 values is above -inf.
template <typename T>
bool is_any_present(const T* values) {
  using Vec = Vectorized<T>;
  constexpr int kAllLanes = (1 << Vec::size()) - 1;
  int absent = kAllLanes;
  for (int64_t i = 0; i < kGroups; i += Vec::size())
    absent &= (Vec::loadu(values + i) > Vec(kNegativeInfinity<T>)).zero_mask();
  return absent != kAllLanes;
}

#if defined(CPU_CAPABILITY_AVX512)
/// For each of 16 keys, how many are larger.
inline __m512i count_larger(const float* keys) {
  const __m512 all = _mm512_loadu_ps(keys);
  const __m512i one = _mm512_set1_epi32(1);
  __m512i even = _mm512_setzero_si512(),
          odd = even;  // two sums, so that neither waits for the other
#pragma GCC unroll 8
  for (int i = 0; i < kGroups; i += 2) {
    even = _mm512_mask_add_epi32(even, _mm512_cmp_ps_mask(_mm512_set1_ps(keys[i]), all, _CMP_GT_OQ),
                                 even, one);
    odd = _mm512_mask_add_epi32(
        odd, _mm512_cmp_ps_mask(_mm512_set1_ps(keys[i + 1]), all, _CMP_GT_OQ), odd, one);
  }
  return _mm512_add_epi32(even, odd);
}
#endif

/// to[i][j] = from[j][i].
template <typename T>
void transpose(const T (*from)[kGroups], T (*to)[kGroups]) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    __m512 rows[kGroups];
#pragma GCC unroll 16
    for (int i = 0; i < kGroups; ++i) rows[i] = _mm512_loadu_ps(from[i]);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Swaps squares of width 1, 2, 4 and 8 across the diagonal.
#pragma GCC unroll 4
    for (int width = 1; width < kGroups; width *= 2) {
      const __mmask16 right = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(width));
      const __m512i above =
          _mm512_mask_add_epi32(lane, right, lane, _mm512_set1_epi32(kGroups - width));
      const __m512i below = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(width)),
                                                  right, lane, _mm512_set1_epi32(kGroups));
#pragma GCC unroll 16
      for (int i = 0; i < kGroups; ++i) {
        if (i & width) continue;
        const __m512 upper = rows[i], lower = rows[i + width];
        rows[i] = _mm512_permutex2var_ps(upper, above, lower);
        rows[i + width] = _mm512_permutex2var_ps(upper, below, lower);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kGroups; ++i) _mm512_storeu_ps(to[i], rows[i]);
    return;
  }
#endif
  for (int64_t i = 0; i < kGroups; ++i) {
    for (int64_t j = 0; j < kGroups; ++j) to[i][j] = from[j][i];
  }
}

/// Batcher's odd-even merge sort of 16 values: which are compared, in turn.
struct SortingNetwork {
  int64_t size = 0;
  int8_t first[64] = {}, second[64] = {};

  constexpr SortingNetwork() {
    for (int sorted = 1; sorted < kGroups; sorted *= 2) {
      for (int apart = sorted; apart > 0; apart /= 2) {
        for (int from = apart % sorted; from + apart < kGroups; from += 2 * apart) {
          for (int i = from; i < from + apart && i + apart < kGroups; ++i) {
            if (i / (2 * sorted) != (i + apart) / (2 * sorted)) continue;
            first[size] = static_cast<int8_t>(i);
            second[size++] = static_cast<int8_t>(i + apart);
          }
        }
      }
    }
  }
};

/// Sorts each of 16 columns, largest first.
template <typename T>
void sort_columns(T (*values)[kGroups]) {
  using Vec = Vectorized<T>;
  constexpr SortingNetwork network;
  for (int64_t lane = 0; lane < kGroups; lane += Vec::size()) {
    Vec rows[kGroups];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kGroups; ++i) rows[i] = Vec::loadu(values[i] + lane);
#pragma GCC unroll 64
    for (int64_t i = 0; i < network.size; ++i) {
      Vec &a = rows[network.first[i]], &b = rows[network.second[i]];
      const Vec larger = at::vec::clamp_min(a, b);
      b = at::vec::clamp_max(a, b);
      a = larger;
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kGroups; ++i) rows[i].store(values[i] + lane);
  }
}

/// What the K-th best key is not below: the K-th best maximum of a group, from all of them, best
/// first and `stride` apart; leaves out what is absent.
template <typename T>
T bound_of_best(const T* maxima, int64_t stride, int64_t top_k) {
  if (top_k > kGroups) return kLowest<T>;
  const T reached = maxima[(top_k - 1) * stride];
  return reached > kLowest<T> ? reached : kLowest<T>;
}

/// Experts of one row that may be chosen, by index. Room for 16, and for the 16 that a vector store
/// writes behind them; behind the last, keys are -inf.
template <typename T>
struct Candidates {
  alignas(64) T keys[2 * kGroups];
  alignas(64) int32_t experts[2 * kGroups];
  int64_t count;  // of more than 16, only this is known
};

/// Finds the experts whose key reaches `bound`; without kWithKeys it leaves their keys out.
template <bool kWithKeys = true, typename T>
void pack_candidates(const T* keys, int64_t padded, T bound, Candidates<T>& passed) {
  int64_t count = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __m512 absent = _mm512_set1_ps(kNegativeInfinity<float>);
    __m512i expert = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 2
    for (int64_t e = 0; e < padded; e += kGroups) {
      const __m512 key = _mm512_loadu_ps(keys + e);
      const __mmask16 reaches = _mm512_cmp_ps_mask(key, _mm512_set1_ps(bound), _CMP_GE_OQ);
      const int64_t at = count < kGroups ? count : kGroups;
      if constexpr (kWithKeys)
        _mm512_storeu_ps(passed.keys + at, _mm512_mask_compress_ps(absent, reaches, key));
      _mm512_storeu_si512(passed.experts + at, _mm512_maskz_compress_epi32(reaches, expert));
      count += __builtin_popcount(reaches);
      expert = _mm512_add_epi32(expert, _mm512_set1_epi32(kGroups));
    }
    passed.count = count;
    return;
  }
#endif
  using Vec = Vectorized<T>;
  constexpr int kAllLanes = (1 << Vec::size()) - 1;
  for (int64_t e = 0; e < padded; e += Vec::size()) {
    int lanes = (Vec::loadu(keys + e) >= Vec(bound)).zero_mask() ^ kAllLanes;
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t expert = e + __builtin_ctz(lanes);
      const int64_t at = count < kGroups ? count : kGroups;
      passed.keys[at] = keys[expert];
      passed.experts[at] = static_cast<int32_t>(expert);
      ++count;
    }
  }
  for (int64_t i = count; i < kGroups; ++i) passed.keys[i] = kNegativeInfinity<T>;
  passed.count = count;
}

#if defined(CPU_CAPABILITY_AVX512)
/// Whether the first `count` keys, with so many larger than each, are all different.
inline bool are_distinct(__m512i larger, int64_t count) {
  const auto real = static_cast<__mmask16>((1u << count) - 1);
  return _mm512_mask_reduce_add_epi32(real, larger) == count * (count - 1) / 2;
}

/// Adds to the rank of each candidate how many of equal key come before it: those of a larger x,
/// and, of those with the same, those of a lower index.
inline __m512i order_equal(const Candidates<float>& passed, const float* x, __m512i ranks) {
  const auto real = static_cast<__mmask16>((1u << passed.count) - 1);
  const __m512 keys = _mm512_load_ps(passed.keys);
  const __m512 logits =
      _mm512_mask_i32gather_ps(keys, real, _mm512_load_si512(passed.experts), x, sizeof(float));
  for (int i = 0; i < passed.count; ++i) {
    const __m512 logit = _mm512_set1_ps(x[passed.experts[i]]);
    const auto equal = _mm512_cmp_ps_mask(keys, _mm512_set1_ps(passed.keys[i]), _CMP_EQ_OQ);
    const auto behind = static_cast<__mmask16>(0xfffeu << i);
    const auto after =
        _mm512_mask_cmp_ps_mask(equal, logits, logit, _CMP_LT_OQ) |
        _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(equal & behind), logits, logit, _CMP_EQ_OQ);
    ranks =
        _mm512_mask_add_epi32(ranks, static_cast<__mmask16>(after), ranks, _mm512_set1_epi32(1));
  }
  return ranks;
}

/// to[ranks[i]] = values[i] where ranks[i] < count.
inline void scatter_by_rank(__m512i ranks, __m512i values, int64_t count, int64_t* to) {
  const auto best = _mm512_cmplt_epi32_mask(ranks, _mm512_set1_epi32(static_cast<int32_t>(count)));
  _mm512_mask_i32scatter_epi64(to, static_cast<__mmask8>(best), _mm512_castsi512_si256(ranks),
                               _mm512_cvtepi32_epi64(_mm512_castsi512_si256(values)), 8);
  _mm512_mask_i32scatter_epi64(to, static_cast<__mmask8>(best >> 8),
                               _mm512_extracti64x4_epi64(ranks, 1),
                               _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(values, 1)), 8);
}
#endif

/// Writes the best top_k of at most 16 candidates to `chosen`, best first; returns how many there
/// were. Equal keys are in the order of x, then of the index. The rank of a candidate is the number
/// of those before it.
template <typename T>
int64_t choose_by_rank(const Candidates<T>& passed, const T* x, int64_t top_k, int64_t* chosen) {
  const int64_t found = passed.count < top_k ? passed.count : top_k;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    __m512i ranks = count_larger(passed.keys);
    if (!are_distinct(ranks, passed.count)) {
      ranks = order_equal(passed, x, ranks);
    }
    scatter_by_rank(ranks, _mm512_load_si512(passed.experts), found, chosen);
    return found;
  }
#endif
  T logits[kGroups] = {};
  for (int32_t i = 0; i < passed.count; ++i) logits[i] = x[passed.experts[i]];
  int32_t ranks[kGroups] = {};
  for (int32_t i = 0; i < passed.count; ++i) {
    const T key = passed.keys[i], logit = logits[i];
    for (int32_t j = 0; j < kGroups; ++j) {
      const bool first = (logit > logits[j]) | ((logit == logits[j]) & (i < j));
      ranks[j] += (key > passed.keys[j]) | ((key == passed.keys[j]) & first);
    }
  }
  for (int64_t i = 0; i < passed.count; ++i) {
    if (ranks[i] < found) chosen[ranks[i]] = passed.experts[i];
  }
  return found;
}

/// Selection order: key, then logit, then lowest index.
template <typename T>
struct Order {
  const T* keys;
  const T* x;
  bool before(int32_t a, int32_t b) const {
    if (keys[a] != keys[b]) return keys[a] > keys[b];
    if (x[a] != x[b]) return x[a] > x[b];
    return a < b;
  }
};

template <typename T>
void sift_down(const Order<T>& order, int32_t* heap, int64_t size, int64_t parent) {
  const int32_t moving = heap[parent];
  for (int64_t child = 2 * parent + 1; child < size; child = 2 * parent + 1) {
    if (child + 1 < size && order.before(heap[child + 1], heap[child])) ++child;
    if (!order.before(heap[child], moving)) break;
    heap[parent] = heap[child];
    parent = child;
  }
  heap[parent] = moving;
}

/// Writes the best top_k of all experts whose key reaches `bound` to `chosen`, best first; returns
/// how many there were. `heap` has room for every expert.
template <typename T>
int64_t choose_by_heap(const T* keys, const T* x, int64_t num_experts, T bound, int64_t top_k,
                       int32_t* heap, int64_t* chosen) {
  int64_t count = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    heap[count] = static_cast<int32_t>(e);
    count += keys[e] >= bound;
  }
  const int64_t found = count < top_k ? count : top_k;
  const Order<T> order{keys, x};
  for (int64_t i = count / 2 - 1; i >= 0; --i) sift_down(order, heap, count, i);
  for (int64_t k = 0; k < found; ++k) {
    chosen[k] = heap[0];
    heap[0] = heap[--count];
    sift_down(order, heap, count, 0);
  }
  return found;
}

/// Writes the best top_k of one row to `chosen`, best first, from its candidates for `bound`;
/// returns how many there were. Equal keys are in the order of x; keys may be x.
template <typename T>
int64_t choose_among(const Candidates<T>& passed, const T* keys, const T* x, int64_t num_experts,
                     T bound, int64_t top_k, int32_t* heap, int64_t* chosen) {
  if (passed.count <= kGroups) return choose_by_rank(passed, x, top_k, chosen);
  return choose_by_heap(keys, x, num_experts, bound, top_k, heap, chosen);
}

/// The best top_k of few keys, padded with -inf; the others are not worth a bound.
template <typename T>
int64_t choose_of_few(const T* keys, int64_t num_keys, int64_t padded, int64_t top_k, int32_t* heap,
                      int64_t* chosen) {
  Candidates<T> passed;
  pack_candidates(keys, padded, kLowest<T>, passed);
  return choose_among(passed, keys, keys, num_keys, kLowest<T>, top_k, heap, chosen);
}

}  // namespace
}  // namespace equipoise::cpu::CPU_CAPABILITY
