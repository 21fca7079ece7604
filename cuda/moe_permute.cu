// SPDX-License-Identifier: Apache-2.0
// moe_permute on CUDA: stable counting sort of the (token, slot) pairs by expert, and the copy of
// the rows in that order; see ../csrc/ops/moe_permute.h.
//
// The pairs are cut into contiguous segments. counts[e][s] says how many pairs of segment s go to
// expert e; its exclusive prefix in memory order is where the first of them belongs; a warp per
// segment then walks through its pairs in order and hands out the places. Up to kOneBlockPairs pairs
// one block does all three steps, otherwise there is a kernel for each.
// Rows travel 16 bytes a thread: x is read once and written K times.
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
#include "vector.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;
constexpr int64_t kOneBlockPairs = 8192;

// ---- where each pair goes ----------------------------------------------------------------------

struct Sort {
  const int64_t* indices;      // [pairs]
  int64_t* row_id_map;         // [pairs]
  int64_t* tokens_per_expert;  // [E]
  int64_t* expert_offsets;     // [E + 1]
  int64_t pairs, length;       // segment s has the pairs s * length .. (s + 1) * length
  int experts, segments;

  // The expert of a pair, -1 if it is left out.
  __device__ int expert(int64_t pair) const {
    const int64_t e = indices[pair];
    return e >= 0 && e < experts ? static_cast<int>(e) : -1;
  }
  __device__ int64_t begin(int segment) const { return min(segment * length, pairs); }
};

// By `threads` threads: counts the pairs of one segment, on top of zeros.
template <typename Count>
__device__ void count_segment(const Sort& sort, int segment, int thread, int threads, Count* counts) {
  const int64_t end = sort.begin(segment + 1);
  for (int64_t pair = sort.begin(segment) + thread; pair < end; pair += threads) {
    const int e = sort.expert(pair);
    if (e >= 0) atomicAdd(&counts[int64_t{e} * sort.segments + segment], Count{1});
  }
}

// By one block: each count becomes the place of the first of its pairs.
template <typename Count>
__device__ void scan_counts(const Sort& sort, Count* counts) {
  const int64_t size = int64_t{sort.experts} * sort.segments;
  const int64_t share = (size + blockDim.x - 1) / blockDim.x;
  const int64_t begin = min(threadIdx.x * share, size), end = min(begin + share, size);
  Count sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += counts[i];
  Count place = block_exclusive_scan(sum);
  for (int64_t i = begin; i < end; ++i) {
    const Count count = counts[i];
    counts[i] = place;
    if (i % sort.segments == 0) sort.expert_offsets[i / sort.segments] = place;
    place += count;
  }
  if (threadIdx.x == blockDim.x - 1) sort.expert_offsets[sort.experts] = place;
  __syncthreads();
  for (int e = threadIdx.x; e < sort.experts; e += blockDim.x) {
    sort.tokens_per_expert[e] = sort.expert_offsets[e + 1] - sort.expert_offsets[e];
  }
}

// By one warp: hands out the places of one segment, in the order of its pairs.
template <typename Count>
__device__ void place_segment(const Sort& sort, int segment, Count* places) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t end = sort.begin(segment + 1);
  for (int64_t first = sort.begin(segment); first < end; first += kWarpSize) {
    const int64_t pair = first + lane;
    const int expert = pair < end ? sort.expert(pair) : -1;
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const int leader = __ffs(peers) - 1;
    Count place = 0;
    if (lane == leader && expert >= 0) {
      Count* next = &places[int64_t{expert} * sort.segments + segment];
      place = *next;
      *next = place + __popc(peers);
    }
    place = __shfl_sync(kFullMask, place, leader) + __popc(peers & lanes_below(lane));
    if (pair < end) sort.row_id_map[pair] = expert >= 0 ? static_cast<int64_t>(place) : -1;
    __syncwarp();  // the next step reads the places that this one moved on
  }
}

// All of it by one block, with a warp per segment and the counts in shared memory.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const Sort sort) {
  auto* counts = reinterpret_cast<unsigned*>(shared_memory);  // [E, segments]
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x; i < sort.experts * sort.segments; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  if (warp < sort.segments) count_segment(sort, warp, lane, kWarpSize, counts);
  __syncthreads();
  scan_counts(sort, counts);
  if (warp < sort.segments) place_segment(sort, warp, counts);
}

// The three steps for many pairs: a block per segment, one block, a block of one warp per segment.
template <typename Count>
__global__ void __launch_bounds__(kThreads) count_kernel(const Sort sort, Count* counts) {
  count_segment(sort, blockIdx.x, threadIdx.x, kThreads, counts);
}

template <typename Count>
__global__ void __launch_bounds__(kSortThreads) scan_kernel(const Sort sort, Count* counts) {
  scan_counts(sort, counts);
}

template <typename Count>
__global__ void __launch_bounds__(kWarpSize) place_kernel(const Sort sort, Count* places) {
  place_segment(sort, blockIdx.x, places);
}

template <typename Count>
void sort_in_three_steps(const Sort& sort, const at::Tensor& like) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t bytes = int64_t{sort.experts} * sort.segments * sizeof(Count);
  const auto workspace = at::empty({bytes}, like.options().dtype(at::kByte));
  auto* counts = reinterpret_cast<Count*>(workspace.mutable_data_ptr<uint8_t>());
  C10_CUDA_CHECK(cudaMemsetAsync(counts, 0, bytes, stream));
  launch(count_kernel<Count>, sort.segments, kThreads, 0, stream, sort, counts);
  launch(scan_kernel<Count>, 1, kSortThreads, 0, stream, sort, counts);
  launch(place_kernel<Count>, sort.segments, kWarpSize, 0, stream, sort, counts);
}

// ---- rows --------------------------------------------------------------------------------------

// Row of each slot, and what it is multiplied with: weights are in the type of the rows or in the
// compute type; at most one pointer is set, none for 1.
template <typename scalar_t>
struct Scatter {
  using compute_t = compute_type<scalar_t>;
  const scalar_t* x;
  int64_t x_stride;
  const int64_t* row_id_map;  // [T, K]
  RowWeights<scalar_t> weights;
  scalar_t* rows;             // [N, H]
  bool* filled;               // [N], false at first
  int64_t tokens, top_k, num_rows, width;
};

// One thread per kSize columns of a token, which go to its K rows.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads) scatter_kernel(const Scatter<scalar_t> s) {
  using Piece = Vector<scalar_t, kSize>;
  const int64_t pieces = s.width / kSize;  // per row
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t token = i / pieces, column = i % pieces * kSize;
  if (token >= s.tokens) return;
  const Piece x = *reinterpret_cast<const Piece*>(s.x + token * s.x_stride + column);
  for (int64_t slot = token * s.top_k; slot < (token + 1) * s.top_k; ++slot) {
    const int64_t row = s.row_id_map[slot];
    if (row < 0 || row >= s.num_rows) continue;
    Piece y = x;
    if (!s.weights.is_one()) {
      const auto weight = s.weights[slot];
#pragma unroll
      for (scalar_t& value : y.values) value = static_cast<scalar_t>(weight * value);
    }
    *reinterpret_cast<Piece*>(s.rows + row * s.width + column) = y;
    if (column == 0) s.filled[row] = true;
  }
}

// A block per row: zeroes it if no slot filled it.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) zero_kernel(const Scatter<scalar_t> s) {
  for (int64_t row = blockIdx.x; row < s.num_rows; row += gridDim.x) {
    if (s.filled[row]) continue;
    for (int64_t c = threadIdx.x; c < s.width; c += kThreads) s.rows[row * s.width + c] = scalar_t(0);
  }
}
