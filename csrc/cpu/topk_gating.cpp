// SPDX-License-Identifier: Apache-2.0
// topk_gating on the CPU. The logits are read once. A few rows are worked on together, in chunks
// that stay in L1, and each step is done for all of them before the next: the steps of one row wait
// for one another, those of different rows overlap in the processor.
#include "topk_gating.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

#include "../ops/routing_sums.h"
#include "select_experts.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

constexpr double kInfinityCounts = 1e18;

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
  if (e < num_experts) {
#pragma GCC unroll 4
    for (int64_t turn = 0; turn < kTurns; ++turn) {
      const int64_t from = e + turn * In::size(), left = num_experts - from;
      const In absent(kNegativeInfinity<float>);
      if (left >= In::size()) {
        put(In::loadu(row + from), from, turn);
      } else {
        put(left > 0 ? In::set(absent, In::loadu(row + from, left), left) : absent, from, turn);
      }
    }
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

/// exp(x) for -1000 <= x <= 0. For float32 on AVX-512 without a call: 2^n (1 + r (1 + r q(r))) with
/// x = n log 2 + r, |r| <= log(2) / 2, and q of degree 4 fitted to a relative error of 3e-9; within
/// 1 ulp of exp, as the library's, and 0 where exp would be denormal, which the hardware is slow
/// at.
template <typename T>
Vectorized<T> exp_of_negative(Vectorized<T> x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33654f), _CMP_GE_OQ);
    const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 2^23: adding it rounds to an integer
    const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), magic), magic);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // log 2, exact in 10 bits
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);      // and its remainder
    __m512 q = _mm512_set1_ps(0.001381459878757596f);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.008368716575205326f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.04166838899254799f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.1666652113199234f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.4999999403953552f));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 power = _mm512_fmadd_ps(_mm512_fmadd_ps(q, r, one), r, one);
    return _mm512_maskz_scalef_ps(normal, power, n);
  }
#endif
  return x.exp();
}

template <typename T>
T sum_of_lanes(Vectorized<T> value) {
  return at::vec::vec_reduce_all<T>([](auto& a, auto& b) { return a + b; }, value);
}

/// x - peak, at least -1000: an expert that far below has p = 0, and an infinity must not meet that
/// 0.
template <typename T>
Vectorized<T> from_peak(Vectorized<T> x, T peak) {
  return at::vec::clamp_min(x - Vectorized<T>(peak), Vectorized<T>(T(-1000)));
}

/// Of one row: total = sum exp(x - peak), spread = sum exp(x - peak) (peak - x). The entropy
/// follows without cancellation: H = log total + spread / total.
template <typename T>
struct ExpSums {
  T total, spread;
};

/// exps[e] = exp(x[e] - peak); returns their sums.
template <typename T>
ExpSums<T> exponentials(const T* x, int64_t padded, T peak, T* exps) {
  using Vec = Vectorized<T>;
  Vec total(0), spread(0);
  for (int64_t e = 0; e < padded; e += Vec::size()) {
    const Vec distance = from_peak(Vec::loadu(x + e), peak);
    const Vec value = exp_of_negative(distance);
    value.store(exps + e);
    total = total + value;
    spread = at::vec::fmadd(value, distance, spread);
  }
  return {sum_of_lanes(total), -sum_of_lanes(spread)};
}

template <typename T>
T natural_log(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return __builtin_log(value);
  } else {
    return __builtin_logf(value);
  }
}

/// Turns the chosen logits in `weights` into scaling_factor exp(x_k - max) / sum, which cannot
/// become 0 / 0. The buffer is padded to whole vectors.
template <typename T>
void renormalize(T* weights, int64_t count, T scaling_factor) {
  using Vec = Vectorized<T>;
  T shift = kLowest<T>;
  for (int64_t k = 0; k < count; ++k) shift = weights[k] > shift ? weights[k] : shift;
  for (int64_t k = 0; k < count; k += Vec::size()) {
    exp_of_negative(from_peak(Vec::loadu(weights + k), shift)).store(weights + k);
  }
  T total = 0;
  for (int64_t k = 0; k < count; ++k) total += weights[k];
  const T scale = scaling_factor / total;
  for (int64_t k = 0; k < count; ++k) weights[k] *= scale;
}

constexpr int64_t kChunkRows = 16;
constexpr int64_t kChunkLogits = 2048;  // with as many exps they fill half of a usual L1

/// A few rows that are worked on together. None is masked, in each at least one expert is present.
template <typename T>
struct Chunk {
  T *x, *exps;  // [capacity, stride]
  int64_t stride;
  int64_t capacity;
  int64_t size;
  int64_t tokens[kChunkRows];
  T token_weights[kChunkRows];
  alignas(64) T maxima[kChunkRows][kGroups];
  T peaks[kChunkRows];
  alignas(64) T totals[kChunkRows];
  T spreads[kChunkRows];
  alignas(64) T log_totals[kChunkRows];
  int64_t found[kChunkRows];
};

/// Writes that the slots of `token` from `found` on chose no expert.
template <typename scalar_t>
void leave_empty(const TopKGatingRows<scalar_t>& rows, int64_t token, int64_t found) {
  for (int64_t k = token * rows.top_k + found; k < (token + 1) * rows.top_k; ++k) {
    rows.topk_indices[k] = -1;
    rows.topk_weights[k] = 0;
  }
}

/// Asks for a row that is read later: its memory takes longer than the row's own work.
template <typename scalar_t>
void prefetch_row(const scalar_t* row, int64_t num_experts) {
  constexpr int64_t kLine = 64 / sizeof(scalar_t);
  for (int64_t e = 0; e < num_experts; e += kLine) __builtin_prefetch(row + e);
}

/// Loads rows from `token` on until the chunk is full, and settles those that take no part;
/// returns the token after them.
template <typename scalar_t>
int64_t fill_chunk(const TopKGatingRows<scalar_t>& rows, int64_t token, int64_t end,
                   Chunk<compute_t<scalar_t>>& chunk, int64_t& nan_rows) {
  using T = compute_t<scalar_t>;
  chunk.size = 0;
  for (; token < end && chunk.size < chunk.capacity; ++token) {
    const int64_t r = chunk.size;
    const T token_weight = rows.token_weights != nullptr ? rows.token_weights[token] : T(1);
    T peak = kNegativeInfinity<T>;
    const int64_t later = token + chunk.capacity;
    if (later < end) prefetch_row(rows.logits + later * rows.row_stride, rows.num_experts);
    if (token_weight > 0) {
      nan_rows += load_row(rows.logits + token * rows.row_stride, rows.num_experts,
                           chunk.x + r * chunk.stride, chunk.maxima[r]);
      peak = maximum_of_groups(chunk.maxima[r]);
    }
    if (peak > kNegativeInfinity<T>) {
      chunk.tokens[r] = token;
      chunk.token_weights[r] = token_weight;
      chunk.peaks[r] = peak;
      ++chunk.size;
    } else {
      leave_empty(rows, token, 0);
      if (rows.lse != nullptr) rows.lse[token] = 0;
    }
  }
  return token;
}

/// Fills exps, totals, spreads and log_totals.
template <typename T>
void exponentials_of_chunk(int64_t padded, Chunk<T>& chunk) {
  using Vec = Vectorized<T>;
  for (int64_t r = 0; r < chunk.size; ++r) {
    const int64_t row = r * chunk.stride;
    const auto sums = exponentials(chunk.x + row, padded, chunk.peaks[r], chunk.exps + row);
    chunk.totals[r] = sums.total;
    chunk.spreads[r] = sums.spread;
  }
  for (int64_t r = chunk.size; r < kChunkRows; ++r) chunk.totals[r] = 1;
  for (int64_t r = 0; r < kChunkRows; r += Vec::size()) {
    Vec::loadu(chunk.totals + r).log().store(chunk.log_totals + r);
  }
}

/// Chooses by logit. `heap` has room for every expert.
template <typename T>
void choose_by_logit(int64_t num_experts, int64_t padded, int64_t top_k, int64_t* topk_indices,
                     int32_t* heap, Chunk<T>& chunk) {
  T bounds[kChunkRows];
  Candidates<T> candidates[kChunkRows];
  for (int64_t r = 0; r < chunk.size; ++r) bounds[r] = bound_of_best(chunk.maxima[r], top_k);
  for (int64_t r = 0; r < chunk.size; ++r) {
    pack_candidates(chunk.x + r * chunk.stride, padded, bounds[r], candidates[r]);
  }
  for (int64_t r = 0; r < chunk.size; ++r) {
    const T* const x = chunk.x + r * chunk.stride;
    int64_t* const chosen = topk_indices + chunk.tokens[r] * top_k;
    chunk.found[r] = candidates[r].count <= kGroups
                         ? choose_by_rank(candidates[r], top_k, chosen)
                         : choose_by_heap(x, x, num_experts, bounds[r], top_k, heap, chosen);
  }
}

/// Chooses by p + bias. `keys` and `heap` have room for every padded expert.
template <typename T>
void choose_by_bias(int64_t num_experts, int64_t padded, int64_t top_k, const T* bias,
                    int64_t* topk_indices, T* keys, int32_t* heap, Chunk<T>& chunk) {
  T maxima[kGroups];
  for (int64_t e = num_experts; e < padded; ++e) keys[e] = kNegativeInfinity<T>;
  for (int64_t r = 0; r < chunk.size; ++r) {
    const T* const x = chunk.x + r * chunk.stride;
    const T* const exps = chunk.exps + r * chunk.stride;
    const T inverse = T(1) / chunk.totals[r];
    for (int64_t e = 0; e < num_experts; ++e) {
      keys[e] = x[e] > kNegativeInfinity<T> ? exps[e] * inverse + bias[e] : kNegativeInfinity<T>;
    }
    group_maxima(keys, padded, maxima);
    chunk.found[r] = choose_by_heap(keys, x, num_experts, bound_of_best(maxima, top_k), top_k, heap,
                                    topk_indices + chunk.tokens[r] * top_k);
  }
}

/// Weights of one row from the exps of the chosen. With norm_topk_prob only where the best expert
/// is sure to be chosen: it has exp(0) = 1, so the sum is at least 1.
template <typename T>
void weights_from_exps(const T* exps, const int64_t* chosen, int64_t found, bool norm_topk_prob,
                       T scaling_factor, T total, T* weights) {
  T sum = 0;
  for (int64_t k = 0; k < found; ++k) {
    weights[k] = exps[chosen[k]];
    sum += weights[k];
  }
  const T scale = scaling_factor / (norm_topk_prob ? sum : total);
  for (int64_t k = 0; k < found; ++k) weights[k] *= scale;
}

/// Weights of one row from the logits of the chosen; `buffer` has room for `found`, padded.
template <typename T>
void weights_from_logits(const T* x, const int64_t* chosen, int64_t found, T scaling_factor,
                         T* buffer, T* weights) {
  for (int64_t k = 0; k < found; ++k) buffer[k] = x[chosen[k]];
  renormalize(buffer, found, scaling_factor);
  for (int64_t k = 0; k < found; ++k) weights[k] = buffer[k];
}

/// prob_sum += w p, for all rows at each vector of experts.
template <typename T>
void add_probabilities(const Chunk<T>& chunk, int64_t num_experts, T* prob_sum) {
  using Vec = Vectorized<T>;
  T shares[kChunkRows];
  for (int64_t r = 0; r < chunk.size; ++r) shares[r] = chunk.token_weights[r] / chunk.totals[r];
  for (int64_t e = 0; e < num_experts; e += Vec::size()) {
    const int64_t left = num_experts - e < Vec::size() ? num_experts - e : Vec::size();
    Vec sum = Vec::loadu(prob_sum + e, left);
    for (int64_t r = 0; r < chunk.size; ++r) {
      sum = at::vec::fmadd(Vec(shares[r]), Vec::loadu(chunk.exps + r * chunk.stride + e), sum);
    }
    sum.store(prob_sum + e, left);
  }
}

/// Writes lse and adds to all of `sums` but the load of rows without token weights.
template <typename scalar_t>
void add_statistics(const TopKGatingRows<scalar_t>& rows, const Chunk<compute_t<scalar_t>>& chunk,
                    compute_t<scalar_t>* sums) {
  using T = compute_t<scalar_t>;
  const int64_t num_experts = rows.num_experts;
  add_probabilities(chunk, num_experts, sums + RoutingSums::prob);
  for (int64_t r = 0; r < chunk.size; ++r) {
    const T token_weight = chunk.token_weights[r];
    const T lse = chunk.peaks[r] + chunk.log_totals[r];
    const T entropy = chunk.log_totals[r] + chunk.spreads[r] / chunk.totals[r];
    rows.lse[chunk.tokens[r]] = lse;
    sums[RoutingSums::weight(num_experts)] += token_weight;
    sums[RoutingSums::lse_squared(num_experts)] += token_weight * lse * lse;
    sums[RoutingSums::entropy(num_experts)] += token_weight * entropy;
    if (rows.token_weights != nullptr) {
      const int64_t* const chosen = rows.topk_indices + chunk.tokens[r] * rows.top_k;
      for (int64_t k = 0; k < chunk.found[r]; ++k) {
        sums[RoutingSums::load(num_experts) + chosen[k]] += token_weight;
      }
    }
  }
}

}  // namespace

/// Tokens [begin, end): fills their weights, indices and lse, and adds to counts [E] and sums [2 E
/// + 5].
template <typename scalar_t>
void topk_gating_rows(const TopKGatingRows<scalar_t>& rows, int64_t begin, int64_t end,
                      int64_t* counts, compute_t<scalar_t>* sums, compute_t<scalar_t>* scratch) {
  using T = compute_t<scalar_t>;
  const int64_t num_experts = rows.num_experts, top_k = rows.top_k;
  const int64_t padded = (num_experts + kGroups - 1) / kGroups * kGroups;
  const bool stats = rows.lse != nullptr, biased = rows.expert_bias != nullptr;
  const bool need_probabilities = stats || biased || !rows.norm_topk_prob;
  const int64_t stride = padded_experts(num_experts);
  const int64_t part = stride + kRowPadding;
  T* const keys = scratch;
  T* const chosen_logits = keys + part;
  auto* const heap = reinterpret_cast<int32_t*>(chosen_logits + part);

  // Rows too long for a chunk go one at a time, in scratch.
  alignas(64) T chunk_x[kChunkLogits], chunk_exps[kChunkLogits];
  const bool fits = stride <= kChunkLogits;
  Chunk<T> chunk;
  chunk.x = fits ? chunk_x : scratch + 3 * part;
  chunk.exps = fits ? chunk_exps : scratch + 4 * part;
  chunk.stride = stride;
  chunk.capacity = fits ? kChunkLogits / stride : 1;
  if (chunk.capacity > kChunkRows) chunk.capacity = kChunkRows;

  int64_t nan_rows = 0;
  for (int64_t token = begin; token < end;) {
    token = fill_chunk(rows, token, end, chunk, nan_rows);
    if (need_probabilities) exponentials_of_chunk(padded, chunk);
    if (biased) {
      choose_by_bias(num_experts, padded, top_k, rows.expert_bias, rows.topk_indices, keys, heap,
                     chunk);
    } else {
      choose_by_logit(num_experts, padded, top_k, rows.topk_indices, heap, chunk);
    }
    const bool from_exps = !rows.norm_topk_prob || (need_probabilities && !biased);
    for (int64_t r = 0; r < chunk.size; ++r) {
      const int64_t found = chunk.found[r], slot = chunk.tokens[r] * top_k;
      const int64_t* const chosen = rows.topk_indices + slot;
      for (int64_t k = 0; k < found; ++k) counts[chosen[k]] += 1;
      if (from_exps) {
        weights_from_exps(chunk.exps + r * stride, chosen, found, rows.norm_topk_prob,
                          rows.scaling_factor, chunk.totals[r], rows.topk_weights + slot);
      } else {
        weights_from_logits(chunk.x + r * stride, chosen, found, rows.scaling_factor, chosen_logits,
                            rows.topk_weights + slot);
      }
      leave_empty(rows, chunk.tokens[r], found);
    }
    if (stats) add_statistics(rows, chunk, sums);
  }
  if (!stats) return;
  sums[RoutingSums::nan_rows(num_experts)] += static_cast<T>(nan_rows);
  if (rows.token_weights == nullptr) {
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
    const auto [total, spread] = exponentials(x, padded, peak, probs);
    const T inverse = T(1) / total;
    Vec mean_gradient(0);
    for (int64_t e = 0; e < padded; e += Vec::size()) {
      const Vec p = Vec::loadu(probs + e) * Vec(inverse);
      p.store(probs + e);
      mean_gradient = at::vec::fmadd(Vec::loadu(grad_probs + e), p, mean_gradient);
    }
    // The part of the slope that all experts share; w g_H (log p + H) = w g_H (spread - (peak -
    // x)).
    T common = -token_weight * sum_of_lanes(mean_gradient) +
               2 * token_weight * grad_lse_squared * (peak + natural_log(total)) -
               token_weight * grad_entropy * spread * inverse;
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
      const Vec slope = at::vec::fmadd(Vec(token_weight), Vec::loadu(grad_probs + e), Vec(common)) -
                        Vec(token_weight * grad_entropy) * from_peak(Vec::loadu(x + e), peak);
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
