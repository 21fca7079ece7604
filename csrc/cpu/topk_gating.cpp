// SPDX-License-Identifier: Apache-2.0
// topk_gating on the CPU: one token at a time, its row of logits read once into L1.
//
// Selection looks at few experts: the maxima of 16 interleaved groups of the row bound the K-th largest key
// from below (the K-th largest of the maxima), about K experts pass that bound, and those are ranked by
// counting, without branches. Large K, or rows with many ties, go through a heap instead. Then comes one
// vector sweep for exp and one for the statistics.
#include "topk_gating.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

#include "../ops/routing_sums.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

constexpr int64_t kGroups = 16;     // interleaved groups of a row: expert e belongs to group e % 16
constexpr int64_t kMaxRanked = 32;  // at most so many candidates are ranked by counting
constexpr double kInfinityCounts = 1e18;

template <typename T>
constexpr T kNegativeInfinity = -__builtin_huge_val();
template <typename T>
constexpr T kLowest = std::is_same_v<T, double> ? -__DBL_MAX__ : -__FLT_MAX__;

/// NaN becomes -inf (absent) and is noted; +inf becomes a number whose square is still finite.
template <typename T>
Vectorized<T> sanitize(Vectorized<T> x, Vectorized<T>& nan_seen) {
  const auto nan = x.isnan();
  nan_seen = nan_seen | nan;
  return at::vec::clamp_max(Vectorized<T>::blendv(x, Vectorized<T>(kNegativeInfinity<T>), nan),
                            Vectorized<T>(static_cast<T>(kInfinityCounts)));
}

template <typename T>
T sanitize(T x) {
  if (x != x) return kNegativeInfinity<T>;
  return x < static_cast<T>(kInfinityCounts) ? x : static_cast<T>(kInfinityCounts);
}

template <typename T>
bool any_lane(Vectorized<T> mask) {
  return mask.zero_mask() != (1 << Vectorized<T>::size()) - 1;
}

/// Widens one row into x[0, padded), sanitised, with -inf behind its end. Returns whether it held a NaN.
template <typename scalar_t>
bool load_row(const scalar_t* row, int64_t num_experts, compute_t<scalar_t>* x) {
  using T = compute_t<scalar_t>;
  using In = Vectorized<scalar_t>;
  using Vec = Vectorized<T>;
  const Vec absent(kNegativeInfinity<T>);
  Vec nan_seen(0);
  const int64_t padded = padded_experts(num_experts);
  for (int64_t e = 0; e < padded; e += In::size()) {
    const int64_t left = num_experts - e;
    if (left <= 0) {
      for (int64_t i = e; i < padded; ++i) x[i] = kNegativeInfinity<T>;
      break;
    }
    const In in = left >= In::size() ? In::loadu(row + e) : In::loadu(row + e, left);
    const auto put = [&](Vec v, int64_t offset) {
      const int64_t count = left - offset;
      v = sanitize(v, nan_seen);
      if (count < Vec::size()) v = Vec::set(absent, v, count > 0 ? count : 0);
      v.store(x + e + offset);
    };
    if constexpr (std::is_same_v<scalar_t, T>) {
      put(in, 0);
    } else {
      const auto [low, high] = at::vec::convert_to_float<scalar_t>(in);
      put(low, 0);
      put(high, Vec::size());
    }
  }
  return any_lane(nan_seen);
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
      out = at::vec::convert_from_float<scalar_t>(Vectorized<T>::loadu(x + e),
                                                  Vectorized<T>::loadu(x + e + Vectorized<T>::size()));
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
  T tree[kGroups];
  for (int64_t i = 0; i < kGroups; ++i) tree[i] = values[i];
  for (int64_t width = kGroups / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) tree[i] = tree[i] > tree[i + width] ? tree[i] : tree[i + width];
  }
  return tree[0];
}

/// The top_k-th largest of the 16 maxima (top_k <= 16): at least top_k keys of the row reach it.
template <typename T>
T bound_from_maxima(const T* maxima, int64_t top_k) {
  int32_t larger[kGroups] = {};
  for (int64_t j = 0; j < kGroups; ++j) {
    for (int64_t i = 0; i < kGroups; ++i) larger[i] += maxima[j] > maxima[i];
  }
  T negated[kGroups];  // the smallest of those with fewer than top_k above them
  for (int64_t i = 0; i < kGroups; ++i) negated[i] = larger[i] < top_k ? -maxima[i] : kNegativeInfinity<T>;
  return -maximum_of_groups(negated);
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

/// Writes the best top_k of the present experts to `chosen`, best first; returns how many there were.
/// `candidates` has room for every expert.
template <typename T, bool kBiased>
int64_t select_experts(const T* keys, const T* x, int64_t num_experts, int64_t top_k, int32_t* candidates,
                       int32_t* chosen) {
  using Vec = Vectorized<T>;
  const int64_t padded = padded_experts(num_experts);
  T bound = kLowest<T>;  // leaves out what is absent
  if (top_k <= kGroups && padded > kMaxRanked) {
    T maxima[kGroups];
    group_maxima(keys, padded, maxima);
    const T reached = bound_from_maxima(maxima, top_k);
    if (reached > bound) bound = reached;
  }
  int64_t count = 0;
  constexpr int kAllLanes = (1 << Vec::size()) - 1;
  for (int64_t e = 0; e < padded; e += Vec::size()) {
    int lanes = (Vec::loadu(keys + e) >= Vec(bound)).zero_mask() ^ kAllLanes;
    while (lanes != 0) {
      candidates[count++] = static_cast<int32_t>(e + __builtin_ctz(lanes));
      lanes &= lanes - 1;
    }
  }
  const int64_t found = count < top_k ? count : top_k;

  if (count <= kMaxRanked) {  // a candidate's rank is the number of candidates before it
    T key[kMaxRanked], logit[kMaxRanked];
    int32_t rank[kMaxRanked] = {};
    for (int64_t i = 0; i < kMaxRanked; ++i) {
      key[i] = i < count ? keys[candidates[i]] : kNegativeInfinity<T>;
      if constexpr (kBiased) logit[i] = i < count ? x[candidates[i]] : kNegativeInfinity<T>;
    }
    const int64_t width = count <= kGroups ? kGroups : kMaxRanked;
    for (int32_t i = 0; i < count; ++i) {
      const T k = key[i];
      if constexpr (kBiased) {
        const T l = logit[i];
        for (int32_t j = 0; j < width; ++j) {
          rank[j] += (k > key[j]) | ((k == key[j]) & ((l > logit[j]) | ((l == logit[j]) & (i < j))));
        }
      } else {
        for (int32_t j = 0; j < width; ++j) rank[j] += (k > key[j]) | ((k == key[j]) & (i < j));
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      if (rank[j] < top_k) chosen[rank[j]] = candidates[j];
    }
    return found;
  }

  const Order<T> order{keys, x};
  for (int64_t i = count / 2 - 1; i >= 0; --i) sift_down(order, candidates, count, i);
  for (int64_t k = 0; k < found; ++k) {
    chosen[k] = candidates[0];
    candidates[0] = candidates[--count];
    sift_down(order, candidates, count, 0);
  }
  return found;
}

/// exps[e] = exp(x[e] - shift); returns their sum.
template <typename T>
T exponentials(const T* x, int64_t padded, T shift, T* exps) {
  using Vec = Vectorized<T>;
  Vec total(0);
  for (int64_t e = 0; e < padded; e += Vec::size()) {
    const Vec value = (Vec::loadu(x + e) - Vec(shift)).exp();
    value.store(exps + e);
    total = total + value;
  }
  return at::vec::vec_reduce_all<T>([](Vec& a, Vec& b) { return a + b; }, total);
}

template <typename T>
T natural_log(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return __builtin_log(value);
  } else {
    return __builtin_logf(value);
  }
}

/// prob_sum += share exps, and the sum of exps (lse - x): the entropy of the row times the sum of exps.
template <typename T>
T add_probabilities(const T* x, const T* exps, int64_t num_experts, T share, T lse, T* prob_sum) {
  using Vec = Vectorized<T>;
  Vec entropy(0);
  int64_t e = 0;
  for (; e + Vec::size() <= num_experts; e += Vec::size()) {
    const Vec value = Vec::loadu(exps + e);
    at::vec::fmadd(Vec(share), value, Vec::loadu(prob_sum + e)).store(prob_sum + e);
    // An absent expert has value 0 and must not meet the infinity in x.
    entropy = at::vec::fmadd(value, Vec(lse) - at::vec::clamp_min(Vec::loadu(x + e), Vec(kLowest<T>)), entropy);
  }
  if (e < num_experts) {
    const int64_t left = num_experts - e;
    const Vec value = Vec::loadu(exps + e);
    at::vec::fmadd(Vec(share), value, Vec::loadu(prob_sum + e, left)).store(prob_sum + e, left);
    entropy = at::vec::fmadd(value, Vec(lse) - at::vec::clamp_min(Vec::loadu(x + e), Vec(kLowest<T>)), entropy);
  }
  return at::vec::vec_reduce_all<T>([](Vec& a, Vec& b) { return a + b; }, entropy);
}

/// Weights of the chosen logits, divided by their sum: exp(x_k - max) / sum, which cannot underflow to 0 / 0.
template <typename T>
void renormalized_weights(const T* logits, int64_t count, T scaling_factor, T* weights) {
  using Vec = Vectorized<T>;
  T shift = kLowest<T>;
  for (int64_t k = 0; k < count; ++k) shift = logits[k] > shift ? logits[k] : shift;
  T total = 0;
  int64_t k = 0;
  for (; k < count; k += Vec::size()) {
    const int64_t left = count - k < Vec::size() ? count - k : Vec::size();
    const Vec value = (Vec::set(Vec(kNegativeInfinity<T>), Vec::loadu(logits + k, left), left) - Vec(shift)).exp();
    value.store(weights + k, left);
  }
  for (k = 0; k < count; ++k) total += weights[k];
  const T scale = scaling_factor / total;
  for (k = 0; k < count; ++k) weights[k] *= scale;
}

}  // namespace

/// Tokens [begin, end): fills their weights, indices and lse, and adds to counts [E] and sums [2 E + 5].
template <typename scalar_t>
void topk_gating_rows(const TopKGatingRows<scalar_t>& rows, int64_t begin, int64_t end, int64_t* counts,
                      compute_t<scalar_t>* sums, compute_t<scalar_t>* scratch) {
  using T = compute_t<scalar_t>;
  const int64_t num_experts = rows.num_experts, top_k = rows.top_k;
  const int64_t padded = padded_experts(num_experts);
  const bool stats = rows.lse != nullptr, biased = rows.expert_bias != nullptr;
  const bool need_probabilities = stats || biased || !rows.norm_topk_prob;
  T* const x = scratch;
  T* const exps = x + padded;
  T* const keys = exps + padded;
  auto* const candidates = reinterpret_cast<int32_t*>(keys + padded);
  auto* const chosen = reinterpret_cast<int32_t*>(keys + 2 * padded);

  for (int64_t t = begin; t < end; ++t) {
    T* const weights = rows.topk_weights + t * top_k;
    int64_t* const indices = rows.topk_indices + t * top_k;
    const T token_weight = rows.token_weights != nullptr ? rows.token_weights[t] : T(1);
    int64_t found = 0;
    T lse = 0;
    if (token_weight > 0) {
      const bool had_nan = load_row(rows.logits + t * rows.row_stride, num_experts, x);
      if (stats && had_nan) sums[RoutingSums::nan_rows(num_experts)] += 1;
      T maxima[kGroups];
      group_maxima(x, padded, maxima);
      const T peak = maximum_of_groups(maxima);
      if (peak > kNegativeInfinity<T>) {  // else no expert is present: the token counts as masked
        T total = 0;
        if (need_probabilities) {
          total = exponentials(x, padded, peak, exps);
          lse = peak + natural_log(total);
        }
        if (biased) {
          for (int64_t e = 0; e < num_experts; ++e) {
            const bool present = x[e] > kNegativeInfinity<T>;
            keys[e] = present ? exps[e] / total + rows.expert_bias[e] : kNegativeInfinity<T>;
          }
          for (int64_t e = num_experts; e < padded; ++e) keys[e] = kNegativeInfinity<T>;
          found = select_experts<T, true>(keys, x, num_experts, top_k, candidates, chosen);
        } else {
          found = select_experts<T, false>(x, x, num_experts, top_k, candidates, chosen);
        }
        for (int64_t k = 0; k < found; ++k) {
          const int32_t e = chosen[k];
          indices[k] = e;
          counts[e] += 1;
          weights[k] = rows.norm_topk_prob ? x[e] : rows.scaling_factor * (exps[e] / total);
        }
        if (rows.norm_topk_prob) renormalized_weights(weights, found, rows.scaling_factor, weights);
        if (stats) {
          const T entropy = add_probabilities(x, exps, num_experts, token_weight / total, lse, sums) / total;
          for (int64_t k = 0; k < found; ++k) sums[RoutingSums::load(num_experts) + indices[k]] += token_weight;
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
}

/// Gradient of tokens [begin, end); one read of the logits, one write of grad_logits.
///   dx = p (w (a - <a, p>) + 2 w g_z lse - w g_H (log p + H) + g_lse) + gate
template <typename scalar_t>
void topk_gating_backward_rows(const TopKGatingBackwardRows<scalar_t>& rows, int64_t begin, int64_t end,
                               compute_t<scalar_t>* scratch) {
  using T = compute_t<scalar_t>;
  using Vec = Vectorized<T>;
  const int64_t num_experts = rows.num_experts, top_k = rows.top_k;
  const int64_t padded = padded_experts(num_experts);
  const bool gate = rows.grad_weights != nullptr;
  const bool dense = rows.grad_lse != nullptr || rows.grad_sums != nullptr || (gate && !rows.norm_topk_prob);
  const T grad_lse_squared = rows.grad_sums != nullptr ? rows.grad_sums[RoutingSums::lse_squared(num_experts)] : T(0);
  const T grad_entropy = rows.grad_sums != nullptr ? rows.grad_sums[RoutingSums::entropy(num_experts)] : T(0);
  T* const x = scratch;
  T* const probs = x + padded;
  T* const grad_probs = probs + padded;  // a, padded with zeros
  T* const chosen = grad_probs + padded;
  T* const weights = chosen + padded;
  for (int64_t e = 0; e < padded; ++e) grad_probs[e] = rows.grad_sums && e < num_experts ? rows.grad_sums[e] : T(0);

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
      for (int64_t k = 0; k < found; ++k) chosen[k] = sanitize(static_cast<T>(row[indices[k]]));
      renormalized_weights(chosen, found, rows.scaling_factor, weights);
      T mean = 0;
      for (int64_t k = 0; k < found; ++k) mean += grad_weights[k] * weights[k];
      // Without a scale there is no weight and no gradient; 0 / 0 must not appear.
      mean = rows.scaling_factor != 0 ? mean / rows.scaling_factor : T(0);
      for (int64_t k = 0; k < found; ++k) weights[k] *= grad_weights[k] - mean;
    }
    if (!dense) {
      for (int64_t e = 0; e < num_experts; ++e) grad_row[e] = scalar_t(0);
      if (gate) {
        for (int64_t k = 0; k < found; ++k) grad_row[indices[k]] = static_cast<scalar_t>(weights[k]);
      }
      continue;
    }

    load_row(row, num_experts, x);
    T lse;
    if (rows.lse != nullptr) {
      lse = rows.lse[t];
    } else {
      T maxima[kGroups];
      group_maxima(x, padded, maxima);
      const T peak = maximum_of_groups(maxima);
      lse = peak + natural_log(exponentials(x, padded, peak, probs));
    }
    Vec mean_gradient(0), entropy(0);
    for (int64_t e = 0; e < padded; e += Vec::size()) {
      const Vec value = Vec::loadu(x + e);
      const Vec p = (value - Vec(lse)).exp();
      p.store(probs + e);
      mean_gradient = at::vec::fmadd(Vec::loadu(grad_probs + e), p, mean_gradient);
      entropy = at::vec::fmadd(p, Vec(lse) - at::vec::clamp_min(value, Vec(kLowest<T>)), entropy);
    }
    const auto add = [](Vec& a, Vec& b) { return a + b; };
    T common = -token_weight * at::vec::vec_reduce_all<T>(add, mean_gradient) +
               2 * token_weight * grad_lse_squared * lse -
               token_weight * grad_entropy * at::vec::vec_reduce_all<T>(add, entropy);
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
      const Vec log_p = at::vec::clamp_min(Vec::loadu(x + e), Vec(kLowest<T>)) - Vec(lse);
      const Vec slope = at::vec::fmadd(Vec(token_weight), Vec::loadu(grad_probs + e), Vec(common)) -
                        Vec(token_weight * grad_entropy) * log_p;
      (Vec::loadu(probs + e) * slope).store(x + e);
    }
    if (gate) {
      for (int64_t k = 0; k < found; ++k) x[indices[k]] += weights[k];
    }
    store_row(x, num_experts, grad_row);
  }
}

#define INSTANTIATE(scalar_t)                                                                                    \
  template void topk_gating_rows<scalar_t>(const TopKGatingRows<scalar_t>&, int64_t, int64_t, int64_t*,          \
                                           compute_t<scalar_t>*, compute_t<scalar_t>*);                          \
  template void topk_gating_backward_rows<scalar_t>(const TopKGatingBackwardRows<scalar_t>&, int64_t, int64_t,   \
                                                    compute_t<scalar_t>*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE

}  // namespace equipoise::cpu::CPU_CAPABILITY
