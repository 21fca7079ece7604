// SPDX-License-Identifier: Apache-2.0
// load_metrics: schema -> checks and shapes -> CPU -> registration, top to bottom.
#include "load_metrics.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "../checks.h"
#include "../cpu/dispatch.h"
#include "../library.h"
#include "load_metrics_terms.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

EQUIPOISE_DECLARE_CPU_KERNEL(void load_sums(const int64_t* counts, int64_t rows, int64_t experts,
                                            double* scratch, LoadSums* sums))

namespace equipoise {
namespace {

using at::Tensor;

// ---- schema -------------------------------------------------------------------------------------

constexpr const char* kOp = "load_metrics";

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def("load_metrics(Tensor tokens_per_expert, bool unbiased) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

static_assert(kLoadMetricNames.size() == kNumLoadMetrics);

Tensor load_metrics_meta(const Tensor& tokens_per_expert, bool /*unbiased*/) {
  check_dtype(kOp, "tokens_per_expert", tokens_per_expert, at::kLong);
  TORCH_CHECK(tokens_per_expert.dim() > 0 && tokens_per_expert.sym_size(-1) > 0, kOp,
              ": tokens_per_expert must have shape [..., E] with E >= 1, got ",
              tokens_per_expert.sym_sizes());
  const auto leading = tokens_per_expert.sym_sizes().slice(0, tokens_per_expert.dim() - 1);
  std::vector<c10::SymInt> sizes{kNumLoadMetrics};
  sizes.insert(sizes.end(), leading.begin(), leading.end());
  return at::empty_symint(sizes, tokens_per_expert.options().dtype(at::kDouble));
}

template <auto backend>
Tensor load_metrics_run(const Tensor& tokens_per_expert, bool unbiased) {
  const auto metrics = load_metrics_meta(tokens_per_expert, unbiased);
  if (metrics.numel() > 0) backend(tokens_per_expert.contiguous(), unbiased, metrics);
  return metrics;
}

// ---- CPU ----------------------------------------------------------------------------------------

void load_metrics_cpu(const Tensor& tokens_per_expert, bool unbiased, const Tensor& metrics) {
  constexpr int64_t kRows = 16;  // of a call, one in each lane of the longest vector
  const int64_t experts = tokens_per_expert.size(-1), rows = tokens_per_expert.numel() / experts;
  const auto* counts = tokens_per_expert.const_data_ptr<int64_t>();
  auto* out = metrics.mutable_data_ptr<double>();
  std::atomic<int64_t> negative{-1};
  const int64_t calls = (rows + kRows - 1) / kRows;
  const int64_t grain = std::max<int64_t>(1, 65536 / (kRows * experts));
  at::parallel_for(0, calls, grain, [&](int64_t first, int64_t last) {
    std::vector<double> scratch(8 * experts);
    LoadSums sums[kRows];
    for (int64_t row = first * kRows; row < std::min(rows, last * kRows); row += kRows) {
      const int64_t size = std::min(kRows, rows - row);
      EQUIPOISE_CALL_CPU_KERNEL(load_sums, counts + row * experts, size, experts, scratch.data(),
                                sums)
      for (int64_t r = 0; r < size; ++r) {
        if (sums[r].smallest < 0) negative.store(row + r, std::memory_order_relaxed);
        write_load_metrics(sums[r], experts, unbiased, rows, out + row + r);
      }
    }
  });
  if (const int64_t row = negative.load(); row >= 0) {
    TORCH_CHECK(false, kOp, ": tokens_per_expert must hold counts >= 0, got ",
                *std::min_element(counts + row * experts, counts + (row + 1) * experts));
  }
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) { m.impl(kOp, load_metrics_meta); }
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) { m.impl(kOp, load_metrics_run<load_metrics_cpu>); }
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl(kOp, load_metrics_run<load_metrics_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {  // integers have no gradient
  m.impl(kOp, torch::CppFunction::makeFallthrough());
}

}  // namespace

torch::OrderedDict<std::string, Tensor> load_metrics(const Tensor& tokens_per_expert,
                                                     bool unbiased) {
  static const auto op = find_op<Tensor(const Tensor&, bool)>(kOp);
  const auto metrics = op.call(tokens_per_expert, unbiased);
  torch::OrderedDict<std::string, Tensor> named("metric");
  for (int64_t m = 0; m < kNumLoadMetrics; ++m)
    named.insert(kLoadMetricNames[m], metrics.select(0, m));
  return named;
}

}  // namespace equipoise
