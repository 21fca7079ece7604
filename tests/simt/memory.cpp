// SPDX-License-Identifier: Apache-2.0
// Looks at every access of a kernel to memory. The .cu files are compiled with -fsanitize=thread,
// which puts a call before each access; the calls end here and not in a sanitizer's library.
//
// An access must lie in a tensor, in the block's shared memory, or on the thread's own stack, and
// be aligned. Shared memory must have been written in this block before it is read. Two accesses
// of different threads to one byte, of which one writes and not both are atomic, must be ordered:
// by a barrier of the block, by __syncwarp() of the whole warp, or, between blocks, by fence -
// atomic - fence. Whether they are does not depend on who happened to come first.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace simt {
namespace {

// ---- when and by whom a byte was accessed
// --------------------------------------------------------

struct Stamp {
  uint64_t time : 35 = 0;  // 0: never
  uint64_t atomic : 1 = 0;
  uint64_t block : 18 = 0;
  uint64_t thread : 10 = 0;
};
static_assert(sizeof(Stamp) == 8);
constexpr unsigned kMaxBlocks = 1 << 18;

/// Of the readers since the last write two are kept, which is enough to know that there are
/// several.
struct Shadow {
  Stamp writer, reader, other_reader;
};

// What fences and atomics make visible to other blocks. Each atomic behind a fence is a release: it
// covers what thread t of its block wrote before release[t].
using Release = std::vector<uint64_t>;
using Seen = std::vector<unsigned>;  // of each block: how many of its releases
struct Visibility {
  std::vector<std::vector<Release>> releases;  // of each block
  Seen seen;                                   // by the running block
  uint64_t taken_over_at = 0;                  // by the running block, last
  std::unordered_map<uintptr_t, Seen> handed;  // through an atomic at that address
} visibility;

bool happened_before(const Stamp& stamp) {
  const Thread& self = *machine.thread;
  if (stamp.block != machine.block) {
    const unsigned seen = visibility.seen[stamp.block];
    return seen > 0 && stamp.time < visibility.releases[stamp.block][seen - 1][stamp.thread] &&
           self.fenced_at > visibility.taken_over_at;
  }
  return stamp.thread == self.index || stamp.time < machine.barrier_at ||
         (stamp.thread / kWarp == self.warp() && stamp.time < machine.warps[self.warp()].synced_at);
}

/// Checks the access against those before it, from `begin` on, and enters it; returns who it
/// collides with.
const Stamp* enter(Shadow& shadow, Access kind, uint64_t begin) {
  const bool atomic = kind == Access::kAtomic;
  const auto open = [&](const Stamp& stamp) {
    return stamp.time >= begin && !happened_before(stamp);
  };
  const Stamp now{machine.now, atomic, machine.block, machine.thread->index};
  if (!(atomic && shadow.writer.atomic) && open(shadow.writer)) return &shadow.writer;
  if (kind == Access::kRead) {
    if (!open(shadow.reader) || shadow.reader.thread == now.thread) {
      shadow.reader = now;
    } else if (!open(shadow.other_reader)) {
      shadow.other_reader = now;
    }
    return nullptr;
  }
  for (const Stamp* reader : {&shadow.reader, &shadow.other_reader}) {
    if (open(*reader)) return reader;
  }
  shadow.writer = now;
  return nullptr;
}

// ---- the tensors
// ---------------------------------------------------------------------------------

struct Tensor {
  uintptr_t begin = 0;
  size_t bytes = 0;
  Shadow* shadow = nullptr;  // one for each byte, mapped at the first access
};

void unmap_shadow(const Tensor& tensor) {
  if (tensor.shadow != nullptr) munmap(tensor.shadow, tensor.bytes * sizeof(Shadow));
}

/// What the host has allocated. A tensor is as large as was asked for, to the byte.
class Tensors {
 public:
  void add(void* memory, size_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    tensors_[begin] = {begin, bytes};
  }
  void remove(void* memory) {
    const std::lock_guard lock(mutex_);
    const auto found = tensors_.find(reinterpret_cast<uintptr_t>(memory));
    if (found == tensors_.end()) return;
    if (&found->second == last_) last_ = nullptr;
    unmap_shadow(found->second);
    tensors_.erase(found);
  }
  /// The last tensor that begins at or before the address, or null.
  Tensor* at_or_before(uintptr_t address) {
    const std::lock_guard lock(mutex_);
    if (last_ != nullptr && address - last_->begin < last_->bytes) return last_;
    auto next = tensors_.upper_bound(address);
    return next == tensors_.begin() ? nullptr : last_ = &std::prev(next)->second;
  }

 private:
  std::mutex mutex_;
  std::map<uintptr_t, Tensor> tensors_;
  Tensor* last_ = nullptr;
};

Tensors& tensors() {  // outlives every tensor
  static auto* all = new Tensors;
  return *all;
}

/// torch's allocator on the CPU, with a list of what is allocated. Fresh memory is filled with
/// bytes that make NaN and -1, so that nothing is right by chance.
class ListingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes);
    if (memory != nullptr) {
      std::memset(memory, 0xff, bytes);
      tensors().add(memory, bytes);
    }
    return {memory, memory, &free, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void free(void* memory) {
    if (memory == nullptr) return;
    tensors().remove(memory);
    c10::free_cpu(memory);
  }
};

const bool installed = [] {
  static auto* allocator = new ListingAllocator;
  c10::SetCPUAllocator(allocator, /*priority=*/255);
  return true;
}();

// ---- shared memory, stacks and constants
// ----------------------------------------------------------

/// Addresses of this library: its constants, and its variables of the calling CPU thread, which are
/// the shared memory.
struct Image {
  uintptr_t begin = 0, end = 0, shared_begin = 0, shared_end = 0;
};

int look_for_image(dl_phdr_info* info, size_t, void* found) {
  Image image{UINTPTR_MAX};
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type == PT_LOAD) {
      image.begin = std::min<uintptr_t>(image.begin, info->dlpi_addr + part.p_vaddr);
      image.end = std::max<uintptr_t>(image.end, info->dlpi_addr + part.p_vaddr + part.p_memsz);
    } else if (part.p_type == PT_TLS && info->dlpi_tls_data != nullptr) {
      image.shared_begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      image.shared_end = image.shared_begin + part.p_memsz;
    }
  }
  const auto here = reinterpret_cast<uintptr_t>(&machine);
  if (here < image.begin || here >= image.end) return 0;
  *static_cast<Image*>(found) = image;
  return 1;
}

bool is_within(uintptr_t address, uint64_t bytes, uintptr_t begin, uint64_t size) {
  return address >= begin && address - begin <= size && bytes <= size - (address - begin);
}

Image image;
std::vector<Shadow> shared_shadow;

}  // namespace
}  // namespace simt

namespace equipoise {
extern thread_local unsigned char shared_memory[];
}

namespace simt {

void begin_launch_memory(unsigned blocks) {
  if (blocks > kMaxBlocks) throw std::runtime_error("simt: more blocks than this lane can follow");
  equipoise::shared_memory[0] = 0;  // the CPU thread's variables exist from the first use on
  dl_iterate_phdr(&look_for_image, &image);
  shared_shadow.resize(image.shared_end - image.shared_begin);
  machine.launched_at = ++machine.now;
  visibility.releases.assign(blocks, {});
  visibility.handed.clear();
}

void begin_block_memory() {
  machine.block_began_at = machine.barrier_at = ++machine.now;
  for (Warp& warp : machine.warps) warp.synced_at = machine.now;
  visibility.seen.assign(visibility.releases.size(), 0);
  visibility.taken_over_at = machine.now;
}

void pass_on_through(uintptr_t address) {
  const Thread& self = *machine.thread;
  const auto merge = [](const Seen& from, Seen& into) {
    into.resize(from.size());
    for (size_t b = 0; b < from.size(); ++b) into[b] = std::max(into[b], from[b]);
  };
  ++machine.now;
  if (const auto found = visibility.handed.find(address); found != visibility.handed.end()) {
    merge(found->second, visibility.seen);
    visibility.taken_over_at = machine.now;
  }
  if (self.fenced_at == 0) return;
  // A fence covers what its own thread wrote before it, and what any thread of the block wrote
  // before the last barrier before it.
  Release release(blockDim.x, self.barrier_before_fence);
  for (unsigned i = 0; i < blockDim.x; ++i) {
    const uint64_t fenced_at = machine.threads[i].fenced_at;
    const bool is_known = i == self.index || fenced_at < machine.barrier_at;
    if (is_known) release[i] = std::max(release[i], fenced_at);
  }
  auto& releases = visibility.releases[machine.block];
  releases.push_back(std::move(release));
  visibility.seen[machine.block] = static_cast<unsigned>(releases.size());
  merge(visibility.seen, visibility.handed[address]);
}

void access(uintptr_t address, unsigned bytes, Access kind, const void* code) {
#ifdef __SANITIZE_ADDRESS__
  return;  // it looks at the accesses itself; here only the atomic ones would be known
#endif
  const Thread& self = *machine.thread;
  const auto stack = reinterpret_cast<uintptr_t>(self.stack);
  if (address - stack < kStackBytes) return;
  if (++machine.steps > 1 << 22) fault("endless loop", "takes too many steps", code);

  const char* const verb = kind == Access::kRead    ? "reads "
                           : kind == Access::kWrite ? "writes "
                                                    : "adds to ";
  const auto report = [&](const char* fault_kind, const std::string& what) {
    fault(fault_kind, verb + std::to_string(bytes) + " bytes " + what, code);
  };
  const auto shared = reinterpret_cast<uintptr_t>(equipoise::shared_memory);
  Shadow* shadow = nullptr;
  uint64_t begin = machine.launched_at;
  if (address >= image.shared_begin && address < image.shared_end) {
    const int64_t offset = static_cast<int64_t>(address - shared);
    if (offset >= 0 && offset < kMaxSharedBytes && offset + bytes > machine.shared_bytes) {
      report("out of bounds", "at " + std::to_string(offset) + " of the " +
                                  std::to_string(machine.shared_bytes) +
                                  " bytes of dynamic shared memory");
    }
    shadow = &shared_shadow[address - image.shared_begin];
    begin = machine.block_began_at;
  } else if (is_within(address, bytes, image.begin, image.end - image.begin) ||
             is_within(address, bytes, reinterpret_cast<uintptr_t>(machine.body.arguments),
                       machine.body.bytes)) {
    if (kind != Access::kRead) report("out of bounds", "of a constant");
    return;
  } else {
    Tensor* tensor = tensors().at_or_before(address);
    if (tensor == nullptr || address - tensor->begin > tensor->bytes + (1 << 20)) {
      report("out of bounds", "of no tensor");
    }
    if (!is_within(address, bytes, tensor->begin, tensor->bytes)) {
      report("out of bounds", "at " + std::to_string(address - tensor->begin) + " of the " +
                                  std::to_string(tensor->bytes) + " bytes of a tensor");
    }
    if (tensor->shadow == nullptr) {
      void* memory = mmap(nullptr, tensor->bytes * sizeof(Shadow), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) fault("out of memory", "for what is known of a tensor", code);
      tensor->shadow = static_cast<Shadow*>(memory);
    }
    shadow = &tensor->shadow[address - tensor->begin];
  }
  for (unsigned i = 0; i < bytes; ++i) {
    if (begin == machine.block_began_at && kind != Access::kWrite &&
        shadow[i].writer.time < begin) {
      report("uninitialised shared memory", "that nobody has written");
    }
    if (const Stamp* other = enter(shadow[i], kind, begin)) {
      report("race", "that thread " + std::to_string(other->thread) +
                         (other->block == machine.block ? "" : " of another block") + " also " +
                         (other == &shadow[i].writer ? "writes" : "reads") +
                         ", in no certain order");
    }
  }
}

void set_memory(void* address, int value, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const Tensor* tensor = tensors().at_or_before(begin);
  if (bytes > 0 && (tensor == nullptr || !is_within(begin, bytes, tensor->begin, tensor->bytes))) {
    throw std::runtime_error("simt: out of bounds: cudaMemsetAsync");
  }
  if (bytes > 0) std::memset(address, value, bytes);
}

}  // namespace simt

// ---- what the compiler calls
// -----------------------------------------------------------------------

namespace {

void look(void* memory, unsigned bytes, simt::Access kind, bool aligned, const void* code) {
  if (simt::machine.thread == nullptr) return;  // the host's part of a .cu file
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (aligned && address % bytes != 0) {
    simt::fault(
        "misaligned",
        "accesses " + std::to_string(bytes) + " bytes at an address that is not a multiple of that",
        code);
  }
  simt::access(address, bytes, kind, code);
}

}  // namespace

#define HERE __builtin_return_address(0)
#define HOOKS(bytes)                                                                              \
  void __tsan_read##bytes(void* memory) { look(memory, bytes, simt::Access::kRead, true, HERE); } \
  void __tsan_write##bytes(void* memory) {                                                        \
    look(memory, bytes, simt::Access::kWrite, true, HERE);                                        \
  }                                                                                               \
  void __tsan_unaligned_read##bytes(void* memory) {                                               \
    look(memory, bytes, simt::Access::kRead, false, HERE);                                        \
  }                                                                                               \
  void __tsan_unaligned_write##bytes(void* memory) {                                              \
    look(memory, bytes, simt::Access::kWrite, false, HERE);                                       \
  }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* memory, uintptr_t bytes) {
  look(memory, static_cast<unsigned>(bytes), simt::Access::kRead, false, HERE);
}
void __tsan_write_range(void* memory, uintptr_t bytes) {
  look(memory, static_cast<unsigned>(bytes), simt::Access::kWrite, false, HERE);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// std::atomic, which the host's part uses in the counters of references.
#define ATOMICS(bits)                                                                          \
  int##bits##_t __tsan_atomic##bits##_load(const int##bits##_t* from, int) {                   \
    return __atomic_load_n(from, __ATOMIC_SEQ_CST);                                            \
  }                                                                                            \
  void __tsan_atomic##bits##_store(int##bits##_t* to, int##bits##_t value, int) {              \
    __atomic_store_n(to, value, __ATOMIC_SEQ_CST);                                             \
  }                                                                                            \
  int##bits##_t __tsan_atomic##bits##_fetch_add(int##bits##_t* to, int##bits##_t value, int) { \
    return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);                                    \
  }                                                                                            \
  int##bits##_t __tsan_atomic##bits##_fetch_sub(int##bits##_t* to, int##bits##_t value, int) { \
    return __atomic_fetch_sub(to, value, __ATOMIC_SEQ_CST);                                    \
  }
ATOMICS(32)
ATOMICS(64)

/// Memory that torch did not allocate: lists it as a tensor until simt_forget.
__attribute__((visibility("default"))) void simt_know(void* memory, size_t bytes) {
  simt::tensors().add(memory, bytes);
}
__attribute__((visibility("default"))) void simt_forget(void* memory) {
  simt::tensors().remove(memory);
}
}
