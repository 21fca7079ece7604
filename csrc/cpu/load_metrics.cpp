// SPDX-License-Identifier: Apache-2.0
// What load_metrics adds up over the experts, on the CPU. Each row (layer) has a lane of its own,
// so that no step crosses lanes and a sorting network serves all rows of a vector at once.
#include <cstdint>
#include <type_traits>

#include "../ops/load_metrics_terms.h"
#include "scores.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

/// Sorts each lane of x [n] vectors, ascending: Batcher's merge exchange for any n (Knuth, The Art
/// of Computer Programming 3, 5.2.2, algorithm M).
template <typename T>
void sort_lanes(int64_t n, T* x) {
  using Vec = Vectorized<T>;
  const auto exchange = [x](int64_t i, int64_t j) __attribute__((always_inline)) {
    const Vec a = Vec::loadu(x + i * Vec::size()), b = Vec::loadu(x + j * Vec::size());
    at::vec::clamp_max(a, b).store(x + i * Vec::size());
    at::vec::clamp_min(a, b).store(x + j * Vec::size());
  };
  int64_t top = 1;
  while (2 * top < n) top *= 2;
  for (int64_t p = top; p > 0; p /= 2) {
    int64_t r = 0, d = p;
    for (int64_t q = top;; q /= 2) {
      // All i with (i & p) == r, in runs of p.
      for (int64_t run = r; run < n - d; run += 2 * p) {
        const int64_t end = run + p < n - d ? run + p : n - d;
        for (int64_t i = run; i < end; ++i) exchange(i, i + d);
      }
      if (q == p) break;
      d = q - p;
      r = p;
    }
  }
}

/// x [experts] vectors = counts, row r in lane r; lanes without a row hold row 0.
template <typename T>
void load_lanes(const int64_t* counts, int64_t rows, int64_t experts, T* x) {
  constexpr int64_t kLanes = Vectorized<T>::size();
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t* const row = counts + (lane < rows ? lane : 0) * experts;
    for (int64_t e = 0; e < experts; ++e) x[e * kLanes + lane] = static_cast<T>(row[e]);
  }
}

/// The sum of the distances of all pairs, of up to Vectorized<T>::size() rows whose counts T holds
/// exactly.
template <typename T>
void pairs_of_lanes(const int64_t* counts, int64_t rows, int64_t experts, T* x, LoadSums* sums) {
  constexpr int64_t kLanes = Vectorized<T>::size();
  load_lanes(counts, rows, experts, x);
  sort_lanes(experts, x);
  double pairs[kLanes] = {};
  for (int64_t e = 0; e < experts; ++e) {
    const auto weight = static_cast<double>(2 * e + 1 - experts);
    for (int64_t lane = 0; lane < kLanes; ++lane) pairs[lane] += weight * x[e * kLanes + lane];
  }
  for (int64_t r = 0; r < rows; ++r) sums[r].pairs = pairs[r];
}

/// All other sums, of up to Vectorized<double>::size() rows.
inline void sums_of_lanes(const int64_t* counts, int64_t rows, int64_t experts, double* x,
                          LoadSums* sums) {
  using Vec = Vectorized<double>;
  load_lanes(counts, rows, experts, x);
  const auto at = [x](int64_t e) { return Vec::loadu(x + e * Vec::size()); };
  Vec total(0), largest = at(0), smallest = at(0);
  for (int64_t e = 0; e < experts; ++e) {
    total = total + at(e);
    largest = at::vec::clamp_min(largest, at(e));
    smallest = at::vec::clamp_max(smallest, at(e));
  }
  const Vec mean = total / Vec(experts), share = Vec(1) / total, zero(0), one(1);
  Vec squares(0), nats(0), used(0), touched(0);
  for (int64_t e = 0; e < experts; ++e) {
    const Vec count = at(e), f = count * share, distance = count - mean;
    squares = at::vec::fmadd(distance, distance, squares);
    // Where f is 0 the logarithm of a tiny number, which is finite, counts 0 times.
    nats = nats - f * at::vec::clamp_min(f, Vec(1e-300)).log();
    const Vec has_any = Vec::blendv(zero, one, count > zero);
    touched = touched + has_any;
    used = used + Vec::blendv(zero, has_any, Vec(10 * experts) * count >= total);
  }
  double lanes[7][Vec::size()];
  const Vec of[7] = {total, largest, smallest, squares, nats, used, touched};
  for (int i = 0; i < 7; ++i) of[i].store(lanes[i]);
  for (int64_t r = 0; r < rows; ++r) {
    sums[r] = {lanes[0][r], lanes[1][r], lanes[2][r], lanes[3][r],
               lanes[4][r], 0,           lanes[5][r], lanes[6][r]};
  }
}

/// Calls part(first, size) for every `lanes` of `rows` rows.
template <typename Part>
void for_lanes(int64_t rows, int64_t lanes, const Part& part) {
  for (int64_t r = 0; r < rows; r += lanes) part(r, rows - r < lanes ? rows - r : lanes);
}

}  // namespace

/// The sums of `rows` rows of counts [rows, experts]; `scratch` holds 8 experts' worth of numbers.
void load_sums(const int64_t* counts, int64_t rows, int64_t experts, double* scratch,
               LoadSums* sums) {
  bool few = true;  // tokens: float32 holds them exactly, and twice as many in a vector
  for_lanes(rows, Vectorized<double>::size(), [&](int64_t r, int64_t size) {
    sums_of_lanes(counts + r * experts, size, experts, scratch, sums + r);
    for (int64_t i = r; i < r + size; ++i) few = few && sums[i].largest <= 0x1p24;
  });
  const auto pairs = [&](auto* x) {
    for_lanes(rows, Vectorized<std::decay_t<decltype(*x)>>::size(), [&](int64_t r, int64_t size) {
      pairs_of_lanes(counts + r * experts, size, experts, x, sums + r);
    });
  };
  few ? pairs(reinterpret_cast<float*>(scratch)) : pairs(scratch);
}

}  // namespace equipoise::cpu::CPU_CAPABILITY
