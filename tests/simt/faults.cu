// SPDX-License-Identifier: Apache-2.0
// Kernels that are wrong on purpose, one fault each, and some that are right: what simt.cpp and
// memory.cpp must report, and what they must not. tests/python/test_simt.py runs them.
#include <ATen/ops/empty.h>

#include <stdexcept>
#include <string>

#include "block.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 64, kSize = 2 * kThreads;

// ---- memory ------------------------------------------------------------------------------------

__global__ void reads_behind_the_end(float* data) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (data[i + 1] > 0) data[i] = 0;  // the last thread of the last block
}

__global__ void writes_before_the_begin(float* data) {
  if (threadIdx.x == 5) data[-1] = 0;
}

__global__ void follows_null(float* data) {
  const float* nothing = data == nullptr ? data : nullptr;
  if (threadIdx.x == 3) data[0] = *static_cast<const volatile float*>(nothing);
}

__global__ void loads_misaligned(float* data) {
  const auto piece = Piece<float>::load(data + threadIdx.x);
  if (piece.values[0] + piece.values[3] > 0) data[0] = 0;
}

__global__ void leaves_the_shared_memory(float* data) {
  auto* values = reinterpret_cast<float*>(shared_memory);  // [kThreads]
  values[threadIdx.x + (threadIdx.x == 63)] = data[threadIdx.x];
}

__global__ void reads_unwritten_shared_memory(float* data) {
  __shared__ float values[kThreads];
  if (threadIdx.x != 9) values[threadIdx.x] = 1;
  __syncthreads();
  data[blockIdx.x * kThreads + threadIdx.x] = values[threadIdx.x];
}

// ---- races -------------------------------------------------------------------------------------

// What every thread of the block may read.
__device__ float* written_values() {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1;
  __syncthreads();
  return values;
}

__global__ void misses_syncthreads(float* data) {
  float* values = written_values();
  values[threadIdx.x] = 2;
  data[blockIdx.x * kThreads + threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void misses_syncthreads_before_writing_again(float* data) {
  __shared__ float value;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) value = i;
    __syncthreads();
    data[blockIdx.x * kThreads + threadIdx.x] = value;
  }
}

__global__ void misses_syncwarp(float* data) {
  float* values = written_values();
  values[threadIdx.x] = 2;
  data[blockIdx.x * kThreads + threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void syncs_only_the_warp(float* data) {
  float* values = written_values();
  values[threadIdx.x] = 2;
  __syncwarp();
  data[blockIdx.x * kThreads + threadIdx.x] = values[threadIdx.x ^ 32];
}

__global__ void mixes_atomic_and_plain(float*) {
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (threadIdx.x == 40) {
    count += 1;
  } else {
    atomicAdd(&count, 1u);
  }
}

__global__ void writes_what_another_block_writes(float* data) { data[threadIdx.x] = 1; }

// The blocks' sums into data[0], by the last of them: right with both fences.
template <bool kReleases, bool kAcquires>
__global__ void takes_a_ticket(float* data) {
  __shared__ bool last;
  auto* ticket = reinterpret_cast<unsigned*>(data + kSize - 1);
  if (threadIdx.x == 0) {
    data[blockIdx.x] = 1;
    if (kReleases) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (kAcquires) __threadfence();
    if (last) data[0] = data[0] + data[1];
  }
}

// ---- meetings ----------------------------------------------------------------------------------

__global__ void leaves_before_syncthreads(float*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void waits_at_different_syncthreads(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void names_a_mask_without_itself(float*) {
  if (threadIdx.x == 1) __syncwarp(0xfffffffdu);
}

__global__ void shuffles_from_outside_the_mask(float* data) {
  if (threadIdx.x < 16) data[blockIdx.x * kThreads] += 0 * __shfl_xor_sync(0xffffu, 1.f, 16);
}

__global__ void waits_for_a_lane_that_left(float*) {
  if (threadIdx.x == 31) return;
  __syncwarp();
}

__global__ void meets_at_different_functions(float*) {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __ballot_sync(kFullMask, 1);
  }
}

__global__ void waits_for_a_warp_that_waits_for_the_block(float*) {
  if (threadIdx.x < 33) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void never_ends(float* data) {
  if (blockIdx.x == 1 && threadIdx.x == 2) {
    while (*static_cast<volatile float*>(data) == 0) {
    }
  }
}

// ---- right -------------------------------------------------------------------------------------

__global__ void is_right_about_everything(float* data) {
  __shared__ float values[kThreads];
  auto* pieces = reinterpret_cast<float*>(shared_memory);  // [kThreads]
  const int i = blockIdx.x * kThreads + threadIdx.x;
  values[threadIdx.x] = data[i];
  __syncwarp();
  float sum = values[threadIdx.x ^ 1];
  __syncwarp();
  values[threadIdx.x] = sum;
  __syncthreads();
  sum += values[kThreads - 1 - threadIdx.x];
  pieces[threadIdx.x] = team_reduce<kWarpSize>(sum, Sum{});
  __syncthreads();
  if (threadIdx.x % 4 == 0) sum += Piece<float>::load(pieces + threadIdx.x).values[3];
  if (threadIdx.x < 8) sum += __shfl_xor_sync(0xffu, sum, 4);
  if (__syncthreads_or(sum > 0)) data[i] = block_exclusive_scan(sum);
}

using Kernel = void (*)(float*);
struct Case {
  const char* name;
  Kernel kernel;
  int64_t blocks = 2, threads = kThreads, shared_bytes = kThreads * sizeof(float);
};
#define CASE(kernel, ...) \
  Case { #kernel, kernel __VA_OPT__(, ) __VA_ARGS__ }
const Case kCases[] = {
    CASE(reads_behind_the_end),
    CASE(writes_before_the_begin),
    CASE(follows_null),
    CASE(loads_misaligned),
    CASE(leaves_the_shared_memory),
    CASE(reads_unwritten_shared_memory),
    CASE(misses_syncthreads),
    CASE(misses_syncthreads_before_writing_again),
    CASE(misses_syncwarp),
    CASE(syncs_only_the_warp),
    CASE(mixes_atomic_and_plain),
    CASE(writes_what_another_block_writes),
    Case{"takes_a_ticket_without_fence_before", takes_a_ticket<false, true>},
    Case{"takes_a_ticket_without_fence_behind", takes_a_ticket<true, false>},
    CASE(leaves_before_syncthreads),
    CASE(waits_at_different_syncthreads),
    CASE(names_a_mask_without_itself),
    CASE(shuffles_from_outside_the_mask),
    CASE(waits_for_a_lane_that_left),
    CASE(meets_at_different_functions),
    CASE(waits_for_a_warp_that_waits_for_the_block),
    CASE(never_ends),
    Case{"has_no_blocks", is_right_about_everything, 0},
    Case{"has_too_many_blocks", is_right_about_everything, int64_t{1} << 31},
    Case{"has_too_many_threads", is_right_about_everything, 2, 1056},
    Case{"has_too_much_shared_memory", is_right_about_everything, 2, kThreads, 49 * 1024},
    CASE(is_right_about_everything),
    Case{"takes_a_ticket_with_both_fences", takes_a_ticket<true, true>},
};

std::string report;

}  // namespace
}  // namespace equipoise

/// Runs the case of that name on a tensor of 128 zeros; returns the report, empty if there is none.
extern "C" __attribute__((visibility("default"))) const char* simt_run_fault(const char* name) {
  using namespace equipoise;
  report = "no such case";
  for (const Case& one : kCases) {
    if (std::string(one.name) != name) continue;
    const auto data = at::empty({kSize}, at::kFloat);
    simt::set_memory(data.mutable_data_ptr(), 0, data.nbytes());
    report = "";
    try {
      launch(one.kernel, one.blocks, static_cast<int>(one.threads), one.shared_bytes,
             c10::cuda::getCurrentCUDAStream(), data.mutable_data_ptr<float>());
    } catch (const std::runtime_error& error) {
      report = error.what();
    }
  }
  return report.c_str();
}
