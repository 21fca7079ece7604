// SPDX-License-Identifier: Apache-2.0
// expert_bincount on CUDA: counts of each expert in O(E) memory; see ../csrc/ops/expert_bincount.h.
//
// Counts are integers: a histogram in the shared memory of each block, added up by integer atomics.
// Weights are floats, whose sum depends on the order: the slots are cut into contiguous segments, a
// warp walks through each and adds equal experts in slot order to a row of its own, and the last
// blocks to arrive add the rows up. The segments depend on the shape alone.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "block.cuh"
#include "host.h"
#include "launch.cuh"
#include "rows.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;

// The slots: the expert of each, -1 where there is none to count.
struct Slots {
  const int64_t* indices;
  const bool* token_mask;  // [size / top_k] or null
  int64_t size, top_k;
  int experts;

  __device__ int expert(int64_t slot) const {
    const int64_t e = indices[slot];
    const bool counts =
        e >= 0 && e < experts && (token_mask == nullptr || token_mask[slot / top_k]);
    return counts ? static_cast<int>(e) : -1;
  }
};

// Shared memory: a bin per expert, or nothing if they do not fit.
__global__ void __launch_bounds__(kThreads)
    expert_bincount_kernel(const Slots slots, bool in_shared, unsigned long long* counts) {
  auto* bins = reinterpret_cast<unsigned*>(shared_memory);
  if (in_shared) {
    for (int e = threadIdx.x; e < slots.experts; e += kThreads) bins[e] = 0;
    __syncthreads();
  }
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < slots.size;
       i += gridDim.x * int64_t{kThreads}) {
    const int e = slots.expert(i);
    if (e < 0) continue;
    if (in_shared) {
      atomicAdd(&bins[e], 1u);
    } else {
      atomicAdd(&counts[e], 1ull);
    }
  }
  if (!in_shared) return;
  __syncthreads();
  for (int e = threadIdx.x; e < slots.experts; e += kThreads) {
    if (bins[e] > 0) atomicAdd(&counts[e], bins[e]);
  }
}

// One warp per block, which is one segment of `length` slots.
template <typename scalar_t>
__global__ void __launch_bounds__(kWarpSize)
    expert_bincount_weighted_kernel(const Slots slots, const scalar_t* weights, int64_t length,
                                    unsigned* tickets, compute_type<scalar_t>* segment_sums,
                                    compute_type<scalar_t>* sums) {
  using compute_t = compute_type<scalar_t>;
  const int lane = threadIdx.x;
  compute_t* own = segment_sums + int64_t{blockIdx.x} * slots.experts;
  for (int e = lane; e < slots.experts; e += kWarpSize) own[e] = 0;
  __syncwarp();
  const int64_t begin = blockIdx.x * length, end = min(begin + length, slots.size);
  for (int64_t first = begin; first < end; first += kWarpSize) {
    const int64_t slot = first + lane;
    const int expert = slot < end ? slots.expert(slot) : -1;
    const compute_t weight = expert < 0 ? compute_t(0) : static_cast<compute_t>(weights[slot]);
    // Every lane adds up the weights of its expert in the order of the lanes; the lowest keeps it.
    const unsigned peers = __match_any_sync(kFullMask, expert);
    unsigned rest = peers;
    compute_t sum = 0;
    while (__any_sync(kFullMask, rest != 0)) {
      const compute_t next = __shfl_sync(kFullMask, weight, rest == 0 ? lane : __ffs(rest) - 1);
      if (rest != 0) sum += next;
      rest &= rest - 1;
    }
    if (expert >= 0 && (peers & lanes_below(lane)) == 0) own[expert] += sum;
    __syncwarp();  // the next slots may add to the same expert
  }
  sum_block_rows(segment_sums, slots.experts, tickets,
                 [&](int64_t, int64_t expert, compute_t sum) { sums[expert] = sum; });
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    expert_bincount_backward_kernel(const Slots slots, const compute_type<scalar_t>* grad,
                                    scalar_t* grad_weights) {
  const int64_t slot = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (slot >= slots.size) return;
  const int e = slots.expert(slot);
  grad_weights[slot] = e < 0 ? scalar_t(0) : static_cast<scalar_t>(grad[e]);
}

Slots make_slots(const at::Tensor& indices, const std::optional<at::Tensor>& token_mask,
                 int64_t experts) {
  return {indices.const_data_ptr<int64_t>(),
          token_mask.has_value() ? token_mask->const_data_ptr<bool>() : nullptr, indices.numel(),
          indices.size(1), static_cast<int>(experts)};
}

void count(const Slots& slots, const at::Tensor& counts) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  auto* bins = counts.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(cudaMemsetAsync(bins, 0, counts.nbytes(), stream));
  constexpr int64_t kSlotsPerThread = 4, kMaxBlocks = 512;
  const int64_t blocks = std::min(ceil_div(slots.size, kThreads * kSlotsPerThread), kMaxBlocks);
  const int64_t shared_bytes = slots.experts * sizeof(unsigned);
  const bool in_shared = shared_bytes <= kMaxSharedBytes;
  launch(expert_bincount_kernel, blocks, kThreads, in_shared ? shared_bytes : 0, stream, slots,
         in_shared, reinterpret_cast<unsigned long long*>(bins));
}

template <typename scalar_t>
void weigh(const Slots& slots, const at::Tensor& weights, const at::Tensor& sums) {
  using compute_t = compute_type<scalar_t>;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  // Segments of 256 slots, longer ones where the rows of sums would have more than kMaxSums
  // numbers.
  constexpr int64_t kShortest = 256, kMaxSums = 1 << 18, kMaxSegments = kFanIn * kFanIn;
  const int64_t most = std::clamp<int64_t>(kMaxSums / slots.experts, 1, kMaxSegments);
  const int64_t length = std::max(kShortest, ceil_div(slots.size, most));
  const int64_t segments = ceil_div(slots.size, length);

  constexpr int64_t kTicketsBytes = 16 * ceil_div(kTickets * sizeof(unsigned), 16);
  const int64_t sums_bytes = segments * slots.experts * sizeof(compute_t);
  const auto workspace =
      at::empty({kTicketsBytes + sums_bytes}, weights.options().dtype(at::kByte));
  auto* memory = workspace.mutable_data_ptr<uint8_t>();
  if (segments > 1) C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, kTicketsBytes, stream));
  launch(expert_bincount_weighted_kernel<scalar_t>, segments, kWarpSize, 0, stream, slots,
         weights.const_data_ptr<scalar_t>(), length, reinterpret_cast<unsigned*>(memory),
         reinterpret_cast<compute_t*>(memory + kTicketsBytes), sums.mutable_data_ptr<compute_t>());
}

}  // namespace

void expert_bincount_cuda(const at::Tensor& indices, const std::optional<at::Tensor>& weights,
                          const std::optional<at::Tensor>& token_mask, const at::Tensor& counts) {
  const c10::cuda::CUDAGuard guard(indices.device());
  const auto slots = make_slots(indices, token_mask, counts.size(0));
  if (slots.size == 0) {
    C10_CUDA_CHECK(cudaMemsetAsync(counts.mutable_data_ptr(), 0, counts.nbytes(),
                                   c10::cuda::getCurrentCUDAStream()));
    return;
  }
  if (!weights.has_value()) return count(slots, counts);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights->scalar_type(),
                                  "expert_bincount_cuda",
                                  [&] { weigh<scalar_t>(slots, *weights, counts); });
}

void expert_bincount_backward_cuda(const at::Tensor& grad, const at::Tensor& indices,
                                   const std::optional<at::Tensor>& token_mask,
                                   const at::Tensor& grad_weights) {
  if (indices.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(indices.device());
  const auto slots = make_slots(indices, token_mask, grad.size(0));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_weights.scalar_type(), "expert_bincount_backward_cuda", [&] {
        launch(expert_bincount_backward_kernel<scalar_t>, ceil_div(slots.size, kThreads), kThreads,
               0, c10::cuda::getCurrentCUDAStream(), slots,
               grad.const_data_ptr<compute_type<scalar_t>>(),
               grad_weights.mutable_data_ptr<scalar_t>());
      });
}

}  // namespace equipoise
