// SPDX-License-Identifier: Apache-2.0
// What the threads of one block, and the blocks of one grid, do together. Every function here is
// called by all threads of a block whose size is a multiple of 32.
#pragma once

#include "warp.cuh"

namespace equipoise {

/// The dynamic shared memory of the running kernel.
extern __shared__ __align__(16) unsigned char shared_memory[];

/// Combines `value` over the block; every thread gets the result, in a fixed order.
template <typename T, typename Op>
__device__ T block_reduce(T value, Op op) {
  __shared__ T of_warp[kWarpSize];
  value = team_reduce<kWarpSize>(value, op);
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = of_warp[0];
  const int warps = blockDim.x / kWarpSize;
  for (int warp = 1; warp < warps; ++warp) value = op(value, of_warp[warp]);
  __syncthreads();  // of_warp may be written again
  return value;
}

/// Sum of the values of all threads before this one.   1 2 3 4  ->  0 1 3 6
template <typename T>
__device__ T block_exclusive_scan(T value) {
  __shared__ T of_warp[kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  T sum = warp_inclusive_scan(value);
  if (lane == kWarpSize - 1) of_warp[warp] = sum;
  __syncthreads();
  sum -= value;
  for (int w = 0; w < warp; ++w) sum += of_warp[w];
  __syncthreads();  // of_warp may be written again
  return sum;
}

/// Takes a ticket: true in the block that arrives last of `blocks`, which then sees all that the
/// others wrote before. `ticket` was zero at the start of the kernel. No block waits for another.
__device__ inline bool last_to_arrive(unsigned* ticket, unsigned blocks) {
  __shared__ bool last;
  __threadfence();  // what this thread wrote is visible before the ticket is taken
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == blocks - 1;
  __syncthreads();
  __threadfence();  // what the others wrote is read after the ticket was taken
  return last;
}

/// Blocks of which one adds up the rows of the others; a grid has at most kFanIn * kFanIn blocks.
constexpr int kFanIn = 32;
/// Tickets for sum_block_rows, to be zeroed before the kernel.
constexpr int kTickets = kFanIn + 1;

/// Adds up rows[gridDim.x][width], of which each block has written its own, and hands each sum to
/// finish(part, column, sum): within each kFanIn neighbours first, then over those sums, so in an
/// order that depends on the grid alone. All sums are finished by one block; true in that one,
/// which may then read all else that any block wrote before. With `parts`, a row is [parts][width]
/// and has only those parts whose flag in written[parts][gridDim.x] is set; what stands in the
/// others is not read, and a part that no row has is finished as zeros.
template <typename T, typename Finish>
__device__ bool sum_block_rows(T* rows, int64_t width, unsigned* tickets, const Finish& finish,
                               bool* written = nullptr, int64_t parts = 1) {
  const unsigned blocks = gridDim.x, groups = (blocks + kFanIn - 1) / kFanIn;
  const unsigned group = blockIdx.x / kFanIn, first = group * kFanIn;
  const unsigned members = min(blocks - first, static_cast<unsigned>(kFanIn));
  // Adds up `count` rows, `stride` apart, from row `begin` on; the sums take its place unless they
  // are the last.
  const auto add = [&](unsigned begin, unsigned count, int64_t stride, bool last) {
    const auto put = [&](int64_t part, int64_t column, T sum) {
      if (last) {
        finish(part, column, sum);
      } else {
        rows[(begin * parts + part) * width + column] = sum;
      }
    };
    if (written == nullptr) {
      const T* from = rows + begin * width;
      for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
        T sum = from[column];
#pragma unroll 8
        for (unsigned i = 1; i < count; ++i) sum += from[i * stride * width + column];
        put(0, column, sum);
      }
      return;
    }
    // A warp takes a part: a lane looks at the flag of one row.
    static_assert(kFanIn <= kWarpSize);
    const unsigned lane = threadIdx.x % kWarpSize;
    for (int64_t part = threadIdx.x / kWarpSize; part < parts; part += blockDim.x / kWarpSize) {
      bool* flags = written + part * blocks + begin;
      const unsigned having = __ballot_sync(kFullMask, lane < count && flags[lane * stride]);
      if (having == 0 && !last) continue;
      const T* from = rows + (begin * parts + part) * width;
      for (int64_t column = lane; column < width; column += kWarpSize) {
        T sum = 0;
        for (unsigned rest = having; rest != 0; rest &= rest - 1) {
          sum += from[(__ffs(rest) - 1) * stride * parts * width + column];
        }
        put(part, column, sum);
      }
      if (lane == 0) flags[0] = true;
    }
  };
  if (blocks == 1) {
    __syncthreads();
    add(0, 1, 1, true);
    return true;
  }
  if (!last_to_arrive(&tickets[1 + group], members)) return false;
  add(first, members, 1, groups == 1);
  if (groups == 1) return true;
  if (!last_to_arrive(&tickets[0], groups)) return false;
  add(0, groups, kFanIn, true);
  return true;
}

}  // namespace equipoise
