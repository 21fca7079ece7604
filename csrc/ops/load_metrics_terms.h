// SPDX-License-Identifier: Apache-2.0
// The metrics of load_metrics from what is added up over the experts, once for the CPU and for
// CUDA. The formulas are in load_metrics.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define EQUIPOISE_DEVICE __device__
#else
#define EQUIPOISE_DEVICE
#endif

namespace equipoise {

constexpr int64_t kNumLoadMetrics = 13;

/// Of the counts C of one layer; `largest` and on are 0 or whatever where `total` is 0.
struct LoadSums {
  double total;     // sum C
  double largest;   // max C
  double smallest;  // min C
  double squares;   // sum (C - mean)^2
  double nats;      // -sum f log f, f = C / total
  double pairs;     // sum |C_i - C_j| over all pairs i < j
  double used;      // experts with 10 C >= mean and C > 0
  double touched;   // experts with C > 0
};

/// Whether an expert with `count` tokens has at least a tenth of its share.
EQUIPOISE_DEVICE inline bool has_a_tenth(double count, double total, double experts) {
  return count > 0 && 10 * experts * count >= total;
}

/// Writes metric m, in the order of kLoadMetricNames, to out[m * stride]; NaN for negative counts.
EQUIPOISE_DEVICE inline void write_load_metrics(const LoadSums& s, double experts, bool unbiased,
                                                int64_t stride, double* out) {
  const double mean = s.total / experts;
  const double nats =
      s.total > 0 ? s.nats : std::numeric_limits<double>::quiet_NaN();  // no load, no entropy
  const double metrics[kNumLoadMetrics] = {
      std::sqrt(s.squares / (unbiased ? experts - 1 : experts)) / mean,
      s.largest / mean,
      (s.largest - mean) / mean,
      s.largest - mean,
      (mean - s.smallest) / mean,
      s.pairs / (experts * s.total),
      nats,
      std::exp(nats),
      std::log(experts) - nats,
      s.used / experts,
      s.touched / experts,
      experts - s.touched,
      s.largest / s.total,
  };
  for (int64_t m = 0; m < kNumLoadMetrics; ++m) {
    out[m * stride] = s.smallest < 0 ? std::numeric_limits<double>::quiet_NaN() : metrics[m];
  }
}

}  // namespace equipoise
