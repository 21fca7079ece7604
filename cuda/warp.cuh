// SPDX-License-Identifier: Apache-2.0
// What the lanes of one warp do together. Every function here is called by all 32 lanes.
#pragma once

#include <cstdint>
#include <cstring>

namespace equipoise {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

/// `value` of lane (lane ^ distance), for any T made of 32-bit words.
template <typename T>
__device__ T shuffle_xor(const T& value, int distance) {
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_xor_sync(kFullMask, word, distance);
  T result;
  std::memcpy(&result, words, sizeof(T));
  return result;
}

/// Combines `value` over each team of kLanes neighbouring lanes; every lane gets its team's result.
///   values 1 2 3 4 5 6 7 8, kLanes = 4, Sum  ->  10 10 10 10 26 26 26 26
/// kLanes is a power of two. The order is fixed: the same bits on every lane and in every run.
template <int kLanes, typename T, typename Op>
__device__ T team_reduce(T value, Op op) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = op(value, shuffle_xor(value, distance));
  }
  return value;
}

/// Sum over the lanes with the same number in their teams; lanes of one number all get it.
///   values 1 2 3 4 5 6 7 8, kLanes = 4 (of 8)  ->  6 8 10 12 6 8 10 12
template <int kLanes, typename T>
__device__ T sum_over_teams(T value) {
#pragma unroll
  for (int distance = kLanes; distance < kWarpSize; distance *= 2) {
    value += shuffle_xor(value, distance);
  }
  return value;
}

/// Sum of the values of the lanes up to this one.   1 2 3 4  ->  1 3 6 10
template <typename T>
__device__ T warp_inclusive_scan(T value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T below = __shfl_up_sync(kFullMask, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

/// Bits of the lanes below `lane`.
__device__ inline unsigned lanes_below(int lane) { return (1u << lane) - 1; }

}  // namespace equipoise
