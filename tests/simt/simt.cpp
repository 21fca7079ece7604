// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU: see simt.h. Blocks, and threads that could go on, take turns in an
// order that is drawn from a seed, so that a kernel which relies on one order is found out.
//
//   simt_seed(n)     starts the drawing anew; 0: always the first block, the last thread
//   simt_launches()  launches so far
#include "simt.h"

#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

#include "machine.h"

#ifndef __x86_64__
#error "fibers are switched by a few x86-64 instructions"
#endif

simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace equipoise {  // block.cuh declares it
thread_local unsigned char shared_memory[simt::kMaxSharedBytes] __attribute__((aligned(16)));
}

namespace simt {

Machine machine;

namespace {

// ---- fibers ------------------------------------------------------------------------------------

// Saves the registers that a function must keep on the stack, the stack at *save, and goes on where
// the stack `load` was saved.
extern "C" void simt_switch_stacks(void** save, void* load);
asm(R"(
.text
.type simt_switch_stacks, @function
simt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Scheduler {
  std::mutex one_launch;
  void* stack_pointer = nullptr;
  char* stacks = nullptr;
  std::vector<Thread*> ready;
  unsigned in_barrier = 0, with_predicate = 0, done = 0;
  const void* kernel = nullptr;
  // A fault, until the launch throws it.
  const char* fault_kind = nullptr;
  std::string fault_what;
  const void* fault_code = nullptr;
  Thread* fault_thread = nullptr;

  uint64_t seed = 1;
  std::minstd_rand random{1};
  int64_t launches = 0;
} scheduler;

uint64_t draw(uint64_t below) { return scheduler.random() * below >> 31; }

// AddressSanitizer is told of each change of stacks: before, and on the other side.
#ifdef __SANITIZE_ADDRESS__
void leave_for(const void* stack, size_t bytes, void** fake_stack) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
void arrive(void* fake_stack, const void** from, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, from, bytes);
}
#else
void leave_for(const void*, size_t, void**) {}
void arrive(void*, const void**, size_t*) {}
#endif
const void* scheduler_stack = nullptr;  // as it was left last
size_t scheduler_stack_bytes = 0;

void to_scheduler() {
  Thread& self = *machine.thread;
  void* fake_stack = nullptr;
  const bool returns = self.state != Thread::kDone;
  leave_for(scheduler_stack, scheduler_stack_bytes, returns ? &fake_stack : nullptr);
  simt_switch_stacks(&self.stack_pointer, scheduler.stack_pointer);
  arrive(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void to_thread(Thread& thread) {
  machine.thread = &thread;
  machine.steps = 0;
  threadIdx.x = thread.index;
  void* fake_stack = nullptr;
  leave_for(thread.stack, kStackBytes, &fake_stack);
  simt_switch_stacks(&scheduler.stack_pointer, thread.stack_pointer);
  arrive(fake_stack, nullptr, nullptr);
  machine.thread = nullptr;
}

void finish(Thread& self);

void thread_main() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  machine.body.run(machine.body.arguments);
  finish(*machine.thread);
  to_scheduler();
}

// A stack that simt_switch_stacks can load: six registers, where to return to, and the place of a
// return address that is never used, so that the stack is aligned as after a call.
void prepare_stack(Thread& thread) {
  ASAN_UNPOISON_MEMORY_REGION(thread.stack, kStackBytes);  // frames of the thread before
  auto** top = reinterpret_cast<void**>(thread.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

// Stacks for the largest block, each above a page that must not be touched.
void reserve_stacks() {
  constexpr int64_t kPage = 4096, kEach = kStackBytes + kPage;
  void* memory = mmap(nullptr, kMaxThreads * kEach, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
  scheduler.stacks = static_cast<char*>(memory);
  machine.threads.resize(kMaxThreads);
  for (int64_t i = 0; i < kMaxThreads; ++i) {
    char* const guard = scheduler.stacks + i * kEach;
    mprotect(guard, kPage, PROT_NONE);
    machine.threads[i].index = static_cast<unsigned>(i);
    machine.threads[i].stack = guard + kPage;
  }
}

// ---- meetings ----------------------------------------------------------------------------------

void make_ready(Thread& thread) {
  thread.state = Thread::kReady;
  scheduler.ready.push_back(&thread);
}

Warp& warp_of(const Thread& thread) { return machine.warps[thread.warp()]; }

Thread& lane_of_warp(const Thread& thread, unsigned lane) {
  return machine.threads[thread.warp() * kWarp + lane];
}

std::string lane_name(unsigned lane) { return "lane " + std::to_string(lane); }

/// Calls function(lane) for each lane of the mask, the lowest first.
template <typename Function>
void for_lanes(unsigned mask, const Function& function) {
  for (; mask != 0; mask &= mask - 1) function(static_cast<unsigned>(__builtin_ctz(mask)));
}

void finish(Thread& self) {
  self.state = Thread::kDone;
  ++scheduler.done;
  warp_of(self).gone |= 1u << self.lane();
  for_lanes(warp_of(self).waiting, [&](unsigned lane) {
    Thread& other = lane_of_warp(self, lane);
    if ((other.mask >> self.lane() & 1) == 0) return;
    machine.thread = &other;
    fault("absent lane", lane_name(self.lane()) + " is waited for and has left the kernel",
          nullptr);
  });
  if (scheduler.in_barrier > 0) {
    fault("divergent barrier", "leaves the kernel while others wait in __syncthreads", nullptr);
  }
}

/// All lanes of this thread's mask have come: gives each its result and lets it go on.
void complete_meeting(const Thread& self) {
  Warp& warp = warp_of(self);
  if (self.kind == Meeting::kSync && (self.mask | warp.gone) == 0xffffffffu) {
    warp.synced_at = ++machine.now;
  }
  const auto lanes_with = [&](const auto& condition) {
    unsigned lanes = 0;
    for_lanes(self.mask, [&](unsigned lane) {
      lanes |= unsigned{condition(lane_of_warp(self, lane).value)} << lane;
    });
    return lanes;
  };
  const unsigned ballot =
      self.kind != Meeting::kBallot ? 0 : lanes_with([](uint64_t value) { return value != 0; });
  for_lanes(self.mask, [&](unsigned lane) {
    Thread& thread = lane_of_warp(self, lane);
    if (self.kind == Meeting::kShuffle) {
      thread.result = lane_of_warp(self, thread.source_lane).value;
    } else if (self.kind == Meeting::kMatch) {
      thread.result = lanes_with([&](uint64_t value) { return value == thread.value; });
    } else {
      thread.result = ballot;
    }
    make_ready(thread);
  });
  warp.waiting &= ~self.mask;
}

}  // namespace

int lane() { return static_cast<int>(machine.thread->lane()); }

uint64_t meet(Meeting kind, unsigned mask, uint64_t value, int source_lane, const Place& place) {
  Thread& self = *machine.thread;
  self.kind = kind;
  self.mask = mask;
  self.value = value;
  self.source_lane = source_lane;
  self.place = place;
  self.state = Thread::kInWarp;
  Warp& warp = warp_of(self);
  warp.waiting |= 1u << self.lane();
  if ((mask >> self.lane() & 1) == 0) {
    fault("lane outside its mask", lane_name(self.lane()) + " is not in the mask it gives",
          nullptr);
  }
  if (kind == Meeting::kShuffle && (uint64_t{mask} >> source_lane & 1) == 0) {
    fault("shuffle from absent lane", lane_name(source_lane) + " is not in the mask", nullptr);
  }
  for_lanes(mask & warp.gone, [&](unsigned lane) {
    fault("absent lane", lane_name(lane) + " is in the mask and not in the kernel", nullptr);
  });
  if ((warp.waiting & mask) == mask) {
    bool complete = true;
    for_lanes(mask, [&](unsigned lane) {
      const Thread& other = lane_of_warp(self, lane);
      if (other.kind == kind && other.mask == mask) return;
      complete = false;
      if ((other.mask >> self.lane() & 1) == 0) return;
      fault("divergent warp", lane_name(lane) + " waits at another function or with another mask",
            nullptr);
    });
    if (complete) complete_meeting(self);
  }
  to_scheduler();
  return self.result;
}

int meet_block(bool predicate, const Place& place) {
  Thread& self = *machine.thread;
  self.place = place;
  self.state = Thread::kInBlock;
  if (scheduler.done > 0) {
    fault("divergent barrier", "waits in __syncthreads though others have left the kernel",
          nullptr);
  }
  for (unsigned i = 0; i < blockDim.x; ++i) {
    const Thread& other = machine.threads[i];
    if (other.state != Thread::kInBlock || &other == &self) continue;
    if (other.place.line() != place.line() || other.place.file_name() != place.file_name()) {
      fault("divergent barrier", "thread " + std::to_string(i) + " waits in another __syncthreads",
            nullptr);
    }
    break;  // one is enough: the others have been compared with it
  }
  scheduler.with_predicate += predicate;
  if (++scheduler.in_barrier == blockDim.x) {
    machine.barrier_at = ++machine.now;
    for (unsigned i = 0; i < blockDim.x; ++i) {
      machine.threads[i].result = scheduler.with_predicate;
      make_ready(machine.threads[i]);
    }
    scheduler.in_barrier = scheduler.with_predicate = 0;
  }
  to_scheduler();
  return static_cast<int>(self.result);
}

void fence() {
  Thread& self = *machine.thread;
  self.fenced_at = ++machine.now;
  self.barrier_before_fence = machine.barrier_at;
}

template <typename T>
T add_atomically(T* address, T value) {
  if (scheduler.seed != 0) {  // let others come first
    make_ready(*machine.thread);
    to_scheduler();
  }
  const auto number = reinterpret_cast<uintptr_t>(address);
  access(number, sizeof(T), Access::kAtomic, __builtin_return_address(0));
  pass_on_through(number);
  const T before = *address;
  *address = before + value;
  return before;
}
template unsigned add_atomically(unsigned*, unsigned);
template unsigned long long add_atomically(unsigned long long*, unsigned long long);

// ---- launches ----------------------------------------------------------------------------------

namespace {

/// What addr2line says of an address in this library, a line of text each.
std::vector<std::string> describe(const void* code) {
  Dl_info info;
  if (code == nullptr || dladdr(code, &info) == 0) return {"?", "?"};
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -Cfe '%s' 0x%lx 2>/dev/null", info.dli_fname,
                static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase));
  std::vector<std::string> lines;
  if (FILE* pipe = popen(command, "r")) {
    for (char line[4096]; std::fgets(line, sizeof line, pipe) != nullptr;) {
      lines.emplace_back(line, std::strcspn(line, "\n"));
    }
    pclose(pipe);
  }
  lines.resize(2, "?");
  return lines;
}

/// "path/to/cuda/file.cu:12 (...)" -> "file.cu:12"
std::string file_and_line(std::string text) {
  text = text.substr(text.rfind('/') + 1);
  return text.substr(0, text.find(' '));
}

[[noreturn]] void throw_fault() {
  const Thread& thread = *scheduler.fault_thread;
  const std::string kernel = describe(scheduler.kernel)[0];
  const std::string place =
      scheduler.fault_code == nullptr
          ? file_and_line(thread.place.file_name()) + ":" + std::to_string(thread.place.line())
          : file_and_line(describe(static_cast<const char*>(scheduler.fault_code) - 1)[1]);
  throw std::runtime_error("simt: " + std::string(scheduler.fault_kind) + ": thread " +
                           std::to_string(thread.index) + " of block " +
                           std::to_string(blockIdx.x) + " in " + kernel + " at " + place + ": " +
                           scheduler.fault_what);
}

void note_fault(const char* kind, const std::string& what, const void* code, Thread* thread) {
  scheduler.fault_kind = kind;
  scheduler.fault_what = what;
  scheduler.fault_code = code;
  scheduler.fault_thread = thread;
}

void run_block() {
  scheduler.ready.clear();
  scheduler.in_barrier = scheduler.with_predicate = scheduler.done = 0;
  begin_block_memory();
  for (Warp& warp : machine.warps) warp.waiting = 0, warp.gone = 0xffffffffu;
  for (unsigned i = 0; i < blockDim.x; ++i) {
    Thread& thread = machine.threads[i];
    warp_of(thread).gone &= ~(1u << thread.lane());
    thread.fenced_at = thread.barrier_before_fence = 0;
    prepare_stack(thread);
    make_ready(thread);
  }
  while (!scheduler.ready.empty()) {
    auto& ready = scheduler.ready;
    if (scheduler.seed != 0) std::swap(ready[draw(ready.size())], ready.back());
    Thread& next = *ready.back();
    ready.pop_back();
    to_thread(next);
    if (scheduler.fault_kind != nullptr) throw_fault();
  }
  for (unsigned i = 0; i < blockDim.x; ++i) {
    if (machine.threads[i].state == Thread::kDone) continue;
    note_fault("deadlock", "waits for threads that will never come", nullptr, &machine.threads[i]);
    throw_fault();
  }
}

}  // namespace

void fault(const char* kind, const std::string& what, const void* code) {
  note_fault(kind, what, code, machine.thread);
  to_scheduler();
  std::abort();  // a thread at fault is never resumed
}

void launch(const void* kernel, int64_t blocks, int64_t threads, int64_t shared_bytes, Body body) {
  const std::lock_guard lock(scheduler.one_launch);
  ++scheduler.launches;
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error("simt: bad launch: " + describe(kernel)[0] + " with " + what);
  };
  if (blocks < 1 || blocks > INT32_MAX) refuse(std::to_string(blocks) + " blocks");
  if (threads < 1 || threads > kMaxThreads) refuse(std::to_string(threads) + " threads");
  if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
    refuse(std::to_string(shared_bytes) + " bytes of shared memory");
  }
  if (scheduler.stacks == nullptr) reserve_stacks();
  scheduler.kernel = kernel;
  machine.body = body;
  scheduler.fault_kind = nullptr;
  machine.shared_bytes = shared_bytes;
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (scheduler.seed != 0) std::shuffle(order.begin(), order.end(), scheduler.random);
  begin_launch_memory(gridDim.x);
  for (machine.block = 0; machine.block < gridDim.x; ++machine.block) {
    blockIdx.x = order[machine.block];
    run_block();
  }
}

}  // namespace simt

extern "C" {
__attribute__((visibility("default"))) void simt_seed(uint64_t seed) {
  simt::scheduler.seed = seed;
  simt::scheduler.random.seed(static_cast<unsigned>(seed));
}
__attribute__((visibility("default"))) int64_t simt_launches() { return simt::scheduler.launches; }
}
