// SPDX-License-Identifier: Apache-2.0
// dispatch_layout: schema -> checks and shapes -> CPU -> registration, top to bottom.
// The CPU counts in blocks of tokens, each in a table of its own, and adds the tables up.
#include "dispatch_layout.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../library.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

namespace equipoise {
namespace {

using at::Tensor;

// ---- schema -------------------------------------------------------------------------------------

constexpr const char* kOp = "dispatch_layout";

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def(
      "dispatch_layout(Tensor topk_indices, SymInt num_ranks, SymInt num_experts) -> "
      "(Tensor num_tokens_per_rank, Tensor num_tokens_per_expert, Tensor is_token_in_rank)",
      {at::Tag::pt2_compliant_tag});
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

Results dispatch_layout_meta(const Tensor& topk_indices, c10::SymInt num_ranks,
                             c10::SymInt num_experts) {
  check_dtype(kOp, "topk_indices", topk_indices, at::kLong);
  TORCH_CHECK(topk_indices.dim() == 2, kOp, ": topk_indices must have shape [T, K], got ",
              topk_indices.sym_sizes());
  TORCH_CHECK(num_experts >= 1, kOp, ": num_experts must be at least 1, got ", num_experts);
  TORCH_CHECK(num_ranks >= 1, kOp, ": num_ranks must be at least 1, got ", num_ranks);
  TORCH_CHECK(num_experts % num_ranks == 0, kOp,
              ": num_ranks must divide num_experts = ", num_experts, ", got ", num_ranks);
  const auto integer = topk_indices.options().dtype(at::kInt);
  return {at::empty_symint({num_ranks}, integer), at::empty_symint({num_experts}, integer),
          at::empty_symint({topk_indices.sym_size(0), num_ranks}, integer.dtype(at::kBool))};
}

template <auto backend>
Results dispatch_layout_run(const Tensor& topk_indices, c10::SymInt num_ranks,
                            c10::SymInt num_experts) {
  const auto results = dispatch_layout_meta(topk_indices, num_ranks, num_experts);
  const auto& [per_rank, per_expert, in_rank] = results;
  // Not a matter of shapes to be traced with: it would bound every dynamic number of tokens.
  constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(topk_indices.numel() <= kMaxSlots, kOp, ": topk_indices must have at most ",
              kMaxSlots, " elements, got ", topk_indices.numel());
  if (topk_indices.numel() == 0) {
    for (const auto& result : {per_rank, per_expert, in_rank}) result.zero_();
  } else {
    backend(topk_indices.contiguous(), per_rank, per_expert, in_rank);
  }
  return results;
}

// ---- CPU ----------------------------------------------------------------------------------------

/// Tokens of a block: about as much work in indices and in flags (16 are cleared in the time of one
/// index) as is worth a thread, whatever the number of threads.
int64_t block_tokens(int64_t top_k, int64_t num_ranks) {
  return std::max<int64_t>(1, 32768 / (top_k + num_ranks / 16));
}

void dispatch_layout_cpu(const Tensor& indices, const Tensor& per_rank, const Tensor& per_expert,
                         const Tensor& in_rank) {
  const int64_t num_tokens = indices.size(0), top_k = indices.size(1);
  const int64_t num_experts = per_expert.size(0), num_ranks = per_rank.size(0);
  const int64_t experts_per_rank = num_experts / num_ranks;
  const int64_t length = block_tokens(top_k, num_ranks);
  const int64_t num_blocks = (num_tokens + length - 1) / length;
  const int64_t* index = indices.const_data_ptr<int64_t>();
  bool* flags = in_rank.mutable_data_ptr<bool>();

  const int64_t width = num_experts + num_ranks;
  std::vector<int32_t> tables(num_blocks * width);  // of each block: experts, then ranks
  std::atomic<int64_t> bad{-1};
  at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      int32_t* of_expert = tables.data() + block * width;
      int32_t* of_rank = of_expert + num_experts;
      for (int64_t t = block * length; t < std::min(num_tokens, (block + 1) * length); ++t) {
        bool* flag = flags + t * num_ranks;
        std::fill_n(flag, num_ranks, false);
        for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
          const int64_t expert = index[slot];
          if (static_cast<uint64_t>(expert) >= static_cast<uint64_t>(num_experts)) {
            if (expert != -1) bad.store(slot, std::memory_order_relaxed);
            continue;
          }
          const int64_t rank = expert / experts_per_rank;
          ++of_expert[expert];
          of_rank[rank] += !flag[rank];
          flag[rank] = true;
        }
      }
    }
  });
  if (bad.load() >= 0) check_expert(kOp, "topk_indices", index[bad.load()], num_experts);
  for (int64_t block = 1; block < num_blocks; ++block) {
    for (int64_t i = 0; i < width; ++i) tables[i] += tables[block * width + i];
  }
  std::copy_n(tables.data(), num_experts, per_expert.mutable_data_ptr<int32_t>());
  std::copy_n(tables.data() + num_experts, num_ranks, per_rank.mutable_data_ptr<int32_t>());
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) { m.impl(kOp, dispatch_layout_meta); }
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) { m.impl(kOp, dispatch_layout_run<dispatch_layout_cpu>); }
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl(kOp, dispatch_layout_run<dispatch_layout_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {  // integers have no gradient
  m.impl(kOp, torch::CppFunction::makeFallthrough());
}

}  // namespace

DispatchLayout dispatch_layout(const Tensor& topk_indices, int64_t num_ranks, int64_t num_experts) {
  static const auto op = find_op<Results(const Tensor&, c10::SymInt, c10::SymInt)>(kOp);
  auto [per_rank, per_expert, in_rank] = op.call(topk_indices, num_ranks, num_experts);
  return {per_rank, per_expert, in_rank};
}

}  // namespace equipoise
