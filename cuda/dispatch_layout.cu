// SPDX-License-Identifier: Apache-2.0
// dispatch_layout on CUDA: tokens of each expert and rank, and the map of tokens and ranks; see
// ../csrc/ops/dispatch_layout.h.
//
// A thread takes a slot. Of the slots of a token that go to one rank the first sets the flag and
// counts the token, which it knows from the slots before it. Counts are integers, so the order of
// the atomics is free: a histogram in the shared memory of each block, added up in global memory.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "block.cuh"
#include "host.h"
#include "launch.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;

struct Layout {
  const int64_t* indices;  // [T, K]
  int64_t slots, top_k;
  int experts, ranks, experts_per_rank;
  unsigned* of_expert;  // [E], zero at first
  unsigned* of_rank;    // [R], zero at first
  bool* in_rank;        // [T, R], false at first
};

// Shared memory: a bin per expert, then one per rank, or nothing if they do not fit.
template <bool kInShared>
__global__ void __launch_bounds__(kThreads) dispatch_layout_kernel(const Layout l) {
  auto* bins = reinterpret_cast<unsigned*>(shared_memory);
  unsigned* of_expert = kInShared ? bins : l.of_expert;
  unsigned* of_rank = kInShared ? bins + l.experts : l.of_rank;
  if (kInShared) {
    for (int i = threadIdx.x; i < l.experts + l.ranks; i += kThreads) bins[i] = 0;
    __syncthreads();
  }
  for (int64_t slot = blockIdx.x * int64_t{kThreads} + threadIdx.x; slot < l.slots;
       slot += gridDim.x * int64_t{kThreads}) {
    const int64_t expert = l.indices[slot];
    if (expert < 0 || expert >= l.experts) continue;
    atomicAdd(&of_expert[expert], 1u);
    const int rank = static_cast<int>(expert) / l.experts_per_rank;
    const int64_t first_expert = int64_t{rank} * l.experts_per_rank;
    const int64_t token = slot / l.top_k;
    bool is_first = true;
    for (int64_t before = token * l.top_k; is_first && before < slot; ++before) {
      const int64_t other = l.indices[before];
      is_first = other < first_expert || other >= first_expert + l.experts_per_rank;
    }
    if (!is_first) continue;
    atomicAdd(&of_rank[rank], 1u);
    l.in_rank[token * l.ranks + rank] = true;
  }
  if (!kInShared) return;
  __syncthreads();
  for (int e = threadIdx.x; e < l.experts; e += kThreads) {
    if (of_expert[e] > 0) atomicAdd(&l.of_expert[e], of_expert[e]);
  }
  for (int r = threadIdx.x; r < l.ranks; r += kThreads) {
    if (of_rank[r] > 0) atomicAdd(&l.of_rank[r], of_rank[r]);
  }
}

}  // namespace

void dispatch_layout_cuda(const at::Tensor& topk_indices, const at::Tensor& num_tokens_per_rank,
                          const at::Tensor& num_tokens_per_expert,
                          const at::Tensor& is_token_in_rank) {
  const c10::DeviceGuard guard(topk_indices.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for (const auto& result : {num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank}) {
    C10_CUDA_CHECK(cudaMemsetAsync(result.mutable_data_ptr(), 0, result.nbytes(), stream));
  }
  const auto counts = [](const at::Tensor& tensor) {
    return reinterpret_cast<unsigned*>(tensor.mutable_data_ptr<int32_t>());
  };
  Layout l{};
  l.indices = topk_indices.const_data_ptr<int64_t>();
  l.slots = topk_indices.numel();
  l.top_k = topk_indices.size(1);
  l.experts = static_cast<int>(num_tokens_per_expert.size(0));
  l.ranks = static_cast<int>(num_tokens_per_rank.size(0));
  l.experts_per_rank = l.experts / l.ranks;
  l.of_expert = counts(num_tokens_per_expert);
  l.of_rank = counts(num_tokens_per_rank);
  l.in_rank = is_token_in_rank.mutable_data_ptr<bool>();

  constexpr int64_t kSlotsPerThread = 4, kMaxBlocks = 512;
  const int64_t blocks = std::min(ceil_div(l.slots, kThreads * kSlotsPerThread), kMaxBlocks);
  const int64_t shared_bytes = (int64_t{l.experts} + l.ranks) * sizeof(unsigned);
  if (shared_bytes <= kMaxSharedBytes) {
    launch(dispatch_layout_kernel<true>, blocks, kThreads, shared_bytes, stream, l);
  } else {
    launch(dispatch_layout_kernel<false>, blocks, kThreads, 0, stream, l);
  }
}

}  // namespace equipoise
