// SPDX-License-Identifier: Apache-2.0
// The only place where a kernel is launched.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>

namespace equipoise {

/// Dynamic shared memory of a block: what every device grants without being asked for more is 48
/// KB, of which 1 KB is left to the static arrays of block.cuh.
constexpr int64_t kMaxSharedBytes = 47 * 1024;

/// Runs `kernel` on a one-dimensional grid of `blocks` blocks of `threads` threads, each with
/// `shared_bytes` of dynamic shared memory (at most kMaxSharedBytes), and checks the launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            [[maybe_unused]] c10::cuda::CUDAStream stream, Arguments&&... arguments) {
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream.stream()>>>(
      static_cast<Parameters>(arguments)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#else  // tests/simt
  simt::launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes,
               [=] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace equipoise
