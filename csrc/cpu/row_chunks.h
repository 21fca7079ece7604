// SPDX-License-Identifier: Apache-2.0
// Rows of logits that are worked on together: a few at a time, in chunks that stay in L1, and each
// step is done for all of them before the next. The steps of one row wait for one another, those of
// different rows overlap in the processor. For kernels of csrc/cpu, compiled once per instruction
// set.
#pragma once

#include <cstdint>

#include "scores.h"
#include "select_experts.h"
#include "topk_gating.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

constexpr double kInfinityCounts = 1e18;

/// NaN becomes -inf (absent) and is noted; +inf becomes a number whose square is still finite.
template <typename T>
Vectorized<T> sanitize(Vectorized<T> x, int& nan_seen) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    nan_seen |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
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

/// Widens one row of `row` + `noise` into x[0, padded), sanitised, with -inf behind its end, and
/// takes the maxima of its 16 groups. Returns whether it held a NaN.
template <bool kNoise, typename scalar_t>
bool load_row(const scalar_t* row, const scalar_t* noise, int64_t num_experts,
              compute_t<scalar_t>* x, compute_t<scalar_t>* maxima) {
  using T = compute_t<scalar_t>;
  using In = Vectorized<scalar_t>;
  using Vec = Vectorized<T>;
  constexpr int64_t kParts = In::size() / Vec::size();  // vectors of T in one of scalar_t
  constexpr int64_t kPerGroup = kGroups / Vec::size();  // vectors of T in 16 elements
  constexpr int64_t kBest = kParts > kPerGroup ? kParts : kPerGroup;  // a multiple of both
  int nan_seen = 0;
  Vec best[kBest];
  for (auto& b : best) b = Vec(kNegativeInfinity<T>);
  const auto widen = [](const In& in, Vec(&parts)[kParts]) __attribute__((always_inline)) {
    if constexpr (kParts == 1) {
      parts[0] = in;
    } else {
      const auto [low, high] = at::vec::convert_to_float<scalar_t>(in);
      parts[0] = low;
      parts[1] = high;
    }
  };
  // Takes the vector at e, of which `left` elements are there; the others are absent.
  const auto take = [&](int64_t e, int64_t turn, int64_t left) __attribute__((always_inline)) {
    const bool whole = left >= In::size();
    const In absent(kNegativeInfinity<float>);
    Vec parts[kParts], noises[kParts];
    widen(whole      ? In::loadu(row + e)
          : left > 0 ? In::set(absent, In::loadu(row + e, left), left)
                     : absent,
          parts);
    if constexpr (kNoise) {
      widen(whole ? In::loadu(noise + e) : left > 0 ? In::loadu(noise + e, left) : In(0.f), noises);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < kParts; ++i) {
      if constexpr (kNoise) parts[i] = parts[i] + noises[i];
      parts[i] = sanitize(parts[i], nan_seen);
      parts[i].store(x + e + i * Vec::size());
      auto& b = best[(turn * kParts + i) % kBest];
      b = at::vec::clamp_min(b, parts[i]);
    }
  };
  constexpr int64_t kTurns = kBest / kParts;  // so many vectors of scalar_t fill `best`
  constexpr int64_t kStep = kTurns * In::size();
  int64_t e = 0;
  for (; e + kStep <= num_experts; e += kStep) {
#pragma GCC unroll 4
    for (int64_t turn = 0; turn < kTurns; ++turn) take(e + turn * In::size(), turn, In::size());
  }
  if (e < num_experts) {
#pragma GCC unroll 4
    for (int64_t turn = 0; turn < kTurns; ++turn) {
      const int64_t from = e + turn * In::size();
      take(from, turn, num_experts - from);
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
  return nan_seen != 0;
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

constexpr int64_t kChunkLogits = 2048;  // with as many exps they fill half of a usual L1

/// A few rows of one segment that are worked on together. None is masked, in each at least one
/// expert is present. They are on the stack, or, too long for that, one at a time in `scratch`.
template <typename T>
struct Chunk {
  T *x, *exps, *keys;  // [capacity, stride]
  T* scratch;          // what they left of it
  int64_t stride;
  int64_t capacity;
  int64_t size;
  int64_t segment;
  int64_t tokens[kChunkRows];
  T token_weights[kChunkRows];
  alignas(64) T maxima[kChunkRows][kGroups] = {};
  alignas(64) T best_maxima[kGroups][kChunkRows];  // of each row best first, one row per lane
  alignas(64) T peaks[kChunkRows];
  alignas(64) T totals[kChunkRows];
  T spreads[kChunkRows];
  alignas(64) T log_totals[kChunkRows];
  int64_t found[kChunkRows];
  alignas(64) T short_rows[3][kChunkLogits];

  Chunk(int64_t num_experts, T* given) : stride(padded_experts(num_experts)) {
    const bool fits = stride <= kChunkLogits;
    x = fits ? short_rows[0] : given;
    exps = fits ? short_rows[1] : given + stride;
    keys = fits ? short_rows[2] : given + 2 * stride;
    scratch = fits ? given : given + 3 * stride;
    capacity = fits ? kChunkLogits / stride : 1;
    if (capacity > kChunkRows) capacity = kChunkRows;
  }
};

// What the slots of some rows hold lies the other way, [top_k, kChunkRows]: slot k of row r at
// k * kChunkRows + r. Each row has a lane of its own, and no sum over the slots crosses lanes.

/// The largest of `top_k` slots, for the rows in a vector's lanes.
template <typename T>
Vectorized<T> maximum_of_slots(const T* values, int64_t top_k) {
  Vectorized<T> best(kNegativeInfinity<T>);
  for (int64_t k = 0; k < top_k; ++k)
    best = at::vec::clamp_min(best, Vectorized<T>::loadu(values + k * kChunkRows));
  return best;
}

/// Asks for a row that is read later: its memory takes longer than the row's own work.
template <typename scalar_t>
void prefetch_row(const scalar_t* row, int64_t num_experts) {
  constexpr int64_t kLine = 64 / sizeof(scalar_t);
  for (int64_t e = 0; e < num_experts; e += kLine) __builtin_prefetch(row + e);
}

template <typename T>
void sort_maxima(Chunk<T>& chunk) {
  static_assert(kChunkRows == kGroups);
  transpose(chunk.maxima, chunk.best_maxima);
  sort_columns(chunk.best_maxima);
}

/// Loads rows from `token` on until the chunk is full or the segment ends; returns the token after
/// them. Calls settle(token, segment) for those that take no part, and saw_nan(segment).
template <typename scalar_t, typename Settle, typename SawNan>
int64_t fill_chunk(const TopKGatingInput<scalar_t>& rows, int64_t token, int64_t end,
                   Chunk<compute_t<scalar_t>>& chunk, const Settle& settle, const SawNan& saw_nan) {
  using T = compute_t<scalar_t>;
  chunk.size = 0;
  chunk.segment = 0;
  for (; token < end && chunk.size < chunk.capacity; ++token) {
    const int64_t r = chunk.size;
    const int64_t segment = rows.segment_ids != nullptr ? rows.segment_ids[token] : 0;
    if (r > 0 && segment != chunk.segment) break;
    const T token_weight = rows.token_weights != nullptr ? rows.token_weights[token] : T(1);
    bool takes_part = false;
    const int64_t later = token + chunk.capacity;
    if (later < end) prefetch_row(rows.logits + later * rows.row_stride, rows.num_experts);
    if (token_weight > 0) {
      const scalar_t* const row = rows.logits + token * rows.row_stride;
      T* const x = chunk.x + r * chunk.stride;
      const bool nan_seen = rows.noise == nullptr
                                ? load_row<false>(row, row, rows.num_experts, x, chunk.maxima[r])
                                : load_row<true>(row, rows.noise + token * rows.noise_stride,
                                                 rows.num_experts, x, chunk.maxima[r]);
      if (nan_seen) saw_nan(segment);
      takes_part = is_any_present(chunk.maxima[r]);
    }
    if (takes_part) {
      chunk.segment = segment;
      chunk.tokens[r] = token;
      chunk.token_weights[r] = token_weight;
      ++chunk.size;
    } else {
      settle(token);
    }
  }
  sort_maxima(chunk);
  for (int64_t r = 0; r < kChunkRows; ++r) chunk.peaks[r] = chunk.best_maxima[0][r];
  return token;
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
    const Vec distance = from_peak(Vec::loadu(x + e), Vec(peak));
    const Vec value = exponential(distance);
    value.store(exps + e);
    total = total + value;
    spread = at::vec::fmadd(value, distance, spread);
  }
  return {sum_of_lanes(total), -sum_of_lanes(spread)};
}

/// exps = exp(from - peak), with their totals, spreads and log_totals; `from` is x or keys.
template <typename T>
void exponentials_of_chunk(const T* from, int64_t padded, Chunk<T>& chunk) {
  using Vec = Vectorized<T>;
  for (int64_t r = 0; r < chunk.size; ++r) {
    const int64_t row = r * chunk.stride;
    const auto sums = exponentials(from + row, padded, chunk.peaks[r], chunk.exps + row);
    chunk.totals[r] = sums.total;
    chunk.spreads[r] = sums.spread;
  }
  for (int64_t r = chunk.size; r < kChunkRows; ++r) chunk.totals[r] = 1;
  for (int64_t r = 0; r < kChunkRows; r += Vec::size()) {
    Vec::loadu(chunk.totals + r).log().store(chunk.log_totals + r);
  }
}

/// to = log s(x), rows and peaks.
template <typename T>
void log_scores_of_chunk(ScoreFunction score_function, int64_t padded, T* to, Chunk<T>& chunk) {
  using Vec = Vectorized<T>;
  with_score(score_function, [&](auto kScore) {
    for (int64_t r = 0; r < chunk.size; ++r) {
      const int64_t row = r * chunk.stride;
      for (int64_t e = row; e < row + padded; e += Vec::size()) {
        log_score<kScore>(Vec::loadu(chunk.x + e)).store(to + e);
      }
    }
    for (int64_t r = chunk.size; r < kChunkRows; ++r) chunk.peaks[r] = 0;
    for (int64_t r = 0; r < kChunkRows; r += Vec::size()) {
      log_score<kScore>(Vec::loadu(chunk.peaks + r)).store(chunk.peaks + r);
    }
  });
}

}  // namespace
}  // namespace equipoise::cpu::CPU_CAPABILITY
