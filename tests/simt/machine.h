// SPDX-License-Identifier: Apache-2.0
// What simt.cpp (fibers and meetings) and memory.cpp (every access to memory) know of the running
// kernel. One launch at a time, one block at a time, one fiber at a time.
#pragma once

#include <string>
#include <vector>

#include "simt.h"

namespace simt {

constexpr unsigned kWarp = 32;
constexpr int64_t kMaxThreads = 1024, kMaxSharedBytes = 48 * 1024;

struct Thread {
  enum State { kReady, kInWarp, kInBlock, kDone };

  unsigned index = 0;  // in the block
  State state = kDone;
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // kStackBytes
  // Where it waits, and with what.
  Meeting kind{};
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int source_lane = 0;
  Place place;
  // The time of its last fence, and of the last barrier before that.
  uint64_t fenced_at = 0, barrier_before_fence = 0;

  unsigned warp() const { return index / kWarp; }
  unsigned lane() const { return index % kWarp; }
};
constexpr int64_t kStackBytes = 64 * 1024;

struct Warp {
  unsigned waiting = 0, gone = 0;  // lanes at a meeting; lanes that have left or never were
  uint64_t synced_at = 0;          // the time of the last __syncwarp of all lanes that are there
};

struct Machine {
  Thread* thread = nullptr;  // that runs; null outside of kernels
  std::vector<Thread> threads;
  Body body{};
  int64_t shared_bytes = 0;
  unsigned block = 0;  // how many were started before this one
  uint64_t steps = 0;  // accesses of the thread since it was last resumed
  // Time is counted in events that order accesses: barriers, fences, atomics.
  uint64_t now = 1, launched_at = 0, block_began_at = 0, barrier_at = 0;
  Warp warps[kMaxThreads / kWarp];
};
extern Machine machine;

/// Ends the launch, which throws; called by the thread that is at fault. `code` is an address in
/// the kernel, or null for where the thread waits.
[[noreturn]] void fault(const char* kind, const std::string& what, const void* code);

/// Memory as seen from the start of a launch and of a block, and by one access.
void begin_launch_memory(unsigned blocks);
void begin_block_memory();
enum class Access { kRead, kWrite, kAtomic };
void access(uintptr_t address, unsigned bytes, Access kind, const void* code);
/// An atomic passes on what a fence has made visible; takes over what others passed on.
void pass_on_through(uintptr_t address);

}  // namespace simt
