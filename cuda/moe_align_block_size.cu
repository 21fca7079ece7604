// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size on CUDA: the sort of slot_sort.cu turned around; see
// ../csrc/ops/moe_align_block_size.h.
//
// A thread takes a slot, which it writes to its place, and the place of the same number, which it
// fills if it is padding: no two threads write the same place, so one kernel does both.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "host.h"
#include "launch.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;

struct Blocks {
  const int64_t* row_id_map;       // [slots]
  const int64_t* expert_offsets;   // [E + 1]
  const int64_t* kept_per_expert;  // [E]
  int64_t slots, places, block_size;
  int experts;
  int* sorted_token_ids;  // [places]
  int* expert_ids;        // [places / block_size]
  int* size;              // [1]
};

__global__ void __launch_bounds__(kThreads) align_blocks_kernel(const Blocks b) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < b.slots && b.row_id_map[i] >= 0) {
    b.sorted_token_ids[b.row_id_map[i]] = static_cast<int>(i);
  }
  if (i >= b.places) return;
  const int64_t size = b.expert_offsets[b.experts];
  if (i == 0) *b.size = static_cast<int>(size);
  int expert = -1;
  bool is_padding = true;
  if (i < size) {
    expert = 0;
    int end = b.experts;  // expert_offsets[expert] <= i < expert_offsets[end]
    while (end - expert > 1) {
      const int middle = (expert + end) / 2;
      (b.expert_offsets[middle] <= i ? expert : end) = middle;
    }
    is_padding = i - b.expert_offsets[expert] >= b.kept_per_expert[expert];
  }
  if (is_padding) b.sorted_token_ids[i] = static_cast<int>(b.slots);
  if (i % b.block_size == 0) b.expert_ids[i / b.block_size] = expert;
}

}  // namespace

void align_blocks_cuda(const SlotSort& slots, const at::Tensor& sorted_token_ids,
                       const at::Tensor& expert_ids, const at::Tensor& num_tokens_post_padded) {
  const c10::DeviceGuard guard(sorted_token_ids.device());
  Blocks b{};
  b.row_id_map = slots.row_id_map.const_data_ptr<int64_t>();
  b.expert_offsets = slots.expert_offsets.const_data_ptr<int64_t>();
  b.kept_per_expert = slots.kept_per_expert.const_data_ptr<int64_t>();
  b.slots = slots.row_id_map.numel();
  b.places = sorted_token_ids.numel();
  b.block_size = slots.layout.align;
  b.experts = static_cast<int>(slots.counts.numel());
  b.sorted_token_ids = sorted_token_ids.mutable_data_ptr<int>();
  b.expert_ids = expert_ids.mutable_data_ptr<int>();
  b.size = num_tokens_post_padded.mutable_data_ptr<int>();
  launch(align_blocks_kernel, ceil_div(std::max(b.slots, b.places), kThreads), kThreads, 0,
         c10::cuda::getCurrentCUDAStream(), b);
}

}  // namespace equipoise
