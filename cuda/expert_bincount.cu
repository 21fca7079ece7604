// SPDX-License-Identifier: Apache-2.0
// expert_bincount on CUDA: counts of each expert in O(E) memory; see ../csrc/ops/expert_bincount.h.
//
// A bin is an expert, or an expert of a segment. Counts are integers: a histogram in the shared
// memory of each block, added up by integer atomics. Weights are floats, whose sum depends on the
// order: the slots are cut into contiguous runs, a warp walks through each and adds equal bins in
// slot order to a row of its own, and the last blocks to arrive add the rows up. The runs depend on
// the shape alone. Bad values are counted where they are met, by integer atomics too.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <climits>

#include "block.cuh"
#include "host.h"
#include "launch.cuh"
#include "rows.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;

// The slots, and the bin of each.
struct Slots {
  const int64_t* indices;
  const bool* token_mask;      // [size / top_k] or null
  const int64_t* segment_ids;  // [size / top_k] or null
  int64_t size, top_k;
  int experts, segments;

  __host__ __device__ int bins() const { return segments * experts; }

  // -1 where there is nothing to count. Adds what is bad to `invalid`: an index that is none, and
  // with the first slot of a token its segment id.
  __device__ int bin(int64_t slot, unsigned* invalid) const {
    if (token_mask != nullptr && !token_mask[slot / top_k]) return -1;
    const int64_t e = indices[slot];
    const bool counts = e >= 0 && e < experts;
    *invalid += !counts && e != -1;
    if (segment_ids == nullptr) return counts ? static_cast<int>(e) : -1;
    const int64_t segment = segment_ids[slot / top_k];
    const bool exists = segment >= 0 && segment < segments;
    *invalid += !exists && slot % top_k == 0;
    return counts && exists ? static_cast<int>(segment * experts + e) : -1;
  }
};

// `num_invalid` is zero at the start of the kernel.
__device__ void report(unsigned invalid, unsigned long long* num_invalid) {
  if (invalid > 0) atomicAdd(num_invalid, invalid);
}

// Shared memory: the bins, or nothing if they do not fit.
// (The 1 in the launch bounds keeps ptxas from spilling to fit more blocks.)
__global__ void __launch_bounds__(kThreads, 1)
    expert_bincount_kernel(const Slots slots, bool in_shared, unsigned long long* counts,
                           unsigned long long* num_invalid) {
  auto* bins = reinterpret_cast<unsigned*>(shared_memory);
  if (in_shared) {
    for (int b = threadIdx.x; b < slots.bins(); b += kThreads) bins[b] = 0;
    __syncthreads();
  }
  unsigned invalid = 0;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < slots.size;
       i += gridDim.x * int64_t{kThreads}) {
    const int bin = slots.bin(i, &invalid);
    if (bin < 0) continue;
    if (in_shared) {
      atomicAdd(&bins[bin], 1u);
    } else {
      atomicAdd(&counts[bin], 1ull);
    }
  }
  report(invalid, num_invalid);
  if (!in_shared) return;
  __syncthreads();
  for (int b = threadIdx.x; b < slots.bins(); b += kThreads) {
    if (bins[b] > 0) atomicAdd(&counts[b], bins[b]);
  }
}

// One warp per block, which is one run of `length` slots.
template <typename scalar_t>
__global__ void __launch_bounds__(kWarpSize)
    expert_bincount_weighted_kernel(const Slots slots, const scalar_t* weights, int64_t length,
                                    unsigned* tickets, compute_type<scalar_t>* run_sums,
                                    compute_type<scalar_t>* sums, unsigned long long* num_invalid) {
  using compute_t = compute_type<scalar_t>;
  const int lane = threadIdx.x;
  compute_t* own = run_sums + int64_t{blockIdx.x} * slots.bins();
  for (int64_t b = lane; b < slots.bins(); b += kWarpSize) own[b] = 0;
  __syncwarp();
  unsigned invalid = 0;
  const int64_t begin = blockIdx.x * length, end = min(begin + length, slots.size);
  for (int64_t first = begin; first < end; first += kWarpSize) {
    const int64_t slot = first + lane;
    const int bin = slot < end ? slots.bin(slot, &invalid) : -1;
    const compute_t weight = bin < 0 ? compute_t(0) : static_cast<compute_t>(weights[slot]);
    // Every lane adds up the weights of its bin in the order of the lanes; the lowest keeps it.
    const unsigned peers = __match_any_sync(kFullMask, bin);
    unsigned rest = peers;
    compute_t sum = 0;
    while (__any_sync(kFullMask, rest != 0)) {
      const compute_t next = __shfl_sync(kFullMask, weight, rest == 0 ? lane : __ffs(rest) - 1);
      if (rest != 0) sum += next;
      rest &= rest - 1;
    }
    if (bin >= 0 && (peers & lanes_below(lane)) == 0) own[bin] += sum;
    __syncwarp();  // the next slots may add to the same bin
  }
  report(invalid, num_invalid);
  sum_block_rows(run_sums, slots.bins(), tickets,
                 [&](int64_t, int64_t bin, compute_t sum) { sums[bin] = sum; });
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    expert_bincount_backward_kernel(const Slots slots, const compute_type<scalar_t>* grad,
                                    scalar_t* grad_weights) {
  const int64_t slot = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (slot >= slots.size) return;
  unsigned invalid = 0;  // the forward has counted it
  const int bin = slots.bin(slot, &invalid);
  grad_weights[slot] = bin < 0 ? scalar_t(0) : static_cast<scalar_t>(grad[bin]);
}

// `counts` is [E], or [S, E] with segments.
Slots make_slots(const at::Tensor& indices, const std::optional<at::Tensor>& token_mask,
                 const std::optional<at::Tensor>& segment_ids, const at::Tensor& counts) {
  TORCH_CHECK(counts.numel() <= INT_MAX,
              "expert_bincount: num_segments * num_experts must be below 2^31 on CUDA, got ",
              counts.numel());
  return {indices.const_data_ptr<int64_t>(),
          pointer_or_null<bool>(token_mask),
          pointer_or_null<int64_t>(segment_ids),
          indices.numel(),
          indices.size(-1),
          static_cast<int>(counts.size(-1)),
          static_cast<int>(counts.numel() / counts.size(-1))};
}

void count(const Slots& slots, const at::Tensor& counts, unsigned long long* num_invalid) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  auto* bins = counts.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(cudaMemsetAsync(bins, 0, counts.nbytes(), stream));
  constexpr int64_t kSlotsPerThread = 4, kMaxBlocks = 512;
  const int64_t blocks = std::min(ceil_div(slots.size, kThreads * kSlotsPerThread), kMaxBlocks);
  const int64_t shared_bytes = slots.bins() * sizeof(unsigned);
  const bool in_shared = shared_bytes <= kMaxSharedBytes;
  launch(expert_bincount_kernel, blocks, kThreads, in_shared ? shared_bytes : 0, stream, slots,
         in_shared, reinterpret_cast<unsigned long long*>(bins), num_invalid);
}

template <typename scalar_t>
void weigh(const Slots& slots, const at::Tensor& weights, const at::Tensor& sums,
           unsigned long long* num_invalid) {
  using compute_t = compute_type<scalar_t>;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  // Runs of 256 slots, longer ones where the rows of sums would have more than kMaxSums numbers.
  constexpr int64_t kShortest = 256, kMaxSums = 1 << 18, kMaxRuns = kFanIn * kFanIn;
  const int64_t most = std::clamp<int64_t>(kMaxSums / slots.bins(), 1, kMaxRuns);
  const int64_t length = std::max(kShortest, ceil_div(slots.size, most));
  const int64_t runs = ceil_div(slots.size, length);

  constexpr int64_t kTicketsBytes = 16 * ceil_div(kTickets * sizeof(unsigned), 16);
  const int64_t sums_bytes = runs * slots.bins() * sizeof(compute_t);
  const auto workspace = weights.new_empty({kTicketsBytes + sums_bytes}, at::kByte);
  auto* memory = workspace.mutable_data_ptr<uint8_t>();
  if (runs > 1) C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, kTicketsBytes, stream));
  launch(expert_bincount_weighted_kernel<scalar_t>, runs, kWarpSize, 0, stream, slots,
         weights.const_data_ptr<scalar_t>(), length, reinterpret_cast<unsigned*>(memory),
         reinterpret_cast<compute_t*>(memory + kTicketsBytes), sums.mutable_data_ptr<compute_t>(),
         num_invalid);
}

}  // namespace

void expert_bincount_cuda(const at::Tensor& indices, const std::optional<at::Tensor>& weights,
                          const std::optional<at::Tensor>& token_mask,
                          const std::optional<at::Tensor>& segment_ids, const at::Tensor& counts,
                          const at::Tensor& num_invalid) {
  const c10::DeviceGuard guard(indices.device());
  const auto slots = make_slots(indices, token_mask, segment_ids, counts);
  auto* const invalid =
      reinterpret_cast<unsigned long long*>(num_invalid.mutable_data_ptr<int64_t>());
  C10_CUDA_CHECK(cudaMemsetAsync(invalid, 0, sizeof(*invalid), c10::cuda::getCurrentCUDAStream()));
  if (!weights.has_value()) return count(slots, counts, invalid);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights->scalar_type(),
                                  "expert_bincount_cuda",
                                  [&] { weigh<scalar_t>(slots, *weights, counts, invalid); });
}

void expert_bincount_backward_cuda(const at::Tensor& grad, const at::Tensor& indices,
                                   const std::optional<at::Tensor>& token_mask,
                                   const std::optional<at::Tensor>& segment_ids,
                                   const at::Tensor& grad_weights) {
  if (indices.numel() == 0) return;
  const c10::DeviceGuard guard(indices.device());
  const auto slots = make_slots(indices, token_mask, segment_ids, grad);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_weights.scalar_type(), "expert_bincount_backward_cuda", [&] {
        launch(expert_bincount_backward_kernel<scalar_t>, ceil_div(slots.size, kThreads), kThreads,
               0, c10::cuda::getCurrentCUDAStream(), slots,
               grad.const_data_ptr<compute_type<scalar_t>>(),
               grad_weights.mutable_data_ptr<scalar_t>());
      });
}

}  // namespace equipoise
