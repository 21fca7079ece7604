// SPDX-License-Identifier: Apache-2.0
// sort_chunks_by_index on CUDA: the row where each row goes; see
// ../csrc/ops/sort_chunks_by_index.h. moe_rows.cu then moves the rows.
//
// One block takes the prefix of the sizes, as the chunks are and in their new order: what lies
// between the two is how far a chunk moves. Then a thread per row finds its chunk by bisection.
// Nothing is believed of the values: sizes are cut to [0, N], entries of the order that are out of
// range or stand there twice move nothing, and a row that would leave the N rows is dropped.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "block.cuh"
#include "host.h"
#include "launch.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;

struct Chunks {
  const int64_t* split_sizes;  // [C]
  const int64_t* order;        // [C]
  int64_t count, num_rows;
  int64_t* begins;    // [C + 1]: where the chunks begin, and where the last one ends
  int64_t* distance;  // [C]: how far the rows of a chunk move; num_rows: they are dropped
  unsigned* named;    // [C]: how often the order names a chunk
  int64_t* row_id_map;

  __device__ int64_t size(int64_t chunk) const {
    const int64_t rows = split_sizes[chunk];
    return rows < 0 ? 0 : min(rows, num_rows);
  }
  __device__ bool is_chunk(int64_t index) const { return index >= 0 && index < count; }
};

// By one block: a thread takes neighbouring chunks, then neighbouring entries of the order.
__global__ void __launch_bounds__(kScanThreads, 1) sort_chunks_scan_kernel(const Chunks c) {
  const int64_t share = (c.count + kScanThreads - 1) / kScanThreads;
  const int64_t first = min(threadIdx.x * share, c.count), last = min(first + share, c.count);
  int64_t sum = 0;
  for (int64_t i = first; i < last; ++i) {
    sum += c.size(i);
    c.named[i] = 0;
    c.distance[i] = c.num_rows;
  }
  int64_t place = block_exclusive_scan(sum);  // its barriers also stand behind the zeros of `named`
  for (int64_t i = first; i < last; ++i) {
    c.begins[i] = place;
    place += c.size(i);
    if (c.is_chunk(c.order[i])) atomicAdd(&c.named[c.order[i]], 1u);
  }
  if (threadIdx.x == kScanThreads - 1) c.begins[c.count] = place;
  __syncthreads();
  const auto is_good = [&](int64_t index) { return c.is_chunk(index) && c.named[index] == 1; };
  sum = 0;
  for (int64_t i = first; i < last; ++i) {
    if (is_good(c.order[i])) sum += c.size(c.order[i]);
  }
  place = block_exclusive_scan(sum);
  for (int64_t i = first; i < last; ++i) {
    const int64_t chunk = c.order[i];
    if (!is_good(chunk)) continue;
    c.distance[chunk] = place - c.begins[chunk];
    place += c.size(chunk);
  }
}

__global__ void __launch_bounds__(kThreads) sort_chunks_map_kernel(const Chunks c) {
  const int64_t row = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (row >= c.num_rows) return;
  int64_t to = -1;
  if (row < c.begins[c.count]) {
    int64_t low = 0, high = c.count;  // begins[low] <= row < begins[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (c.begins[middle] <= row ? low : high) = middle;
    }
    to = row + c.distance[low];
  }
  c.row_id_map[row] = to < c.num_rows ? to : -1;
}

}  // namespace

void sort_chunks_map_cuda(const at::Tensor& split_sizes, const at::Tensor& order,
                          const at::Tensor& row_id_map) {
  if (row_id_map.numel() == 0) return;
  const c10::DeviceGuard guard(row_id_map.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t count = order.numel();
  const auto workspace = row_id_map.new_empty({2 * count + 1 + ceil_div(count, 2)});
  Chunks c{};
  c.split_sizes = split_sizes.const_data_ptr<int64_t>();
  c.order = order.const_data_ptr<int64_t>();
  c.count = count;
  c.num_rows = row_id_map.numel();
  c.begins = workspace.mutable_data_ptr<int64_t>();
  c.distance = c.begins + count + 1;
  c.named = reinterpret_cast<unsigned*>(c.distance + count);
  c.row_id_map = row_id_map.mutable_data_ptr<int64_t>();
  launch(sort_chunks_scan_kernel, 1, kScanThreads, 0, stream, c);
  launch(sort_chunks_map_kernel, ceil_div(c.num_rows, kThreads), kThreads, 0, stream, c);
}

}  // namespace equipoise
