// SPDX-License-Identifier: Apache-2.0
// The stable counting sort of the (token, slot) pairs by expert: which row of a buffer each gets.
// moe_permute and moe_align_block_size stand on it. Internal; slot_sort.cpp is the CPU side,
// cuda/slot_sort.cu the CUDA side, which reads this file too.
#pragma once

#include <ATen/core/Tensor.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <optional>

namespace equipoise {

/// Who stays where an expert has more slots than its capacity.
enum class DropPolicy {
  kPosition,  ///< the first slots, in token order
  kProbs,     ///< those with the largest weights
  kRandom     ///< those with the largest hash of (seed, token, expert)
};

/// Where the rows of each expert begin: those of expert e + 1 follow the room of expert e.
struct SlotLayout {
  int64_t capacity = std::numeric_limits<int64_t>::max();  ///< slots of an expert that may stay
  int64_t align = 1;             ///< the room of an expert is a multiple of this
  bool pad_to_capacity = false;  ///< every expert has room for `capacity` rows
  int64_t num_rows = 0;          ///< rows behind these do not exist: their slots overflow

  constexpr int64_t kept(int64_t count) const { return count < capacity ? count : capacity; }
  constexpr int64_t room(int64_t count) const {
    return pad_to_capacity ? capacity : (kept(count) + align - 1) / align * align;
  }
};

/// One sort: arguments that were checked and are contiguous, and allocated, unfilled outputs.
struct SlotSort {
  const char* op;                               ///< whose name errors carry
  at::Tensor slots;                             ///< [T, K] int64, experts in [-1, E); or
                                                ///< [T, E] bool: slot (t, e) is of expert e
  std::optional<at::Tensor> tokens_per_expert;  ///< [E] int64 counts of the slots, if known
  SlotLayout layout;
  DropPolicy drop_policy = DropPolicy::kPosition;
  std::optional<at::Tensor> probs;  ///< as slots, floating; for kProbs
  uint64_t seed = 0;                ///< for kRandom

  at::Tensor row_id_map;       ///< as slots, int64: the row of each slot, -1 if it has none
  at::Tensor counts;           ///< [E] int64: the slots of each expert
  at::Tensor expert_offsets;   ///< [E + 1] int64: where the room of each expert begins, and ends
  at::Tensor kept_per_expert;  ///< [E] int64: its slots that have a row
  at::Tensor overflow;         ///< scalar int64: slots within capacity for which there was no row
  at::Tensor num_invalid;      ///< scalar int64: slots outside [-1, E)
};

/// Raises on a slot outside [-1, E), on counts that are not those of the slots, and on overflow.
void slot_sort_cpu(const SlotSort& sort);

/// Larger for larger weights; NaN has the smallest, and -0 is 0.
constexpr uint64_t prob_key(double weight) {
  if (weight != weight) return 0;
  const auto bits = std::bit_cast<uint64_t>(weight + 0.0);
  constexpr uint64_t kSign = uint64_t{1} << 63;
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

/// The same for index form and routing map: splitmix64 (Steele, Lea and Flood, OOPSLA 2014),
/// counted on from the seed.
constexpr uint64_t random_key(uint64_t seed, int64_t token, int64_t expert, int64_t num_experts) {
  uint64_t z = seed + static_cast<uint64_t>(token * num_experts + expert + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace equipoise
