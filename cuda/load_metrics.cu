// SPDX-License-Identifier: Apache-2.0
// load_metrics on CUDA; see ../csrc/ops/load_metrics.h. A block takes a row (layer). Instead of
// sorting for the Gini coefficient it adds up the distances of all pairs, E^2 reads from shared
// memory by all threads at once: exact in integers, and short for the numbers of experts there are.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "../csrc/ops/load_metrics_terms.h"
#include "block.cuh"
#include "host.h"
#include "launch.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;

// Shared memory: the row, or nothing if it does not fit.
template <bool kInShared>
__global__ void __launch_bounds__(kThreads)
    load_metrics_kernel(const int64_t* counts, int64_t experts, bool unbiased, double* metrics) {
  const int64_t* row = counts + blockIdx.x * experts;
  if (kInShared) {
    auto* copy = reinterpret_cast<int64_t*>(shared_memory);
    for (int64_t e = threadIdx.x; e < experts; e += kThreads) copy[e] = row[e];
    __syncthreads();
    row = copy;
  }
  int64_t total = 0, largest = row[0], below = -row[0], touched = 0;  // below: -smallest
  for (int64_t e = threadIdx.x; e < experts; e += kThreads) {
    total += row[e];
    largest = Max{}(largest, row[e]);
    below = Max{}(below, -row[e]);
    touched += row[e] > 0;
  }
  total = block_reduce(total, Sum{});
  largest = block_reduce(largest, Max{});
  below = block_reduce(below, Max{});
  touched = block_reduce(touched, Sum{});

  const double mean = static_cast<double>(total) / experts;
  double squares = 0, nats = 0;
  int64_t used = 0, pairs = 0;
  for (int64_t e = threadIdx.x; e < experts; e += kThreads) {
    const int64_t count = row[e];
    const double f = static_cast<double>(count) / total;
    squares += (count - mean) * (count - mean);
    if (count > 0) nats -= f * std::log(f);
    used += has_a_tenth(count, total, experts);
    for (int64_t other = 0; other < experts; ++other) {
      const int64_t distance = count - row[other];
      pairs += distance > 0 ? distance : 0;
    }
  }
  const LoadSums sums{static_cast<double>(total),
                      static_cast<double>(largest),
                      -static_cast<double>(below),
                      block_reduce(squares, Sum{}),
                      block_reduce(nats, Sum{}),
                      static_cast<double>(block_reduce(pairs, Sum{})),
                      static_cast<double>(block_reduce(used, Sum{})),
                      static_cast<double>(touched)};
  if (threadIdx.x == 0) {
    write_load_metrics(sums, experts, unbiased, gridDim.x, metrics + blockIdx.x);
  }
}

}  // namespace

void load_metrics_cuda(const at::Tensor& tokens_per_expert, bool unbiased,
                       const at::Tensor& metrics) {
  const c10::DeviceGuard guard(tokens_per_expert.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t experts = tokens_per_expert.size(-1);
  const auto* counts = tokens_per_expert.const_data_ptr<int64_t>();
  auto* out = metrics.mutable_data_ptr<double>();
  const int64_t rows = tokens_per_expert.numel() / experts;
  const int64_t shared_bytes = experts * static_cast<int64_t>(sizeof(int64_t));
  if (shared_bytes <= kMaxSharedBytes) {
    launch(load_metrics_kernel<true>, rows, kThreads, shared_bytes, stream, counts, experts,
           unbiased, out);
  } else {
    launch(load_metrics_kernel<false>, rows, kThreads, 0, stream, counts, experts, unbiased, out);
  }
}

}  // namespace equipoise
