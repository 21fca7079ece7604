// SPDX-License-Identifier: Apache-2.0
// Calls the copy of a CPU kernel that was compiled for this machine's instruction set.
//
// Every csrc/cpu/*.cpp is compiled once per set into namespace equipoise::cpu::<set>, with
// -DCPU_CAPABILITY=<set>. torch decides which set is used (ATEN_CPU_CAPABILITY=default|avx2 lowers
// it).
#pragma once

#include <ATen/Version.h>

#include <string>

namespace equipoise::cpu {

enum class InstructionSet { kDefault, kAvx2, kAvx512 };

/// What torch found on this machine, asked once.
inline InstructionSet instruction_set() {
  static const InstructionSet found = [] {
    const std::string name = at::get_cpu_capability();
    if (name == "AVX512") return InstructionSet::kAvx512;
    return name == "AVX2" ? InstructionSet::kAvx2 : InstructionSet::kDefault;
  }();
  return found;
}

}  // namespace equipoise::cpu

/// Declares one kernel in the namespace of every instruction set that is compiled.
#if defined(__x86_64__)
#define EQUIPOISE_DECLARE_CPU_KERNEL(...) \
  namespace equipoise::cpu::DEFAULT {     \
  __VA_ARGS__;                            \
  }                                       \
  namespace equipoise::cpu::AVX2 {        \
  __VA_ARGS__;                            \
  }                                       \
  namespace equipoise::cpu::AVX512 {      \
  __VA_ARGS__;                            \
  }
#define EQUIPOISE_CALL_CPU_KERNEL(kernel, ...)      \
  switch (equipoise::cpu::instruction_set()) {      \
    case equipoise::cpu::InstructionSet::kAvx512:   \
      equipoise::cpu::AVX512::kernel(__VA_ARGS__);  \
      break;                                        \
    case equipoise::cpu::InstructionSet::kAvx2:     \
      equipoise::cpu::AVX2::kernel(__VA_ARGS__);    \
      break;                                        \
    default:                                        \
      equipoise::cpu::DEFAULT::kernel(__VA_ARGS__); \
  }
#else
#define EQUIPOISE_DECLARE_CPU_KERNEL(...) \
  namespace equipoise::cpu::DEFAULT {     \
  __VA_ARGS__;                            \
  }
#define EQUIPOISE_CALL_CPU_KERNEL(kernel, ...) equipoise::cpu::DEFAULT::kernel(__VA_ARGS__)
#endif
