// SPDX-License-Identifier: Apache-2.0
// CUDA's vocabulary for g++. Included by force before a .cu file, which thereby becomes C++ whose
// kernels simt.cpp runs on the CPU: every CUDA thread is a fiber, and where the lanes of a warp or
// the threads of a block meet, the fiber waits for the others. Only what our kernels use is here;
// add to it as they grow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time, and all of its fibers on one thread of the CPU, so its shared memory is
// that thread's; unlike `static`, `thread_local` can also be `extern`.
#define __shared__ thread_local

namespace simt {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

/// Where in the source a meeting point stands.
using Place = std::source_location;

enum class Meeting { kSync, kShuffle, kBallot, kMatch };

/// Waits until all lanes of `mask` have come to the same kind of meeting and returns what is meant
/// for this lane: the value of `source_lane` (shuffle), the lanes whose value is not 0 (ballot), or
/// those with the same value (match).
uint64_t meet(Meeting kind, unsigned mask, uint64_t value, int source_lane, const Place& place);

/// Waits for the whole block; returns in how many of its threads `predicate` was true.
int meet_block(bool predicate, const Place& place);

/// The calling thread's lane.
int lane();

/// Orders what this thread wrote before against what it does after, for the other blocks.
void fence();

/// Adds to *address and returns what was there; other threads may come first.
template <typename T>
T add_atomically(T* address, T value);

/// What each thread does: run(arguments). The arguments are constants to it.
struct Body {
  void (*run)(const void* arguments);
  const void* arguments;
  int64_t bytes;
};

/// Runs `body` for each thread of each block; `kernel` is for the reports. Throws
/// std::runtime_error where a thread does what no CUDA thread may.
void launch(const void* kernel, int64_t blocks, int64_t threads, int64_t shared_bytes, Body body);

template <typename Function>
void launch(const void* kernel, int64_t blocks, int64_t threads, int64_t shared_bytes,
            const Function& thread) {
  const auto run = [](const void* function) { (*static_cast<const Function*>(function))(); };
  launch(kernel, blocks, threads, shared_bytes, Body{run, &thread, sizeof thread});
}

/// Sets `bytes` bytes of a tensor; throws if they are not all in it.
void set_memory(void* address, int value, int64_t bytes);

template <typename T>
T shuffle(unsigned mask, T value, int source_lane, const Place& place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(Meeting::kShuffle, mask, bits, source_lane, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

extern simt::Index threadIdx, blockIdx, blockDim, gridDim;

#define SIMT_PLACE const simt::Place& place = simt::Place::current()

inline void __syncthreads(SIMT_PLACE) { simt::meet_block(false, place); }
inline int __syncthreads_or(int predicate, SIMT_PLACE) {
  return simt::meet_block(predicate != 0, place) > 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_PLACE) {
  simt::meet(simt::Meeting::kSync, mask, 0, 0, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_PLACE) {
  return static_cast<unsigned>(simt::meet(simt::Meeting::kBallot, mask, predicate != 0, 0, place));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_PLACE) {
  return __ballot_sync(mask, predicate, place) != 0;
}
inline unsigned __match_any_sync(unsigned mask, int value, SIMT_PLACE) {
  const auto bits = static_cast<unsigned>(value);
  return static_cast<unsigned>(simt::meet(simt::Meeting::kMatch, mask, bits, 0, place));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source_lane, SIMT_PLACE) {
  return simt::shuffle(mask, value, source_lane & 31, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, SIMT_PLACE) {
  return simt::shuffle(mask, value, (simt::lane() ^ distance) & 31, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, SIMT_PLACE) {
  const int below = simt::lane() - static_cast<int>(distance);
  return simt::shuffle(mask, value, below >= 0 ? below : simt::lane(), place);
}

#undef SIMT_PLACE

inline void __threadfence() { simt::fence(); }
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::add_atomically<T>(address, value);
}

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
