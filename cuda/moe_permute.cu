// SPDX-License-Identifier: Apache-2.0
// moe_permute on CUDA: stable counting sort of the (token, slot) pairs by expert; see
// ../csrc/ops/moe_permute.h. moe_rows.cu then moves the rows.
//
// The pairs are cut into contiguous segments. counts[e][s] says how many pairs of segment s go to
// expert e; its exclusive prefix in memory order is where the first of them belongs; a warp per
// segment then walks through its pairs in order and hands out the places. Up to kOneBlockPairs
// pairs one block does all three steps, otherwise there is a kernel for each.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>

#include "block.cuh"
#include "host.h"
#include "launch.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;
constexpr int kSortThreads = 1024;
constexpr int64_t kOneBlockPairs = 8192;

struct Sort {
  const int64_t* indices;      // [pairs]
  int64_t* row_id_map;         // [pairs]
  int64_t* tokens_per_expert;  // [E]
  int64_t* expert_offsets;     // [E + 1]
  int64_t pairs, length;       // segment s has the pairs s * length .. (s + 1) * length
  int experts, segments;
  int pitch;  // counts of an expert in memory, those past `segments` zero

  // Where the count of an expert and a segment is.
  __device__ int64_t at(int expert, int segment) const { return int64_t{expert} * pitch + segment; }

  // The expert of a pair, -1 if it is left out.
  __device__ int expert(int64_t pair) const {
    const int64_t e = indices[pair];
    return e >= 0 && e < experts ? static_cast<int>(e) : -1;
  }
  __device__ int64_t begin(int segment) const { return min(segment * length, pairs); }
};

// By `threads` threads: counts the pairs of one segment, on top of zeros.
__device__ void count_segment(const Sort& sort, int segment, int thread, int threads,
                              unsigned* counts) {
  const int64_t end = sort.begin(segment + 1);
  for (int64_t pair = sort.begin(segment) + thread; pair < end; pair += threads) {
    const int e = sort.expert(pair);
    if (e >= 0) atomicAdd(&counts[sort.at(e, segment)], 1u);
  }
}

// By one block: each count becomes the place of the first of its pairs. A warp takes neighbouring
// counts, 32 at once.
__device__ void scan_counts(const Sort& sort, unsigned* counts) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t size = sort.at(sort.experts, 0);
  const int64_t share = (size + blockDim.x - 1) / blockDim.x * kWarpSize;
  const int64_t begin = min(warp * share, size), end = min(begin + share, size);
  unsigned sum = 0;
  for (int64_t i = begin + lane; i < end; i += kWarpSize) sum += counts[i];
  unsigned place = __shfl_sync(kFullMask, block_exclusive_scan(sum), 0);  // of the warp's first
  for (int64_t first = begin; first < end; first += kWarpSize) {
    const int64_t i = first + lane;
    const unsigned count = i < end ? counts[i] : 0;
    const unsigned next = place + warp_inclusive_scan(count);
    if (i < end) counts[i] = next - count;
    place = __shfl_sync(kFullMask, next, kWarpSize - 1);
  }
  if (threadIdx.x == blockDim.x - 1) sort.expert_offsets[sort.experts] = place;
  __syncthreads();
  for (int e = threadIdx.x; e < sort.experts; e += blockDim.x) {
    sort.expert_offsets[e] = counts[sort.at(e, 0)];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < sort.experts; e += blockDim.x) {
    sort.tokens_per_expert[e] = sort.expert_offsets[e + 1] - sort.expert_offsets[e];
  }
}

// By one warp: hands out the places of one segment, in the order of its pairs.
__device__ void place_segment(const Sort& sort, int segment, unsigned* places) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t end = sort.begin(segment + 1);
  for (int64_t first = sort.begin(segment); first < end; first += kWarpSize) {
    const int64_t pair = first + lane;
    const int expert = pair < end ? sort.expert(pair) : -1;
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const int leader = __ffs(peers) - 1;
    unsigned place = 0;
    if (lane == leader && expert >= 0) {
      unsigned* next = &places[sort.at(expert, segment)];
      place = *next;
      *next = place + __popc(peers);
    }
    place = __shfl_sync(kFullMask, place, leader) + __popc(peers & lanes_below(lane));
    if (pair < end) sort.row_id_map[pair] = expert >= 0 ? static_cast<int64_t>(place) : -1;
    __syncwarp();  // the next step reads the places that this one moved on
  }
}

// All of it by one block, with a warp per segment and the counts in shared memory.
// (The 1 in the launch bounds keeps ptxas from spilling to fit a second block.)
__global__ void __launch_bounds__(kSortThreads, 1) moe_permute_sort_kernel(const Sort sort) {
  auto* counts = reinterpret_cast<unsigned*>(shared_memory);  // [E, pitch]
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x; i < sort.experts * sort.pitch; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  if (warp < sort.segments) count_segment(sort, warp, lane, kWarpSize, counts);
  __syncthreads();
  scan_counts(sort, counts);
  if (warp < sort.segments) place_segment(sort, warp, counts);
}

// The three steps for many pairs: a block per segment, one block, a block of one warp per segment.
__global__ void __launch_bounds__(kThreads)
    moe_permute_count_kernel(const Sort sort, unsigned* counts) {
  count_segment(sort, blockIdx.x, threadIdx.x, kThreads, counts);
}

__global__ void __launch_bounds__(kSortThreads)
    moe_permute_scan_kernel(const Sort sort, unsigned* counts) {
  scan_counts(sort, counts);
}

__global__ void __launch_bounds__(kWarpSize)
    moe_permute_place_kernel(const Sort sort, unsigned* places) {
  place_segment(sort, blockIdx.x, places);
}

void sort_in_three_steps(const Sort& sort, const at::Tensor& like) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t bytes = int64_t{sort.experts} * sort.pitch * sizeof(unsigned);
  const auto workspace = at::empty({bytes}, like.options().dtype(at::kByte));
  auto* counts = reinterpret_cast<unsigned*>(workspace.mutable_data_ptr<uint8_t>());
  C10_CUDA_CHECK(cudaMemsetAsync(counts, 0, bytes, stream));
  launch(moe_permute_count_kernel, sort.segments, kThreads, 0, stream, sort, counts);
  launch(moe_permute_scan_kernel, 1, kSortThreads, 0, stream, sort, counts);
  launch(moe_permute_place_kernel, sort.segments, kWarpSize, 0, stream, sort, counts);
}

void sort_pairs(Sort sort, const at::Tensor& like) {
  // A segment is what one warp walks through, 32 pairs at a time.
  const auto cut = [&](int64_t most_segments) {
    const int64_t most = std::max<int64_t>(most_segments, 1);
    sort.length = kWarpSize * ceil_div(ceil_div(sort.pairs, most), kWarpSize);
    sort.segments = static_cast<int>(ceil_div(sort.pairs, sort.length));
    sort.pitch = sort.segments;
  };
  const int64_t expert_bytes = sort.experts * sizeof(unsigned);
  if (sort.pairs <= kOneBlockPairs && expert_bytes <= kMaxSharedBytes) {
    const int64_t most = kMaxSharedBytes / expert_bytes;
    cut(std::min<int64_t>(most, kSortThreads / kWarpSize));
    // An odd pitch spreads the experts that a warp counts over the banks.
    if (sort.segments < most) sort.pitch = sort.segments | 1;
    launch(moe_permute_sort_kernel, 1, kSortThreads, expert_bytes * sort.pitch,
           c10::cuda::getCurrentCUDAStream(), sort);
    return;
  }
  // More segments are faster to walk through, but one block scans all counts.
  constexpr int64_t kMaxCounts = 1 << 16;
  cut(std::clamp<int64_t>(kMaxCounts / sort.experts, 32, 512));
  sort_in_three_steps(sort, like);
}

}  // namespace

void moe_permute_index_cuda(const at::Tensor& topk_indices, const at::Tensor& row_id_map,
                            const at::Tensor& tokens_per_expert, const at::Tensor& expert_offsets) {
  const c10::cuda::CUDAGuard guard(topk_indices.device());
  if (topk_indices.numel() == 0) {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    for (const auto& totals : {tokens_per_expert, expert_offsets}) {
      C10_CUDA_CHECK(cudaMemsetAsync(totals.mutable_data_ptr(), 0, totals.nbytes(), stream));
    }
    return;
  }
  constexpr int64_t kMaxPairs = std::numeric_limits<unsigned>::max();  // places are 32 bits wide
  TORCH_CHECK(topk_indices.numel() <= kMaxPairs, "moe_permute: topk_indices must have at most ",
              kMaxPairs, " elements on CUDA, got ", topk_indices.numel());
  Sort sort{};
  sort.indices = topk_indices.const_data_ptr<int64_t>();
  sort.row_id_map = row_id_map.mutable_data_ptr<int64_t>();
  sort.tokens_per_expert = tokens_per_expert.mutable_data_ptr<int64_t>();
  sort.expert_offsets = expert_offsets.mutable_data_ptr<int64_t>();
  sort.pairs = topk_indices.numel();
  sort.experts = static_cast<int>(tokens_per_expert.size(0));
  sort_pairs(sort, topk_indices);
}

}  // namespace equipoise
