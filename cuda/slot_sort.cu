// SPDX-License-Identifier: Apache-2.0
// The stable counting sort of the (token, slot) pairs by expert on CUDA; see
// ../csrc/ops/slot_sort.h. moe_rows.cu then moves the rows.
//
// The pairs are cut into contiguous segments. counts[e][s] says how many pairs of segment s go to
// expert e; a prefix over the segments makes of it the rank of the first of them; from the totals
// follows where the rows of each expert begin; a warp per segment then walks through its pairs in
// order and hands out the ranks. Up to kOneBlockPairs pairs one block does all of it, otherwise
// there is a kernel for each step. Where an expert is to keep the pairs with the largest keys
// instead of the first, a block per expert then finds the smallest key that stays, digit by digit.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>

#include "block.cuh"
#include "host.h"
#include "launch.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;
constexpr int kSortThreads = 1024;
constexpr int64_t kOneBlockPairs = 8192;

struct Sort {
  const int64_t* indices;   // [pairs], or null and
  const bool* routing_map;  // [pairs]: pair i is of expert i % E
  int64_t* row_id_map;      // [pairs]
  int64_t* tokens_per_expert;
  int64_t* expert_offsets;
  int64_t* kept_per_expert;
  int64_t* overflow;
  unsigned long long* num_invalid;
  unsigned* starts;  // [E + 1], where the pairs of an expert begin in `order`; null without it
  unsigned* order;   // [pairs] by expert
  SlotLayout layout;
  int64_t pairs, length;  // segment s has the pairs s * length .. (s + 1) * length
  int experts, segments;
  int pitch;  // counts of an expert in memory

  // Where the count of an expert and a segment is.
  __device__ int64_t at(int expert, int segment) const { return int64_t{expert} * pitch + segment; }

  // The expert of a pair, -1 if it is left out.
  __device__ int expert(int64_t pair) const {
    if (indices == nullptr) return routing_map[pair] ? static_cast<int>(pair % experts) : -1;
    const int64_t e = indices[pair];
    return e >= 0 && e < experts ? static_cast<int>(e) : -1;
  }
  __device__ int64_t begin(int segment) const { return min(segment * length, pairs); }
};

// By `threads` threads: counts the pairs of one segment, on top of zeros.
__device__ void count_segment(const Sort& sort, int segment, int thread, int threads,
                              unsigned* counts) {
  const int64_t end = sort.begin(segment + 1);
  for (int64_t pair = sort.begin(segment) + thread; pair < end; pair += threads) {
    const int e = sort.expert(pair);
    if (e >= 0) {
      atomicAdd(&counts[sort.at(e, segment)], 1u);
    } else if (sort.indices != nullptr && sort.indices[pair] != -1) {
      atomicAdd(sort.num_invalid, 1ull);
    }
  }
}

// By one block, for the experts first, first + stride, ...: each count becomes the rank of the
// first of its pairs among those of its expert. So many neighbouring lanes take an expert as it has
// segments.
__device__ void rank_segments(const Sort& sort, int first, int stride, unsigned* counts) {
  constexpr int kBatch = 4;  // loads on their way at once
  int lanes = 1;
  while (lanes < sort.segments && lanes < kWarpSize) lanes *= 2;
  const int lane = threadIdx.x % kWarpSize, in_team = lane % lanes;
  const int teams = blockDim.x / lanes;
  for (int group = first; group * teams < sort.experts; group += stride) {
    const int e = group * teams + threadIdx.x / lanes;
    unsigned rank = 0;
    for (int begin = 0; begin < sort.segments; begin += kBatch * lanes) {
      unsigned count[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int segment = begin + i * lanes + in_team;
        count[i] = e < sort.experts && segment < sort.segments ? counts[sort.at(e, segment)] : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int segment = begin + i * lanes + in_team;
        unsigned sum = count[i];
        for (int distance = 1; distance < lanes; distance *= 2) {
          const unsigned below = __shfl_up_sync(kFullMask, sum, distance);
          if (in_team >= distance) sum += below;
        }
        if (e < sort.experts && segment < sort.segments) {
          counts[sort.at(e, segment)] = rank + sum - count[i];
        }
        rank += __shfl_sync(kFullMask, sum, lane | (lanes - 1));
      }
    }
    if (e < sort.experts && in_team == 0) sort.tokens_per_expert[e] = rank;
  }
}

// By one block: where the rows of each expert begin, and how many it keeps. A thread takes
// neighbouring experts.
__device__ void lay_out(const Sort& sort) {
  const int share = (sort.experts + blockDim.x - 1) / blockDim.x;
  const int begin = min(static_cast<int>(threadIdx.x) * share, sort.experts);
  const int end = min(begin + share, sort.experts);
  const SlotLayout& layout = sort.layout;
  int64_t rooms = 0, before = 0;
  for (int e = begin; e < end; ++e) {
    rooms += layout.room(sort.tokens_per_expert[e]);
    before += sort.tokens_per_expert[e];
  }
  int64_t row = block_exclusive_scan(rooms), lost = 0;
  for (int e = begin; e < end; ++e) {
    const int64_t count = sort.tokens_per_expert[e];
    const int64_t kept = layout.kept(count), offset = min(row, layout.num_rows);
    const int64_t fits = min(kept, layout.num_rows - offset);
    sort.expert_offsets[e] = offset;
    sort.kept_per_expert[e] = fits;
    lost += kept - fits;
    row += layout.room(count);
  }
  lost = block_reduce(lost, Sum{});
  if (threadIdx.x == blockDim.x - 1) {
    sort.expert_offsets[sort.experts] = min(row, layout.num_rows);
    *sort.overflow = lost;
  }
  if (sort.starts == nullptr) return;
  int64_t start = block_exclusive_scan(before);
  for (int e = begin; e < end; ++e) {
    sort.starts[e] = static_cast<unsigned>(start);
    start += sort.tokens_per_expert[e];
  }
}

// By one warp: hands out the ranks of one segment, in the order of its pairs, and with them the
// rows (or the places in `order`, where the rows are found later).
__device__ void place_segment(const Sort& sort, int segment, unsigned* ranks) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t end = sort.begin(segment + 1);
  for (int64_t first = sort.begin(segment); first < end; first += kWarpSize) {
    const int64_t pair = first + lane;
    const int expert = pair < end ? sort.expert(pair) : -1;
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const int leader = __ffs(peers) - 1;
    unsigned rank = 0;
    if (lane == leader && expert >= 0) {
      unsigned* next = &ranks[sort.at(expert, segment)];
      rank = *next;
      *next = rank + __popc(peers);
    }
    rank = __shfl_sync(kFullMask, rank, leader) + __popc(peers & lanes_below(lane));
    int64_t row = -1;
    if (expert >= 0 && sort.order != nullptr) {
      sort.order[sort.starts[expert] + rank] = static_cast<unsigned>(pair);
    } else if (expert >= 0 && rank < sort.kept_per_expert[expert]) {
      row = sort.expert_offsets[expert] + rank;
    }
    if (pair < end) sort.row_id_map[pair] = row;
    __syncwarp();  // the next step reads the ranks that this one moved on
  }
}

// All of it by one block, with a warp per segment and the counts in shared memory.
// (The 1 in the launch bounds keeps ptxas from spilling to fit a second block.)
__global__ void __launch_bounds__(kSortThreads, 1) slot_sort_kernel(const Sort sort) {
  auto* counts = reinterpret_cast<unsigned*>(shared_memory);  // [E, pitch]
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x; i < sort.experts * sort.pitch; i += kSortThreads) counts[i] = 0;
  if (threadIdx.x == 0) *sort.num_invalid = 0;
  __syncthreads();
  if (warp < sort.segments) count_segment(sort, warp, lane, kWarpSize, counts);
  __syncthreads();
  rank_segments(sort, 0, 1, counts);
  __syncthreads();
  lay_out(sort);
  __syncthreads();
  if (warp < sort.segments) place_segment(sort, warp, counts);
}

// The steps for many pairs: a block per segment; blocks that share the experts, of which the last
// to arrive lays out; a block of one warp per segment. (The 1 here, too, is against spills.)
__global__ void __launch_bounds__(kThreads)
    slot_sort_count_kernel(const Sort sort, unsigned* counts) {
  count_segment(sort, blockIdx.x, threadIdx.x, kThreads, counts);
}

__global__ void __launch_bounds__(kThreads, 1)
    slot_sort_rank_kernel(const Sort sort, unsigned* counts, unsigned* ticket) {
  rank_segments(sort, blockIdx.x, gridDim.x, counts);
  if (last_to_arrive(ticket, gridDim.x)) lay_out(sort);
}

__global__ void __launch_bounds__(kWarpSize)
    slot_sort_place_kernel(const Sort sort, unsigned* ranks) {
  place_segment(sort, blockIdx.x, ranks);
}

// ---- who stays, by keys ------------------------------------------------------------------------

template <typename scalar_t>
struct ProbKey {
  const scalar_t* probs;  // [pairs]
  __device__ uint64_t operator()(int64_t pair, int) const {
    return prob_key(static_cast<double>(probs[pair]));
  }
};

struct RandomKey {
  uint64_t seed;
  int64_t top_k;
  int experts;
  __device__ uint64_t operator()(int64_t pair, int expert) const {
    return random_key(seed, pair / top_k, expert, experts);
  }
};

// A block per expert: its pairs with the largest keys get its rows, in token order.
template <typename Key>
__global__ void __launch_bounds__(kThreads)
    slot_sort_choose_kernel(const Sort sort, const Key key) {
  constexpr int kDigits = 256;
  static_assert(kDigits == kThreads);
  __shared__ unsigned of_digit[kDigits];
  __shared__ uint64_t digit;
  __shared__ int64_t left_below;
  const int expert = blockIdx.x;
  const int64_t count = sort.tokens_per_expert[expert], kept = sort.layout.kept(count);
  const int64_t offset = sort.expert_offsets[expert], rows = sort.kept_per_expert[expert];
  const unsigned* order = sort.order + sort.starts[expert];
  if (rows == 0) return;

  uint64_t least = 0;    // the smallest key that stays
  int64_t left = count;  // so many of those that have it stay
  if (kept < count) {
    left = kept;
    for (int shift = 56; shift >= 0; shift -= 8) {
      of_digit[threadIdx.x] = 0;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < count; i += kThreads) {
        const uint64_t k = key(order[i], expert);
        if ((k >> shift >> 8) == (least >> shift >> 8)) atomicAdd(&of_digit[k >> shift & 255], 1u);
      }
      __syncthreads();
      const uint64_t mine = kDigits - 1 - threadIdx.x;
      const int64_t here = of_digit[mine], above = block_exclusive_scan(here);
      if (above < left && left <= above + here) {
        digit = mine;
        left_below = left - above;
      }
      __syncthreads();
      least |= digit << shift;
      left = left_below;
    }
  }
  int64_t ties = 0, row = 0;  // so far
  for (int64_t first = 0; first < count; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const int64_t pair = i < count ? order[i] : 0;
    const uint64_t k = i < count ? key(pair, expert) : 0;
    const int tie = i < count && k == least;
    const int64_t tie_rank = ties + block_exclusive_scan(tie);
    const int stays = i < count && (k > least || (tie && tie_rank < left));
    const int64_t mine = row + block_exclusive_scan(stays);
    if (stays && mine < rows) sort.row_id_map[pair] = offset + mine;
    ties += block_reduce(tie, Sum{});
    row += block_reduce(stays, Sum{});
  }
}

// ---- launches ----------------------------------------------------------------------------------

void sort_in_steps(const Sort& sort, const at::Tensor& like) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t counts = int64_t{sort.experts} * sort.pitch;
  const auto workspace = like.new_empty({counts + 1}, at::kUInt32);
  auto* memory = workspace.mutable_data_ptr<uint32_t>();
  C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, workspace.nbytes(), stream));
  C10_CUDA_CHECK(cudaMemsetAsync(sort.num_invalid, 0, sizeof *sort.num_invalid, stream));
  launch(slot_sort_count_kernel, sort.segments, kThreads, 0, stream, sort, memory);
  const int64_t blocks = std::min<int64_t>(ceil_div(sort.experts, kThreads / kWarpSize), 64);
  launch(slot_sort_rank_kernel, blocks, kThreads, 0, stream, sort, memory, memory + counts);
  launch(slot_sort_place_kernel, sort.segments, kWarpSize, 0, stream, sort, memory);
}

void sort_pairs(Sort sort, const at::Tensor& like) {
  // A segment is what one warp walks through, 32 pairs at a time.
  const auto cut = [&](int64_t most_segments) {
    const int64_t most = std::max<int64_t>(most_segments, 1);
    const int64_t pairs = std::max<int64_t>(sort.pairs, 1);
    sort.length = kWarpSize * ceil_div(ceil_div(pairs, most), kWarpSize);
    sort.segments = static_cast<int>(ceil_div(pairs, sort.length));
    sort.pitch = sort.segments;
  };
  const int64_t expert_bytes = sort.experts * sizeof(unsigned);
  if (sort.pairs <= kOneBlockPairs && expert_bytes <= kMaxSharedBytes) {
    const int64_t most = kMaxSharedBytes / expert_bytes;
    cut(std::min<int64_t>(most, kSortThreads / kWarpSize));
    // An odd pitch spreads the experts that a warp counts over the banks.
    if (sort.segments < most) sort.pitch = sort.segments | 1;
    launch(slot_sort_kernel, 1, kSortThreads, expert_bytes * sort.pitch,
           c10::cuda::getCurrentCUDAStream(), sort);
    return;
  }
  // More segments are faster to walk through, but their counts are memory to write and read.
  constexpr int64_t kMaxCounts = 1 << 16;
  cut(std::clamp<int64_t>(kMaxCounts / sort.experts, 32, 512));
  sort_in_steps(sort, like);
}

}  // namespace

void slot_sort_cuda(const SlotSort& s) {
  const c10::DeviceGuard guard(s.slots.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  constexpr int64_t kMaxPairs = std::numeric_limits<unsigned>::max();  // ranks are 32 bits wide
  TORCH_CHECK(s.slots.numel() <= kMaxPairs, s.op, ": topk_indices must have at most ", kMaxPairs,
              " elements on CUDA, got ", s.slots.numel());
  Sort sort{};
  if (s.slots.scalar_type() == at::kBool) {
    sort.routing_map = s.slots.const_data_ptr<bool>();
  } else {
    sort.indices = s.slots.const_data_ptr<int64_t>();
  }
  sort.row_id_map = s.row_id_map.mutable_data_ptr<int64_t>();
  sort.tokens_per_expert = s.counts.mutable_data_ptr<int64_t>();
  sort.expert_offsets = s.expert_offsets.mutable_data_ptr<int64_t>();
  sort.kept_per_expert = s.kept_per_expert.mutable_data_ptr<int64_t>();
  sort.overflow = s.overflow.mutable_data_ptr<int64_t>();
  sort.num_invalid =
      reinterpret_cast<unsigned long long*>(s.num_invalid.mutable_data_ptr<int64_t>());
  sort.layout = s.layout;
  sort.pairs = s.slots.numel();
  sort.experts = static_cast<int>(s.counts.numel());

  // Only an expert with more pairs than its capacity has to choose.
  at::Tensor workspace;
  if (s.drop_policy != DropPolicy::kPosition && s.layout.capacity < sort.pairs) {
    workspace = s.slots.new_empty({sort.experts + 1 + sort.pairs}, at::kUInt32);
    sort.starts = workspace.mutable_data_ptr<uint32_t>();
    sort.order = sort.starts + sort.experts + 1;
  }
  sort_pairs(sort, s.slots);
  if (sort.order == nullptr) return;
  const auto choose = [&](const auto& key) {
    launch(slot_sort_choose_kernel<std::decay_t<decltype(key)>>, sort.experts, kThreads, 0, stream,
           sort, key);
  };
  if (s.drop_policy == DropPolicy::kRandom) {
    choose(RandomKey{s.seed, s.slots.size(1), sort.experts});
  } else {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, s.probs->scalar_type(), "slot_sort_cuda",
        [&] { choose(ProbKey<scalar_t>{s.probs->const_data_ptr<scalar_t>()}); });
  }
}

}  // namespace equipoise
