// SPDX-License-Identifier: Apache-2.0
// The counting sort on the CPU. Blocks of slots count their experts side by side; prefix sums over
// the blocks say how many slots of an expert stand before each block, so that every block can then
// rank its own slots. Integers all the way: the same result for any number of threads.
#include "slot_sort.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "../checks.h"

namespace equipoise {
namespace {

constexpr int64_t kBlockSlots = 8192;

/// Raw pointers of a SlotSort; `expert_of(slot)` is the number that stands in the slot.
template <typename ExpertOf>
struct Sorter {
  const SlotSort& s;
  const ExpertOf& expert_of;
  const int64_t num_slots = s.row_id_map.numel(), num_experts = s.counts.numel();
  const int64_t* given =
      s.tokens_per_expert ? s.tokens_per_expert->const_data_ptr<int64_t>() : nullptr;
  // Who counts alone can take over the counts that are given; blocks need counts of their own.
  const bool counts_are_given =
      given != nullptr && (num_slots <= kBlockSlots || at::get_num_threads() == 1);
  const int64_t block_slots = counts_are_given ? std::max<int64_t>(num_slots, 1) : kBlockSlots;
  const int64_t num_blocks = (num_slots + block_slots - 1) / block_slots;
  int64_t* map = s.row_id_map.mutable_data_ptr<int64_t>();
  int64_t* counts = s.counts.mutable_data_ptr<int64_t>();
  int64_t* offsets = s.expert_offsets.mutable_data_ptr<int64_t>();
  int64_t* kept = s.kept_per_expert.mutable_data_ptr<int64_t>();
  /// For each block and expert: first the count of the block, then how many slots of the expert
  /// stand before the block, then the place of its next slot.
  std::vector<int64_t> tables = std::vector<int64_t>(num_blocks * num_experts);
  std::atomic<int64_t> bad{-1};  // a slot with a bad expert

  void run() {
    if (counts_are_given) {
      // Enough to stay within bounds; check_given compares them in the end.
      int64_t total = 0;
      for (int64_t e = 0; e < num_experts; ++e) {
        const bool possible = given[e] >= 0 && given[e] <= num_slots - total;
        TORCH_CHECK(possible, s.op, ": tokens_per_expert must be the counts of the slots, got ",
                    given[e], " for expert ", e, " and ", total, " for those before it, of ",
                    num_slots, " slots");
        total += counts[e] = given[e];
      }
    } else {
      count();
    }
    lay_out();
    const bool position = s.drop_policy == DropPolicy::kPosition;
    if (position || *std::max_element(counts, counts + num_experts) <= s.layout.capacity) {
      place(offsets, kept, [&](int64_t slot, int64_t row) { map[slot] = row; });
    } else {
      choose();
    }
  }

  template <typename F>
  void for_each_block(const F& f) {
    at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        f(tables.data() + block * num_experts, block * block_slots,
          std::min(num_slots, (block + 1) * block_slots));
      }
    });
    if (bad.load() >= 0) check_expert(s.op, "topk_indices", expert_of(bad.load()), num_experts);
  }

  /// Whether a slot is of an expert; a bad number is noted.
  bool counts_for(int64_t slot, int64_t expert) {
    if (static_cast<uint64_t>(expert) < static_cast<uint64_t>(num_experts)) return true;
    if (expert != -1) bad.store(slot, std::memory_order_relaxed);
    return false;
  }

  void check_given(int64_t e, int64_t count) {
    TORCH_CHECK(given == nullptr || given[e] == count, s.op,
                ": tokens_per_expert must be the counts of the slots, got ", given[e],
                " for expert ", e, ", which has ", count);
  }

  void count() {
    for_each_block([&](int64_t* table, int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t e = expert_of(slot);
        if (counts_for(slot, e)) ++table[e];
      }
    });
    std::fill_n(counts, num_experts, 0);
    for (int64_t block = 0; block < num_blocks; ++block) {
      for (int64_t e = 0; e < num_experts; ++e) {
        auto& entry = tables[block * num_experts + e];
        counts[e] += std::exchange(entry, counts[e]);
      }
    }
    for (int64_t e = 0; e < num_experts; ++e) check_given(e, counts[e]);
  }

  void lay_out() {
    int64_t row = 0, needed = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
      offsets[e] = std::min(row, s.layout.num_rows);
      kept[e] = s.layout.kept(counts[e]);
      if (kept[e] > 0) needed = row + kept[e];
      row += s.layout.room(counts[e]);
    }
    offsets[num_experts] = std::min(row, s.layout.num_rows);
    TORCH_CHECK(needed <= s.layout.num_rows, s.op, ": output_rows must be at least ", needed,
                " for these slots, got ", s.layout.num_rows);
  }

  /// Calls f(slot, place) for every slot: the first `most[e]` slots of an expert get the places
  /// from `begin[e]` on, the others, and slots of no expert, -1.
  template <typename F>
  void place(const int64_t* begin, const int64_t* most, const F& f) {
    std::vector<int64_t> end(num_experts);
    for (int64_t e = 0; e < num_experts; ++e) end[e] = begin[e] + most[e];
    for_each_block([&](int64_t* next, int64_t first, int64_t last) {
      for (int64_t e = 0; e < num_experts; ++e) next[e] += begin[e];
      for (int64_t slot = first; slot < last; ++slot) {
        const int64_t e = expert_of(slot);
        const int64_t here = counts_for(slot, e) ? next[e]++ : -1;
        f(slot, here >= 0 && here < end[e] ? here : -1);
      }
    });
    for (int64_t e = 0; counts_are_given && e < num_experts; ++e) {
      check_given(e, num_blocks == 0 ? 0 : tables[e] - begin[e]);
    }
  }

  void choose() {
    std::vector<int64_t> starts(num_experts + 1), order(num_slots);
    for (int64_t e = 0; e < num_experts; ++e) starts[e + 1] = starts[e] + counts[e];
    place(starts.data(), counts, [&](int64_t slot, int64_t here) {
      if (here >= 0) order[here] = slot;
      map[slot] = -1;
    });
    const int64_t top_k = s.slots.size(1);
    const auto keep = [&](const auto& key_of) {
      at::parallel_for(0, num_experts, 1, [&](int64_t first, int64_t last) {
        std::vector<std::pair<uint64_t, int64_t>> candidates;  // (key, slot)
        for (int64_t e = first; e < last; ++e) {
          candidates.clear();
          for (int64_t i = starts[e]; i < starts[e + 1]; ++i) {
            candidates.emplace_back(key_of(order[i], e), order[i]);
          }
          const auto end = candidates.begin() + kept[e];
          if (kept[e] < counts[e]) {
            std::nth_element(candidates.begin(), end, candidates.end(),
                             [](const auto& a, const auto& b) {
                               return a.first != b.first ? a.first > b.first : a.second < b.second;
                             });
            std::sort(candidates.begin(), end,
                      [](const auto& a, const auto& b) { return a.second < b.second; });
          }
          for (int64_t i = 0; i < kept[e]; ++i) map[candidates[i].second] = offsets[e] + i;
        }
      });
    };
    if (s.drop_policy == DropPolicy::kRandom) {
      keep([&](int64_t slot, int64_t e) {
        return random_key(s.seed, slot / top_k, e, num_experts);
      });
    } else {
      AT_DISPATCH_FLOATING_TYPES_AND2(
          at::kHalf, at::kBFloat16, s.probs->scalar_type(), "slot_sort", [&] {
            const auto* probs = s.probs->const_data_ptr<scalar_t>();
            keep([&](int64_t slot, int64_t) { return prob_key(static_cast<double>(probs[slot])); });
          });
    }
  }
};

}  // namespace

void slot_sort_cpu(const SlotSort& sort) {
  *sort.overflow.mutable_data_ptr<int64_t>() = 0;  // both raise here
  *sort.num_invalid.mutable_data_ptr<int64_t>() = 0;
  const auto run = [&](const auto& expert_of) {
    Sorter<std::decay_t<decltype(expert_of)>>{sort, expert_of}.run();
  };
  if (sort.slots.scalar_type() == at::kBool) {
    const bool* chosen = sort.slots.const_data_ptr<bool>();
    const int64_t num_experts = sort.counts.numel();
    run([=](int64_t slot) -> int64_t { return chosen[slot] ? slot % num_experts : -1; });
  } else {
    const int64_t* expert = sort.slots.const_data_ptr<int64_t>();
    run([=](int64_t slot) { return expert[slot]; });
  }
}

}  // namespace equipoise
