// SPDX-License-Identifier: Apache-2.0
// topk_gating on the CPU: one token at a time, its row of logits read once into L1.
//
// Selection looks at few experts and takes no branch that depends on the data: the maxima of 16
// interleaved groups of the row bound the K-th largest key from below (the K-th largest of the
// maxima), about 1.4 K experts pass that bound and are packed together, and up to 16 of them are
// put in order by counting how many come before each. Large K, a bias, or rows with many ties go
// through a heap instead. Then comes one vector sweep for exp and one for the statistics.
#include "topk_gating.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

#include "../ops/routing_sums.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

constexpr int64_t kGroups = 16;  // interleaved groups of a row: expert e belongs to group e % 16
constexpr double kInfinityCounts = 1e18;

template <typename T>
constexpr T kNegativeInfinity = -__builtin_huge_val();
template <typename T>
constexpr T kLowest = std::is_same_v<T, double> ? -__DBL_MAX__ : -__FLT_MAX__;

/// NaN becomes -inf (absent) and is noted; +inf becomes a number whose square is still finite.
template <typename T>
Vectorized<T> sanitize(Vectorized<T> x, bool& nan_seen) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    nan_seen |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0;
    const __m512 present =
        _mm512_max_ps(x, _mm512_set1_ps(kNegativeInfinity<float>));  // of a NaN: the second
    return _mm512_min_ps(present, _mm512_set1_ps(static_cast<float>(kInfinityCounts)));
  }
#endif
  const auto nan = x.isnan();
  nan_seen |= nan.zero_mask() != (1 << Vectorized<T>::size()) - 1;
  return at::vec::clamp_max(Vectorized<T>::blendv(x, Vectorized<T>(kNegativeInfinity<T>), nan),
                            Vectorized<T>(static_cast<T>(kInfinityCounts)));
}

template <typename T>
T sanitize(T x) {
  if (x != x) return kNegativeInfinity<T>;
  return x < static_cast<T>(kInfinityCounts) ? x : static_cast<T>(kInfinityCounts);
}

/// Widens one row into x[0, padded), sanitised, with -inf behind its end, and takes the maxima of
/// its 16 groups. Returns whether it held a NaN.
template <typename scalar_t>
bool load_row(const scalar_t* row, int64_t num_experts, compute_t<scalar_t>* x,
              compute_t<scalar_t>* maxima) {
  using T = compute_t<scalar_t>;
  using In = Vectorized<scalar_t>;
  using Vec = Vectorized<T>;
  constexpr int64_t kParts = In::size() / Vec::size();  // vectors of T in one of scalar_t
  constexpr int64_t kPerGroup = kGroups / Vec::size();  // vectors of T in 16 elements
  constexpr int64_t kBest = kParts > kPerGroup ? kParts : kPerGroup;  // a multiple of both
  bool nan_seen = false;
  Vec best[kBest];
  for (auto& b : best) b = Vec(kNegativeInfinity<T>);
  const auto put = [&](const In& in, int64_t e, int64_t turn) __attribute__((always_inline)) {
    Vec part[kParts];
    if constexpr (kParts == 1) {
      part[0] = in;
    } else {
      const auto [low, high] = at::vec::convert_to_float<scalar_t>(in);
      part[0] = low;
      part[1] = high;
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < kParts; ++i) {
      part[i] = sanitize(part[i], nan_seen);
      part[i].store(x + e + i * Vec::size());
      auto& b = best[(turn * kParts + i) % kBest];
      b = at::vec::clamp_min(b, part[i]);
    }
  };
  constexpr int64_t kTurns = kBest / kParts;  // so many vectors of scalar_t fill `best`
  constexpr int64_t kStep = kTurns * In::size();
  int64_t e = 0;
  for (; e + kStep <= num_experts; e += kStep) {
#pragma GCC unroll 4
    for (int64_t turn = 0; turn < kTurns; ++turn)
      put(In::loadu(row + e + turn * In::size()), e + turn * In::size(), turn);
  }
  if (e < num_experts) {  // the tail goes through a buffer that ends in -inf
    scalar_t tail[kStep];
    for (int64_t i = 0; i < kStep; ++i)
      tail[i] = e + i < num_experts ? row[e + i] : scalar_t(kNegativeInfinity<float>);
#pragma GCC unroll 4
    for (int64_t turn = 0; turn < kTurns; ++turn)
      put(In::loadu(tail + turn * In::size()), e + turn * In::size(), turn);
    e += kStep;
  }
  for (const int64_t padded = padded_experts(num_experts); e < padded; e += Vec::size()) {
    Vec(kNegativeInfinity<T>).store(x + e);
  }
#pragma GCC unroll 4
  for (int64_t i = kPerGroup; i < kBest; ++i)
    best[i % kPerGroup] = at::vec::clamp_min(best[i % kPerGroup], best[i]);
#pragma GCC unroll 4
  for (int64_t i = 0; i < kPerGroup; ++i) best[i].store(maxima + i * Vec::size());
  return nan_seen;
}

/// Rounds one row of results to the logits' type.
template <typename scalar_t>
void store_row(const compute_t<scalar_t>* x, int64_t num_experts, scalar_t* row) {
  using T = compute_t<scalar_t>;
  using Out = Vectorized<scalar_t>;
  for (int64_t e = 0; e < num_experts; e += Out::size()) {
    const int64_t left = num_experts - e;
    Out out;
    if constexpr (std::is_same_v<scalar_t, T>) {
      out = Out::loadu(x + e);
    } else {
      out = at::vec::convert_from_float<scalar_t>(
          Vectorized<T>::loadu(x + e), Vectorized<T>::loadu(x + e + Vectorized<T>::size()));
    }
    out.store(row + e, left >= Out::size() ? Out::size() : left);
  }
}

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

/// Maximum of 16 values, as a tree so that the compiler may use vectors.
template <typename T>
T maximum_of_groups(const T* values) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_max_ps(_mm512_loadu_ps(values));
#endif
  T tree[kGroups];
  for (int64_t i = 0; i < kGroups; ++i) tree[i] = values[i];
  for (int64_t width = kGroups / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i)
      tree[i] = tree[i] > tree[i + width] ? tree[i] : tree[i + width];
  }
  return tree[0];
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

/// The k-th largest of 16 keys: the smallest of those with fewer than k larger ones.
template <typename T>
T kth_largest_of_16(const T* keys, int64_t k) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const auto enough =
        _mm512_cmplt_epi32_mask(count_larger(keys), _mm512_set1_epi32(static_cast<int32_t>(k)));
    return _mm512_mask_reduce_min_ps(enough, _mm512_loadu_ps(keys));
  }
#endif
  int32_t larger[kGroups] = {};
  for (int64_t j = 0; j < kGroups; ++j) {
    for (int64_t i = 0; i < kGroups; ++i) larger[i] += keys[j] > keys[i];
  }
  T negated[kGroups];
  for (int64_t i = 0; i < kGroups; ++i)
    negated[i] = larger[i] < k ? -keys[i] : kNegativeInfinity<T>;
  return -maximum_of_groups(negated);
}

/// Puts the first `count` of 16 keys in descending order, equal ones as they stand: order[r] is the
/// position of the r-th. The rank of a key is the number of keys before it. What follows the first
/// `count` must be smaller.
template <typename T>
void order_16(const T* keys, int64_t count, int32_t* order) {
  alignas(64) int32_t rank[kGroups];
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    __m512i ranks = count_larger(keys);
    const auto real = static_cast<__mmask16>((1u << count) - 1);
    if (_mm512_mask_reduce_add_epi32(real, ranks) != count * (count - 1) / 2) {  // some are equal
      const __m512 all = _mm512_loadu_ps(keys);
      for (int i = 0; i < count; ++i) {
        const auto behind = static_cast<__mmask16>(0xfffeu << i);
        const auto equal =
            _mm512_mask_cmp_ps_mask(behind, _mm512_set1_ps(keys[i]), all, _CMP_EQ_OQ);
        ranks = _mm512_mask_add_epi32(ranks, equal, ranks, _mm512_set1_epi32(1));
      }
    }
    _mm512_store_si512(rank, ranks);
  } else
#endif
  {
    for (int32_t i = 0; i < kGroups; ++i) rank[i] = 0;
    for (int32_t i = 0; i < count; ++i) {
      const T one = keys[i];
      for (int32_t j = 0; j < kGroups; ++j)
        rank[j] += (one > keys[j]) | ((one == keys[j]) & (i < j));
    }
  }
  // All 16, since a loop of unknown length costs more: what is -inf ranks behind the first `count`.
  for (int32_t i = 0; i < kGroups; ++i) order[rank[i]] = i;
}

/// Packs the experts whose key reaches `bound` into passed and passed_keys (16 elements longer than
/// the row), by index; returns how many.
template <typename T>
int64_t pack_candidates(const T* keys, int64_t padded, T bound, int32_t* passed, T* passed_keys) {
  int64_t count = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    __m512i expert = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t e = 0; e < padded; e += kGroups) {
      const __m512 key = _mm512_loadu_ps(keys + e);
      const __mmask16 reaches = _mm512_cmp_ps_mask(key, _mm512_set1_ps(bound), _CMP_GE_OQ);
      _mm512_storeu_ps(passed_keys + count, _mm512_maskz_compress_ps(reaches, key));
      _mm512_storeu_si512(passed + count, _mm512_maskz_compress_epi32(reaches, expert));
      count += __builtin_popcount(reaches);
      expert = _mm512_add_epi32(expert, _mm512_set1_epi32(kGroups));
    }
    return count;
  }
#endif
  using Vec = Vectorized<T>;
  constexpr int kAllLanes = (1 << Vec::size()) - 1;
  for (int64_t e = 0; e < padded; e += Vec::size()) {
    int lanes = (Vec::loadu(keys + e) >= Vec(bound)).zero_mask() ^ kAllLanes;
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t expert = e + __builtin_ctz(lanes);
      passed_keys[count] = keys[expert];
      passed[count++] = static_cast<int32_t>(expert);
    }
  }
  return count;
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

/// Writes the best top_k of the present experts to `chosen`, best first; returns how many there
/// were. `maxima` are those of the keys; `passed` and `passed_keys` have room for every expert and
/// 16 more.
template <typename T>
int64_t select_experts(const T* keys, const T* x, const T* maxima, int64_t padded, int64_t top_k,
                       int32_t* passed, T* passed_keys, int32_t* chosen) {
  alignas(64) int32_t order[kGroups];
  T bound = kLowest<T>;  // leaves out what is absent
  if (top_k <= kGroups) {
    const T reached = kth_largest_of_16(maxima, top_k);
    bound = reached > bound ? reached : bound;
  }
  int64_t count = pack_candidates(keys, padded, bound, passed, passed_keys);
  const int64_t found = count < top_k ? count : top_k;
  if (count <= kGroups && keys == x) {
    for (int64_t i = 0; i < kGroups; ++i) passed_keys[count + i] = kNegativeInfinity<T>;
    order_16(passed_keys, count, order);
    for (int64_t k = 0; k < found; ++k) chosen[k] = passed[order[k]];
    return found;
  }
  const Order<T> order_of{keys, x};
  for (int64_t i = count / 2 - 1; i >= 0; --i) sift_down(order_of, passed, count, i);
  for (int64_t k = 0; k < found; ++k) {
    chosen[k] = passed[0];
    passed[0] = passed[--count];
    sift_down(order_of, passed, count, 0);
  }
  return found;
}

/// exp(x) for x <= 0. For float32 on AVX-512 without a call: 2^n (1 + r + r^2 q(r)) with x = n log
/// 2 + r, |r| <= log(2) / 2, and q of degree 4 fitted to a relative error of 3e-9; within 1 ulp of
/// exp, as the library's, and 0 where exp would be denormal, which the hardware is slow at.
template <typename T>
Vectorized<T> exp_of_negative(Vectorized<T> x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __m512 smallest = _mm512_set1_ps(-87.33654f);
    const __mmask16 normal = _mm512_cmp_ps_mask(x, smallest, _CMP_GE_OQ);
    const __m512 bounded = _mm512_max_ps(x, smallest);  // no inf - inf
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r =
        _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), bounded);  // log 2, exact in 10 bits
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);     // and its remainder
    __m512 q = _mm512_set1_ps(0.001381459878757596f);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.008368716575205326f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.04166838899254799f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.1666652113199234f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.4999999403953552f));
    const __m512 power =
        _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), q, r), _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(normal, power, n);
  }
#endif
  return x.exp();
}

template <typename T>
T sum_of_lanes(Vectorized<T> value) {
  return at::vec::vec_reduce_all<T>([](auto& a, auto& b) { return a + b; }, value);
}

/// peak - x, at most 1000: an expert that far below has p = 0, and an infinity must not meet that
/// 0.
template <typename T>
Vectorized<T> below_peak(Vectorized<T> x, T peak) {
  return at::vec::clamp_max(Vectorized<T>(peak) - x, Vectorized<T>(T(1000)));
}

/// exps[e] = exp(x[e] - peak); returns their sum.
template <typename T>
T exponentials(const T* x, int64_t padded, T peak, T* exps) {
  using Vec = Vectorized<T>;
  Vec total(0);
  for (int64_t e = 0; e < padded; e += Vec::size()) {
    const Vec value = exp_of_negative(Vec::loadu(x + e) - Vec(peak));
    value.store(exps + e);
    total = total + value;
  }
  return sum_of_lanes(total);
}

template <typename T>
T natural_log(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return __builtin_log(value);
  } else {
    return __builtin_logf(value);
  }
}

/// prob_sum += share exps. Returns the sum of exps (peak - x), from which the row's entropy follows
/// without cancellation: H = log total + that / total.
template <typename T>
T add_probabilities(const T* x, const T* exps, int64_t num_experts, T share, T peak, T* prob_sum) {
  using Vec = Vectorized<T>;
  Vec spread(0);
  int64_t e = 0;
  for (; e + Vec::size() <= num_experts; e += Vec::size()) {
    const Vec value = Vec::loadu(exps + e);
    at::vec::fmadd(Vec(share), value, Vec::loadu(prob_sum + e)).store(prob_sum + e);
    spread = at::vec::fmadd(value, below_peak(Vec::loadu(x + e), peak), spread);
  }
  if (e < num_experts) {
    const int64_t left = num_experts - e;
    const Vec value = Vec::loadu(exps + e);
    at::vec::fmadd(Vec(share), value, Vec::loadu(prob_sum + e, left)).store(prob_sum + e, left);
    spread = at::vec::fmadd(value, below_peak(Vec::loadu(x + e), peak), spread);
  }
  return sum_of_lanes(spread);
}

/// Turns the chosen logits in `weights` into scaling_factor exp(x_k - max) / sum, which cannot
/// become 0 / 0. The buffer is padded to whole vectors.
template <typename T>
void renormalize(T* weights, int64_t count, T scaling_factor) {
  using Vec = Vectorized<T>;
  T shift = kLowest<T>;
  for (int64_t k = 0; k < count; ++k) shift = weights[k] > shift ? weights[k] : shift;
  for (int64_t k = 0; k < count; k += Vec::size()) {
    exp_of_negative(Vec::loadu(weights + k) - Vec(shift)).store(weights + k);
  }
  T total = 0;
  for (int64_t k = 0; k < count; ++k) total += weights[k];
  const T scale = scaling_factor / total;
  for (int64_t k = 0; k < count; ++k) weights[k] *= scale;
}

}  // namespace

/// Tokens [begin, end): fills their weights, indices and lse, and adds to counts [E] and sums [2 E
/// + 5].
template <typename scalar_t>
void topk_gating_rows(const TopKGatingRows<scalar_t>& rows, int64_t begin, int64_t end,
                      int64_t* counts, compute_t<scalar_t>* sums, compute_t<scalar_t>* scratch) {
  using T = compute_t<scalar_t>;
  const int64_t num_experts = rows.num_experts, top_k = rows.top_k;
  const int64_t padded = padded_experts(num_experts);
  const bool stats = rows.lse != nullptr, biased = rows.expert_bias != nullptr;
  const bool need_probabilities = stats || biased || !rows.norm_topk_prob;
  const int64_t part = padded + kRowPadding;
  T* const x = scratch;
  T* const exps = x + part;
  T* const keys = exps + part;
  T* const passed_keys = keys + part;
  auto* const passed = reinterpret_cast<int32_t*>(passed_keys + part);
  auto* const chosen = reinterpret_cast<int32_t*>(passed_keys + 2 * part);
  T* const chosen_logits = passed_keys;  // once the selection is done

  for (int64_t t = begin; t < end; ++t) {
    T* const weights = rows.topk_weights + t * top_k;
    int64_t* const indices = rows.topk_indices + t * top_k;
    const T token_weight = rows.token_weights != nullptr ? rows.token_weights[t] : T(1);
    int64_t found = 0;
    T lse = 0;
    if (token_weight > 0) {
      T maxima[kGroups];
      const bool had_nan = load_row(rows.logits + t * rows.row_stride, num_experts, x, maxima);
      if (stats && had_nan) sums[RoutingSums::nan_rows(num_experts)] += 1;
      const T peak = maximum_of_groups(maxima);
      if (peak > kNegativeInfinity<T>) {  // else no expert is present: the token counts as masked
        T inverse = 0, log_total = 0;
        if (need_probabilities) {
          const T total = exponentials(x, padded, peak, exps);
          inverse = T(1) / total;
          log_total = natural_log(total);
          lse = peak + log_total;
        }
        if (biased) {
          for (int64_t e = 0; e < num_experts; ++e) {
            const bool present = x[e] > kNegativeInfinity<T>;
            keys[e] = present ? exps[e] * inverse + rows.expert_bias[e] : kNegativeInfinity<T>;
          }
          for (int64_t e = num_experts; e < padded; ++e) keys[e] = kNegativeInfinity<T>;
          group_maxima(keys, padded, maxima);
        }
        found = select_experts(biased ? keys : x, x, maxima, padded, top_k, passed, passed_keys,
                               chosen);
        const bool weights_from_exps = !rows.norm_topk_prob || (need_probabilities && !biased);
        T sum = 0;
        for (int64_t k = 0; k < found; ++k) {
          indices[k] = chosen[k];
          counts[chosen[k]] += 1;
          if (weights_from_exps) sum += exps[chosen[k]];
        }
        if (weights_from_exps) {
          // Without a bias the best expert is chosen and has exp(0) = 1, so the sum is at least 1.
          const T scale = rows.scaling_factor * (rows.norm_topk_prob ? T(1) / sum : inverse);
          for (int64_t k = 0; k < found; ++k) weights[k] = scale * exps[chosen[k]];
        } else {
          for (int64_t k = 0; k < found; ++k) chosen_logits[k] = x[chosen[k]];
          renormalize(chosen_logits, found, rows.scaling_factor);
          for (int64_t k = 0; k < found; ++k) weights[k] = chosen_logits[k];
        }
        if (stats) {
          const T spread =
              add_probabilities(x, exps, num_experts, token_weight * inverse, peak, sums);
          const T entropy = log_total + spread * inverse;
          if (rows.token_weights != nullptr) {  // else the load is the count, see below
            for (int64_t k = 0; k < found; ++k) {
              sums[RoutingSums::load(num_experts) + indices[k]] += token_weight;
            }
          }
          sums[RoutingSums::weight(num_experts)] += token_weight;
          sums[RoutingSums::lse_squared(num_experts)] += token_weight * lse * lse;
          sums[RoutingSums::entropy(num_experts)] += token_weight * entropy;
        }
      }
    }
    if (stats) rows.lse[t] = lse;
    for (int64_t k = found; k < top_k; ++k) {
      indices[k] = -1;
      weights[k] = 0;
    }
  }
  if (stats && rows.token_weights == nullptr) {
    for (int64_t e = 0; e < num_experts; ++e) {
      sums[RoutingSums::load(num_experts) + e] = static_cast<T>(counts[e]);
    }
  }
}

/// Gradient of tokens [begin, end); one read of the logits, one write of grad_logits.
///   dx = p (w (a - <a, p>) + 2 w g_z lse - w g_H (log p + H) + g_lse) + gate
template <typename scalar_t>
void topk_gating_backward_rows(const TopKGatingBackwardRows<scalar_t>& rows, int64_t begin,
                               int64_t end, compute_t<scalar_t>* scratch) {
  using T = compute_t<scalar_t>;
  using Vec = Vectorized<T>;
  const int64_t num_experts = rows.num_experts, top_k = rows.top_k;
  const int64_t padded = padded_experts(num_experts);
  const bool gate = rows.grad_weights != nullptr;
  const bool dense =
      rows.grad_lse != nullptr || rows.grad_sums != nullptr || (gate && !rows.norm_topk_prob);
  const T grad_lse_squared =
      rows.grad_sums != nullptr ? rows.grad_sums[RoutingSums::lse_squared(num_experts)] : T(0);
  const T grad_entropy =
      rows.grad_sums != nullptr ? rows.grad_sums[RoutingSums::entropy(num_experts)] : T(0);
  const int64_t part = padded + kRowPadding;
  T* const x = scratch;
  T* const probs = x + part;
  T* const grad_probs = probs + part;  // a, padded with zeros
  T* const weights = grad_probs + part;
  for (int64_t e = 0; e < padded; ++e)
    grad_probs[e] = rows.grad_sums && e < num_experts ? rows.grad_sums[e] : T(0);

  for (int64_t t = begin; t < end; ++t) {
    const scalar_t* const row = rows.logits + t * rows.row_stride;
    scalar_t* const grad_row = rows.grad_logits + t * num_experts;
    const int64_t* const indices = rows.topk_indices + t * top_k;
    const T* const grad_weights = rows.grad_weights + (gate ? t * top_k : 0);
    const T token_weight = rows.token_weights != nullptr ? rows.token_weights[t] : T(1);
    int64_t found = 0;
    while (found < top_k && indices[found] >= 0) ++found;
    if (!(token_weight > 0) || found == 0) {  // masked, or nothing present
      for (int64_t e = 0; e < num_experts; ++e) grad_row[e] = scalar_t(0);
      continue;
    }
    // The gate's gradient with respect to the chosen logits, in `weights`.
    if (gate && rows.norm_topk_prob) {
      for (int64_t k = 0; k < found; ++k) weights[k] = sanitize(static_cast<T>(row[indices[k]]));
      renormalize(weights, found, rows.scaling_factor);
      T mean = 0;
      for (int64_t k = 0; k < found; ++k) mean += grad_weights[k] * weights[k];
      // Without a scale there is no weight and no gradient; 0 / 0 must not appear.
      mean = rows.scaling_factor != 0 ? mean / rows.scaling_factor : T(0);
      for (int64_t k = 0; k < found; ++k) weights[k] *= grad_weights[k] - mean;
    }
    if (!dense) {
      for (int64_t e = 0; e < num_experts; ++e) grad_row[e] = scalar_t(0);
      if (gate) {
        for (int64_t k = 0; k < found; ++k)
          grad_row[indices[k]] = static_cast<scalar_t>(weights[k]);
      }
      continue;
    }

    T maxima[kGroups];
    load_row(row, num_experts, x, maxima);
    // From the row's own maximum rather than from the rounded lse: for large logits that would be
    // off.
    const T peak = maximum_of_groups(maxima);
    const T total = exponentials(x, padded, peak, probs);
    const T inverse = T(1) / total, log_total = natural_log(total);
    Vec mean_gradient(0), spread(0);
    for (int64_t e = 0; e < padded; e += Vec::size()) {
      const Vec p = Vec::loadu(probs + e) * Vec(inverse);
      p.store(probs + e);
      mean_gradient = at::vec::fmadd(Vec::loadu(grad_probs + e), p, mean_gradient);
      spread = at::vec::fmadd(p, below_peak(Vec::loadu(x + e), peak), spread);
    }
    // The part of the slope that all experts share; w g_H (log p + H) = w g_H (spread - (peak -
    // x)).
    T common = -token_weight * sum_of_lanes(mean_gradient) +
               2 * token_weight * grad_lse_squared * (peak + log_total) -
               token_weight * grad_entropy * sum_of_lanes(spread);
    if (rows.grad_lse != nullptr) common += rows.grad_lse[t];
    if (gate && !rows.norm_topk_prob) {
      T mean = 0;
      for (int64_t k = 0; k < found; ++k) {
        weights[k] = rows.scaling_factor * grad_weights[k] * probs[indices[k]];
        mean += weights[k];
      }
      common -= mean;
    }
    for (int64_t e = 0; e < padded; e += Vec::size()) {
      const Vec slope = at::vec::fmadd(Vec(token_weight), Vec::loadu(grad_probs + e), Vec(common)) +
                        Vec(token_weight * grad_entropy) * below_peak(Vec::loadu(x + e), peak);
      (Vec::loadu(probs + e) * slope).store(x + e);
    }
    if (gate) {
      for (int64_t k = 0; k < found; ++k) x[indices[k]] += weights[k];
    }
    store_row(x, num_experts, grad_row);
  }
}

#define INSTANTIATE(scalar_t)                                                                     \
  template void topk_gating_rows<scalar_t>(const TopKGatingRows<scalar_t>&, int64_t, int64_t,     \
                                           int64_t*, compute_t<scalar_t>*, compute_t<scalar_t>*); \
  template void topk_gating_backward_rows<scalar_t>(const TopKGatingBackwardRows<scalar_t>&,      \
                                                    int64_t, int64_t, compute_t<scalar_t>*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE

}  // namespace equipoise::cpu::CPU_CAPABILITY
