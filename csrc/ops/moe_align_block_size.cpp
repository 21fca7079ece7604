// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size: schema -> checks and shapes -> CPU -> registration, top to bottom.
// slot_sort.cpp gives each slot its place; this op turns the map from slots to places around.
#include "moe_align_block_size.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "../library.h"
#include "slot_sort.h"
#ifdef EQUIPOISE_WITH_CUDA
#include "../../cuda/host.h"
#endif

namespace equipoise {
namespace {

using at::Tensor;

// ---- schema -------------------------------------------------------------------------------------

constexpr const char* kOp = "moe_align_block_size";

TORCH_LIBRARY_FRAGMENT(equipoise, m) {
  m.def(
      "moe_align_block_size(Tensor topk_indices, int block_size, SymInt num_experts) -> "
      "(Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded)",
      {at::Tag::pt2_compliant_tag});
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

// ---- checks and shapes, shared by Meta, CPU and CUDA --------------------------------------------

Results moe_align_block_size_meta(const Tensor& topk_indices, int64_t block_size,
                                  c10::SymInt num_experts) {
  check_dtype(kOp, "topk_indices", topk_indices, at::kLong);
  TORCH_CHECK(topk_indices.dim() == 2, kOp, ": topk_indices must have shape [T, K], got ",
              topk_indices.sym_sizes());
  TORCH_CHECK(block_size >= 1, kOp, ": block_size must be at least 1, got ", block_size);
  TORCH_CHECK(num_experts >= 1, kOp, ": num_experts must be at least 1, got ", num_experts);
  // An expert has no block without a slot, so never more blocks than slots.
  const auto slots = topk_indices.sym_numel();
  const auto padded = slots + num_experts * (block_size - 1);
  const auto blocks = slots.min((padded + (block_size - 1)) / block_size);
  const auto integer = topk_indices.options().dtype(at::kInt);
  return {at::empty_symint({blocks * block_size}, integer), at::empty_symint({blocks}, integer),
          at::empty({1}, integer)};
}

template <auto sort, auto invert>
Results moe_align_block_size_run(const Tensor& topk_indices, int64_t block_size,
                                 c10::SymInt num_experts) {
  const auto results = moe_align_block_size_meta(topk_indices, block_size, num_experts);
  const auto& [sorted, expert_ids, size] = results;
  // Not a matter of shapes to be traced with: it would bound every dynamic number of tokens.
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(sorted.numel() <= kMaxSize, kOp, ": topk_indices must need at most ", kMaxSize,
              " padded slots, got ", topk_indices.numel(), " elements, which may need ",
              sorted.numel());
  if (sorted.numel() == 0) {
    size.zero_();
    return results;
  }
  SlotSort slots{};
  slots.op = kOp;
  slots.slots = topk_indices.contiguous();
  slots.layout.align = block_size;
  slots.layout.num_rows = sorted.numel();
  const int64_t experts = num_experts.expect_int();
  slots.row_id_map = at::empty(topk_indices.sizes(), topk_indices.options());
  slots.counts = at::empty({experts}, topk_indices.options());
  slots.expert_offsets = at::empty({experts + 1}, topk_indices.options());
  slots.kept_per_expert = at::empty({experts}, topk_indices.options());
  slots.overflow = at::empty({}, topk_indices.options());
  slots.num_invalid = at::empty({}, topk_indices.options());
  sort(slots);
  invert(slots, sorted, expert_ids, size);
  return results;
}

// ---- CPU ----------------------------------------------------------------------------------------

void align_blocks_cpu(const SlotSort& slots, const Tensor& sorted, const Tensor& expert_ids,
                      const Tensor& size) {
  const int64_t num_slots = slots.row_id_map.numel(), num_experts = slots.counts.numel();
  const int64_t* map = slots.row_id_map.const_data_ptr<int64_t>();
  const int64_t* offset = slots.expert_offsets.const_data_ptr<int64_t>();
  int32_t* slot_of = sorted.mutable_data_ptr<int32_t>();
  std::fill_n(slot_of, sorted.numel(), static_cast<int32_t>(num_slots));
  at::parallel_for(0, num_slots, 32768, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      if (map[slot] >= 0) slot_of[map[slot]] = static_cast<int32_t>(slot);
    }
  });
  int32_t* expert = expert_ids.mutable_data_ptr<int32_t>();
  int32_t* end = expert + expert_ids.numel();
  for (int64_t e = 0; e < num_experts; ++e) {
    expert = std::fill_n(expert, (offset[e + 1] - offset[e]) / slots.layout.align,
                         static_cast<int32_t>(e));
  }
  std::fill(expert, end, -1);
  *size.mutable_data_ptr<int32_t>() = static_cast<int32_t>(offset[num_experts]);
}

// ---- registration -------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(equipoise, Meta, m) { m.impl(kOp, moe_align_block_size_meta); }
#ifndef EQUIPOISE_SIMT
TORCH_LIBRARY_IMPL(equipoise, CPU, m) {
  m.impl(kOp, moe_align_block_size_run<slot_sort_cpu, align_blocks_cpu>);
}
#endif
#ifdef EQUIPOISE_WITH_CUDA
TORCH_LIBRARY_IMPL(equipoise, EQUIPOISE_CUDA_KEY, m) {
  m.impl(kOp, moe_align_block_size_run<slot_sort_cuda, align_blocks_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(equipoise, Autograd, m) {  // integers have no gradient
  m.impl(kOp, torch::CppFunction::makeFallthrough());
}

}  // namespace

AlignedBlocks moe_align_block_size(const Tensor& topk_indices, int64_t block_size,
                                   int64_t num_experts) {
  static const auto op = find_op<Results(const Tensor&, int64_t, c10::SymInt)>(kOp);
  auto [sorted, expert_ids, size] = op.call(topk_indices, block_size, num_experts);
  return {sorted, expert_ids, size};
}

}  // namespace equipoise
