// SPDX-License-Identifier: Apache-2.0
// Advice to the system about the memory of large outputs on the CPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <sys/mman.h>

#include <cstdint>

namespace equipoise {

/// Asks for huge pages under a large fresh output: it was mapped just now, and touching it first in
/// 4 KiB faults is many times slower than the copy itself. Advice only; the contents do not change.
inline void advise_huge_pages(const at::Tensor& out) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kLarge = size_t{4} << 20, kPage = 4096;
  if (out.nbytes() < kLarge) return;
  const auto begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(out.data_ptr()) + out.nbytes()) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace equipoise
