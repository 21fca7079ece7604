// SPDX-License-Identifier: Apache-2.0
// What load_metrics adds up over the experts, on the CPU. Each row (layer) has a lane of its own,
// so that no step crosses lanes and a sorting network serves all rows of a vector at once.
#include <cstdint>

#include "../ops/load_metrics_terms.h"
#include "scores.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

using Vec = Vectorized<double>;

/// Sorts each lane of x [n] vectors, ascending: Batcher's merge exchange for any n (Knuth, The Art
/// of Computer Programming 3, 5.2.2, algorithm M).
inline void sort_lanes(int64_t n, double* x) {
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

/// The sums of up to Vec::size() rows.
inline void sums_of_lanes(const int64_t* counts, int64_t rows, int64_t experts, double* x,
                          LoadSums* sums) {
  for (int64_t lane = 0; lane < Vec::size(); ++lane) {
    const int64_t* const row = counts + (lane < rows ? lane : 0) * experts;
    for (int64_t e = 0; e < experts; ++e) x[e * Vec::size() + lane] = static_cast<double>(row[e]);
  }
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
  sort_lanes(experts, x);
  Vec pairs(0);
  for (int64_t e = 0; e < experts; ++e)
    pairs = at::vec::fmadd(Vec(2 * e + 1 - experts), at(e), pairs);

  double lanes[8][Vec::size()];
  const Vec of[8] = {total, largest, smallest, squares, nats, pairs, used, touched};
  for (int i = 0; i < 8; ++i) of[i].store(lanes[i]);
  for (int64_t r = 0; r < rows; ++r) {
    sums[r] = {lanes[0][r], lanes[1][r], lanes[2][r], lanes[3][r],
               lanes[4][r], lanes[5][r], lanes[6][r], lanes[7][r]};
  }
}

}  // namespace

/// The sums of `rows` rows of counts [rows, experts]; `scratch` holds 8 experts' worth of numbers.
void load_sums(const int64_t* counts, int64_t rows, int64_t experts, double* scratch,
               LoadSums* sums) {
  for (int64_t r = 0; r < rows; r += Vec::size()) {
    const int64_t size = rows - r < Vec::size() ? rows - r : Vec::size();
    sums_of_lanes(counts + r * experts, size, experts, scratch, sums + r);
  }
}

}  // namespace equipoise::cpu::CPU_CAPABILITY
