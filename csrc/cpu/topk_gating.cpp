// SPDX-License-Identifier: Apache-2.0
// topk_gating on the CPU, forward. The logits are read once, in chunks of rows (row_chunks.h): load
// and maxima, exponentials, keys, selection (select_experts.h), weights, sums. Rows of at most 16
// experts lie the other way (topk_gating_narrow.h).
#include "topk_gating.h"

#include <cstdint>

#include "../ops/routing_sums.h"
#include "row_chunks.h"
#include "scores.h"
#include "select_experts.h"
#include "topk_gating_narrow.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

// ---- which experts ---------------------------------------------------------------------

/// keys = score + bias of one row, above -inf for all that are present, and their maxima; `bias` is
/// padded and above -inf, score_at(e, x) the score of the vector at e.
template <bool kMayBeLow, typename T, typename ScoreAt>
void keys_of_row(const T* row, int64_t padded, const T* bias, const ScoreAt& score_at, T* keys,
                 T* maxima) {
  using Vec = Vectorized<T>;
  constexpr int64_t kParts = kGroups / Vec::size();
  Vec best[kParts];
  for (auto& b : best) b = Vec(kNegativeInfinity<T>);
#pragma GCC unroll 2
  for (int64_t e = 0; e < padded; e += kGroups) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kParts; ++i) {
      const int64_t at = e + i * Vec::size();
      const Vec x = Vec::loadu(row + at);
      Vec present = score_at(at, x) + Vec::loadu(bias + at);
      if constexpr (kMayBeLow) present = at::vec::clamp_min(present, Vec(kLowest<T>));
      const Vec key = unless_absent(x, present);
      key.store(keys + at);
      best[i] = at::vec::clamp_min(best[i], key);
    }
  }
  for (int64_t i = 0; i < kParts; ++i) best[i].store(maxima + i * Vec::size());
}

/// The same for a whole chunk.
template <typename T>
void keys_of_chunk(ScoreFunction score_function, int64_t padded, const T* bias, Chunk<T>& chunk) {
  using Vec = Vectorized<T>;
  if (score_function == ScoreFunction::kSoftmax) {
    for (int64_t r = 0; r < chunk.size; ++r) {
      const T* const exps = chunk.exps + r * chunk.stride;
      const Vec inverse(T(1) / chunk.totals[r]);
      keys_of_row<false>(
          chunk.x + r * chunk.stride, padded, bias,
          [&](int64_t e, Vec) { return Vec::loadu(exps + e) * inverse; },
          chunk.keys + r * chunk.stride, chunk.maxima[r]);
    }
    return;
  }
  with_score(score_function, [&](auto constant) {
    constexpr ScoreFunction kScore = constant;
    for (int64_t r = 0; r < chunk.size; ++r) {
      keys_of_row<kScore == ScoreFunction::kIdentity>(  // other scores are >= 0
          chunk.x + r * chunk.stride, padded, bias, [](int64_t, Vec x) { return score<kScore>(x); },
          chunk.keys + r * chunk.stride, chunk.maxima[r]);
    }
  });
}

/// The score of a group from the keys of its experts; -inf if none is present.
template <typename T>
T group_score(const T* keys, int64_t size, GroupScore kind) {
  using Vec = Vectorized<T>;
  Vec bests(kNegativeInfinity<T>), seconds = bests;
  int64_t e = 0;
  for (; e + Vec::size() <= size; e += Vec::size()) {
    const Vec key = Vec::loadu(keys + e);
    seconds = at::vec::clamp_min(seconds, at::vec::clamp_max(key, bests));
    bests = at::vec::clamp_min(bests, key);
  }
  T best = kNegativeInfinity<T>, second = best;
  const auto take = [&](T key) {
    const T lower = key < best ? key : best;
    second = second > lower ? second : lower;
    best = key > best ? key : best;
  };
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    best = _mm512_reduce_max_ps(bests);
    const __mmask16 holders = _mm512_cmp_ps_mask(bests, _mm512_set1_ps(best), _CMP_EQ_OQ);
    const auto holder = static_cast<__mmask16>(holders & -holders);
    second = _mm512_reduce_max_ps(_mm512_mask_mov_ps(bests, holder, seconds));
  } else
#endif
      if (e > 0) {
    T lanes[2 * Vec::size()];
    bests.store(lanes);
    seconds.store(lanes + Vec::size());
    for (const T key : lanes) take(key);
  }
  for (; e < size; ++e) take(keys[e]);
  if (kind == GroupScore::kMax || !(second > kNegativeInfinity<T>)) return best;
  return best + second > kLowest<T> ? best + second : kLowest<T>;
}

/// Makes the experts of all but the best groups absent in one row of keys. `scores` and `heap` have
/// room for every padded group, `kept` for every group.
template <typename scalar_t>
void limit_groups(const TopKGatingRows<scalar_t>& rows, compute_t<scalar_t>* keys,
                  compute_t<scalar_t>* scores, int64_t* kept, int32_t* heap) {
  using T = compute_t<scalar_t>;
  const int64_t size = rows.num_experts / rows.num_groups;
  const int64_t padded = (rows.num_groups + kGroups - 1) / kGroups * kGroups;
  for (int64_t g = 0; g < padded; ++g) {
    scores[g] = g < rows.num_groups ? group_score(keys + g * size, size, rows.group_score)
                                    : kNegativeInfinity<T>;
  }
  const int64_t found = choose_of_few(scores, rows.num_groups, padded, rows.group_topk, heap, kept);
  for (int64_t i = 0; i < found; ++i) scores[kept[i]] = kNegativeInfinity<T>;
  for (int64_t g = 0; g < rows.num_groups; ++g) {
    if (!(scores[g] > kNegativeInfinity<T>)) continue;  // kept, or empty
    for (int64_t e = g * size; e < (g + 1) * size; ++e) keys[e] = kNegativeInfinity<T>;
  }
}

/// Chooses by the keys, whose best maxima are given: chunk.keys, or chunk.x.
template <typename T>
void choose_experts(const T* keys, int64_t num_experts, int64_t padded, int64_t top_k,
                    int64_t* topk_indices, int32_t* heap, Chunk<T>& chunk) {
  T bounds[kChunkRows];
  Candidates<T> candidates[kChunkRows];
  for (int64_t r = 0; r < chunk.size; ++r)
    bounds[r] = bound_of_best(chunk.best_maxima[0] + r, kChunkRows, top_k);
  for (int64_t r = 0; r < chunk.size; ++r)
    pack_candidates(keys + r * chunk.stride, padded, bounds[r], candidates[r]);
  for (int64_t r = 0; r < chunk.size; ++r) {
    const int64_t row = r * chunk.stride;
    chunk.found[r] = choose_among(candidates[r], keys + row, chunk.x + row, num_experts, bounds[r],
                                  top_k, heap, topk_indices + chunk.tokens[r] * top_k);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
/// Chooses by the keys sigmoid(x) + bias, without the exact sigmoid of every expert: rough keys
/// leave few candidates, whose exact keys decide. With rough keys off by less than d, the K-th best
/// exact key is not below the bound of the rough ones - d, and who reaches that has a rough key not
/// below the bound - 2 d; the sum with the bias is rounded besides.
inline void choose_by_sigmoid(int64_t num_experts, int64_t padded, const float* bias, int64_t top_k,
                              int64_t* topk_indices, int32_t* heap, Chunk<float>& chunk) {
  using Vec = Vectorized<float>;
  for (int64_t r = 0; r < chunk.size; ++r) {
    keys_of_row<false>(
        chunk.x + r * chunk.stride, padded, bias,
        [](int64_t, Vec x) { return Vec(rough_sigmoid(x)); }, chunk.keys + r * chunk.stride,
        chunk.maxima[r]);
  }
  sort_maxima(chunk);
  float bounds[kChunkRows];
  Candidates<float> candidates[kChunkRows];
  for (int64_t r = 0; r < chunk.size; ++r) {
    constexpr float kHighest = -kLowest<float>, kRounding = 1e-6f;
    float bound = bound_of_best(chunk.best_maxima[0] + r, kChunkRows, top_k);
    if (bound > kHighest) bound = kHighest;
    bound -= 2 * kRoughSigmoidError + kRounding * __builtin_fabsf(bound);
    bounds[r] = bound > kLowest<float> ? bound : kLowest<float>;
  }
  for (int64_t r = 0; r < chunk.size; ++r)
    pack_candidates<false>(chunk.keys + r * chunk.stride, padded, bounds[r], candidates[r]);
  const auto exact = [](int64_t, Vec x) { return score<ScoreFunction::kSigmoid>(x); };
  for (int64_t r = 0; r < chunk.size; ++r) {
    Candidates<float>& passed = candidates[r];
    const float* const x = chunk.x + r * chunk.stride;
    if (passed.count > kGroups) {
      keys_of_row<false>(x, padded, bias, exact, chunk.keys + r * chunk.stride, chunk.maxima[r]);
      continue;
    }
    const auto real = static_cast<__mmask16>((1u << passed.count) - 1);
    const __m512 absent = _mm512_set1_ps(kNegativeInfinity<float>);
    const __m512i experts = _mm512_load_si512(passed.experts);
    const __m512 logits = _mm512_mask_i32gather_ps(absent, real, experts, x, sizeof(float));
    const __m512 biases = _mm512_mask_i32gather_ps(absent, real, experts, bias, sizeof(float));
    const Vec key = exact(0, logits) + Vec(biases);
    _mm512_store_ps(passed.keys, _mm512_mask_mov_ps(absent, real, key));
  }
  for (int64_t r = 0; r < chunk.size; ++r) {
    const int64_t row = r * chunk.stride;
    chunk.found[r] = choose_among(candidates[r], chunk.keys + row, chunk.x + row, num_experts,
                                  bounds[r], top_k, heap, topk_indices + chunk.tokens[r] * top_k);
  }
}
#endif

/// Takes the experts given for one row, without those that are absent; returns how many there are.
template <typename T>
int64_t take_forced(const int64_t* forced, int64_t top_k, const T* x, int64_t* chosen) {
  int64_t found = 0;
  for (int64_t k = 0; k < top_k; ++k) {
    if (forced[k] >= 0 && x[forced[k]] > kNegativeInfinity<T>) chosen[found++] = forced[k];
  }
  return found;
}

/// Moves the experts and weights that take_forced put together back to their slots.
template <typename T>
void spread_forced(const int64_t* forced, int64_t top_k, int64_t found, int64_t* chosen,
                   T* weights) {
  for (int64_t k = top_k - 1; k >= 0; --k) {
    const bool is_here = found > 0 && forced[k] == chosen[found - 1];
    found -= is_here;
    chosen[k] = is_here ? chosen[found] : -1;
    weights[k] = is_here ? weights[found] : T(0);
  }
}

/// Writes that the slots of `token` from `found` on chose no expert.
template <typename scalar_t>
void leave_empty(const TopKGatingRows<scalar_t>& rows, int64_t token, int64_t found) {
  for (int64_t k = token * rows.top_k + found; k < (token + 1) * rows.top_k; ++k) {
    rows.topk_indices[k] = -1;
    rows.topk_weights[k] = 0;
  }
}

// ---- their weights ---------------------------------------------------------------------

/// Writes the weights of all rows, scaling_factor value / total, and counts their experts. The
/// values of the chosen are exps, if `from_exps`, whose best is exp(0) = 1, or made of the logits;
/// with `best_first` a row's first is its largest logit. `values` [top_k, kChunkRows] holds finite
/// numbers or -inf everywhere.
template <typename scalar_t>
void weights_of_chunk(const TopKGatingRows<scalar_t>& rows, bool from_exps, bool best_first,
                      compute_t<scalar_t>* values, const Chunk<compute_t<scalar_t>>& chunk,
                      int64_t* counts) {
  using T = compute_t<scalar_t>;
  using Vec = Vectorized<T>;
  const int64_t top_k = rows.top_k;
  const T rest = from_exps ? T(0) : kNegativeInfinity<T>;
  for (int64_t r = 0; r < chunk.size; ++r) {
    const T* const row = (from_exps ? chunk.exps : chunk.x) + r * chunk.stride;
    const int64_t* const chosen = rows.topk_indices + chunk.tokens[r] * top_k;
    const int64_t found = chunk.found[r];
    for (int64_t k = 0; k < found; ++k) {
      values[k * kChunkRows + r] = row[chosen[k]];
      counts[chosen[k]] += 1;
    }
    for (int64_t k = found; k < top_k; ++k) values[k * kChunkRows + r] = rest;
  }
  const Vec scale(rows.scaling_factor);
  with_score(rows.score_function, [&](auto kScore) {
    for (int64_t lane = 0; lane < chunk.size; lane += Vec::size()) {
      T* const slots = values + lane;
      Vec total(1);
      if (from_exps) {
        total = Vec::loadu(chunk.totals + lane);
      } else if (rows.norm_topk_prob) {
        const Vec top =
            best_first ? Vec::loadu(chunk.peaks + lane) : maximum_of_slots(slots, top_k);
        for (int64_t k = 0; k < top_k * kChunkRows; k += kChunkRows)
          in_proportion<kScore>(Vec::loadu(slots + k), top).store(slots + k);
      } else {
        for (int64_t k = 0; k < top_k * kChunkRows; k += kChunkRows)
          score<kScore>(Vec::loadu(slots + k)).store(slots + k);
      }
      if (rows.norm_topk_prob) {
        total = Vec(0);
        for (int64_t k = 0; k < top_k * kChunkRows; k += kChunkRows)
          total = total + Vec::loadu(slots + k);
      }
      // Divided first: a single expert of a renormalised row gets scaling_factor itself.
      for (int64_t k = 0; k < top_k * kChunkRows; k += kChunkRows)
        (scale * (Vec::loadu(slots + k) / total)).store(slots + k);
    }
  });
  for (int64_t r = 0; r < chunk.size; ++r) {
    T* const weights = rows.topk_weights + chunk.tokens[r] * top_k;
    for (int64_t k = 0; k < chunk.found[r]; ++k) weights[k] = values[k * kChunkRows + r];
  }
}

// ---- sums over the tokens --------------------------------------------------------------

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

/// Writes lse and adds to all of `sums` but the load and the NaN rows. The exps are those of x.
template <typename scalar_t>
void add_statistics(const TopKGatingRows<scalar_t>& rows, int64_t padded,
                    Chunk<compute_t<scalar_t>>& chunk, compute_t<scalar_t>* sums) {
  using T = compute_t<scalar_t>;
  const int64_t num_experts = rows.num_experts;
  for (int64_t r = 0; r < chunk.size; ++r) {
    const T token_weight = chunk.token_weights[r];
    const T lse = chunk.peaks[r] + chunk.log_totals[r];
    rows.lse[chunk.tokens[r]] = lse;
    sums[RoutingSums::weight(num_experts)] += token_weight;
    sums[RoutingSums::lse_squared(num_experts)] += token_weight * lse * lse;
  }
  if (is_curved(rows.score_function)) {
    log_scores_of_chunk(rows.score_function, padded, chunk.keys, chunk);
    exponentials_of_chunk(chunk.keys, padded, chunk);
  }
  add_probabilities(chunk, num_experts, sums + RoutingSums::prob);
  for (int64_t r = 0; r < chunk.size; ++r) {
    const T entropy = chunk.log_totals[r] + chunk.spreads[r] / chunk.totals[r];
    sums[RoutingSums::entropy(num_experts)] += chunk.token_weights[r] * entropy;
  }
}

}  // namespace

/// Tokens [begin, end): fills their weights, indices and lse, and adds to `totals`.
template <typename scalar_t>
void topk_gating_rows(const TopKGatingRows<scalar_t>& rows, int64_t begin, int64_t end,
                      const TopKGatingTotals<compute_t<scalar_t>>& totals,
                      compute_t<scalar_t>* scratch) {
  using T = compute_t<scalar_t>;
  const int64_t num_experts = rows.num_experts, top_k = rows.top_k;
  const int64_t padded = (num_experts + kGroups - 1) / kGroups * kGroups;
  const int64_t width = RoutingSums::width(num_experts);
  const bool stats = rows.lse != nullptr, forced = rows.forced_indices != nullptr;
  const bool softmax = rows.score_function == ScoreFunction::kSoftmax;
  const bool keyed = !forced && (rows.expert_bias != nullptr || rows.num_groups > 1);
  const bool need_exps = stats || (softmax && (keyed || !rows.norm_topk_prob));
#if defined(CPU_CAPABILITY_AVX512)
  const bool rough = std::is_same_v<T, float> && rows.num_groups == 1 && top_k <= kGroups &&
                     rows.score_function == ScoreFunction::kSigmoid;
#endif
  const bool best_first = !keyed && !forced;  // the best expert is sure to be the first chosen
  const bool from_exps = softmax && need_exps && (!rows.norm_topk_prob || best_first);

  if (num_experts <= kNarrow && softmax && !keyed && !forced && rows.segment_ids == nullptr &&
      rows.noise == nullptr) {
    narrow_rows(rows, begin, end, totals);
    return;
  }

  Chunk<T> chunk(num_experts, scratch);
  const int64_t part = chunk.stride;
  T* const bias = chunk.scratch;
  T* const values = bias + part;  // of the slots
  for (int64_t k = 0; k < top_k * kChunkRows; ++k) values[k] = 0;
  T* const group_scores = values + top_k * kChunkRows;
  auto* const heap = reinterpret_cast<int32_t*>(group_scores + part);
  auto* const kept = reinterpret_cast<int64_t*>(group_scores + 2 * part);
  if (keyed) {
    for (int64_t e = 0; e < part; ++e) {
      const T value = rows.expert_bias != nullptr && e < num_experts ? rows.expert_bias[e] : T(0);
      bias[e] = value > kLowest<T> ? value : kLowest<T>;  // of a NaN, too
    }
  }

  const auto settle = [&](int64_t token) {
    leave_empty(rows, token, 0);
    if (stats) rows.lse[token] = 0;
  };
  const auto saw_nan = [&](int64_t segment) {
    if (!stats) return;
    totals.sums[(segment - totals.first_segment) * width + RoutingSums::nan_rows(num_experts)] += 1;
  };
  for (int64_t token = begin; token < end;) {
    token = fill_chunk(rows, token, end, chunk, settle, saw_nan);
    if (chunk.size == 0) continue;
    if (need_exps) exponentials_of_chunk(chunk.x, padded, chunk);
    if (forced) {
      for (int64_t r = 0; r < chunk.size; ++r) {
        const int64_t slot = chunk.tokens[r] * top_k;
        chunk.found[r] = take_forced(rows.forced_indices + slot, top_k, chunk.x + r * chunk.stride,
                                     rows.topk_indices + slot);
      }
    } else {
      if (!keyed) {
        choose_experts(chunk.x, num_experts, padded, top_k, rows.topk_indices, heap, chunk);
#if defined(CPU_CAPABILITY_AVX512)
      } else if (rough) {
        if constexpr (std::is_same_v<T, float>)
          choose_by_sigmoid(num_experts, padded, bias, top_k, rows.topk_indices, heap, chunk);
#endif
      } else {
        keys_of_chunk(rows.score_function, padded, bias, chunk);
        for (int64_t r = 0; rows.num_groups > 1 && r < chunk.size; ++r) {
          T* const keys = chunk.keys + r * chunk.stride;
          limit_groups(rows, keys, group_scores, kept, heap);
          group_maxima(keys, padded, chunk.maxima[r]);
        }
        sort_maxima(chunk);
        choose_experts(chunk.keys, num_experts, padded, top_k, rows.topk_indices, heap, chunk);
      }
    }

    const int64_t segment = chunk.segment - totals.first_segment;
    T* const sums = stats ? totals.sums + segment * width : nullptr;
    weights_of_chunk(rows, from_exps, best_first, values, chunk,
                     totals.counts + segment * num_experts);
    for (int64_t r = 0; r < chunk.size; ++r) {
      const int64_t found = chunk.found[r], slot = chunk.tokens[r] * top_k;
      int64_t* const chosen = rows.topk_indices + slot;
      if (stats && rows.token_weights != nullptr) {
        T* const load = sums + RoutingSums::load(num_experts);
        for (int64_t k = 0; k < found; ++k) load[chosen[k]] += chunk.token_weights[r];
      }
      if (forced) {
        spread_forced(rows.forced_indices + slot, top_k, found, chosen, rows.topk_weights + slot);
      } else {
        leave_empty(rows, chunk.tokens[r], found);
      }
    }
    if (stats) add_statistics(rows, padded, chunk, sums);
  }
  if (!stats || rows.token_weights != nullptr) return;
  for (int64_t s = 0; s < totals.num_segments; ++s) {
    for (int64_t e = 0; e < num_experts; ++e) {
      totals.sums[s * width + RoutingSums::load(num_experts) + e] =
          static_cast<T>(totals.counts[s * num_experts + e]);
    }
  }
}

#define INSTANTIATE(scalar_t)                                                                 \
  template void topk_gating_rows<scalar_t>(const TopKGatingRows<scalar_t>&, int64_t, int64_t, \
                                           const TopKGatingTotals<compute_t<scalar_t>>&,      \
                                           compute_t<scalar_t>*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE

}  // namespace equipoise::cpu::CPU_CAPABILITY
