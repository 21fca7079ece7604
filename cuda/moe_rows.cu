// SPDX-License-Identifier: Apache-2.0
// Moving rows between tokens and the permuted buffer on CUDA, see host.h: what moe_permute,
// moe_unpermute and both gradients are made of. Rows travel 16 bytes a thread.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <type_traits>

#include "host.h"
#include "launch.cuh"
#include "rows.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;

// ---- scatter: x is read once and written K times -----------------------------------------------

template <typename scalar_t>
struct Scatter {
  const scalar_t* x;  // [T, H]
  int64_t x_stride;
  const int64_t* row_id_map;  // [T, K]
  RowWeights<scalar_t> weights;
  bool weighted;
  scalar_t* rows;  // [N, H]
  bool* filled;    // [N], false at first
  int64_t tokens, top_k, num_rows, width;
};

// A thread takes kSize columns of a token to its K rows.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads) moe_scatter_rows_kernel(const Scatter<scalar_t> s) {
  using compute_t = compute_type<scalar_t>;
  const int64_t pieces = s.width / kSize;  // of a row
  const int64_t piece = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t token = piece / pieces, column = piece % pieces * kSize;
  if (token >= s.tokens) return;
  const auto x = Piece<scalar_t, kSize>::load(s.x + token * s.x_stride + column);
  for (int64_t slot = token * s.top_k; slot < (token + 1) * s.top_k; ++slot) {
    const int64_t row = s.row_id_map[slot];
    if (row < 0 || row >= s.num_rows) continue;
    auto scaled = x;
    if (s.weighted) {
      const compute_t weight = s.weights[slot];
#pragma unroll
      for (scalar_t& value : scaled.values) {
        value = static_cast<scalar_t>(weight * static_cast<compute_t>(value));
      }
    }
    scaled.store(s.rows + row * s.width + column);
    if (column == 0) s.filled[row] = true;
  }
}

// Zeroes the rows that no slot filled. Each warp looks at 32 rows at once: most often all are
// filled.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads) moe_zero_rows_kernel(const Scatter<scalar_t> s) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x - lane;
  const bool is_empty = first + lane < s.num_rows && !s.filled[first + lane];
  for (unsigned rest = __ballot_sync(kFullMask, is_empty); rest != 0; rest &= rest - 1) {
    scalar_t* row = s.rows + (first + __ffs(rest) - 1) * s.width;
    for (int64_t column = lane * kSize; column < s.width; column += kWarpSize * kSize) {
      Piece<scalar_t, kSize>{}.store(row + column);
    }
  }
}

template <typename scalar_t>
void scatter(const at::Tensor& x, const at::Tensor& row_id_map,
             const std::optional<at::Tensor>& weights, const at::Tensor& rows) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t num_rows = rows.size(0), width = rows.size(1);
  const auto filled = at::empty({num_rows}, rows.options().dtype(at::kBool));
  C10_CUDA_CHECK(cudaMemsetAsync(filled.mutable_data_ptr(), 0, num_rows, stream));
  const Scatter<scalar_t> s{x.const_data_ptr<scalar_t>(),
                            x.stride(0),
                            row_id_map.const_data_ptr<int64_t>(),
                            RowWeights<scalar_t>(weights),
                            weights.has_value(),
                            rows.mutable_data_ptr<scalar_t>(),
                            filled.mutable_data_ptr<bool>(),
                            x.size(0),
                            row_id_map.size(1),
                            num_rows,
                            width};
  const auto run = [&]<int kSize>(std::integral_constant<int, kSize>) {
    const int64_t pieces = s.tokens * (width / kSize);
    if (pieces > 0) {
      launch(moe_scatter_rows_kernel<scalar_t, kSize>, ceil_div(pieces, kThreads), kThreads, 0,
             stream, s);
    }
    launch(moe_zero_rows_kernel<scalar_t, kSize>, ceil_div(num_rows, kThreads), kThreads, 0, stream,
           s);
  };
  if (has_whole_pieces(x) && has_whole_pieces(rows)) {
    run(std::integral_constant<int, kPieceSize<scalar_t>>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

// ---- gather: a thread has 16 bytes of an output row and adds up its K pieces in slot order -----

// The rows that the slots of the tokens point at; a slot without a row holds -1.
template <typename scalar_t>
struct SlotRows {
  const scalar_t* rows;  // [N, H]
  int64_t stride;
  const int64_t* row_id_map;  // [T, K]
  int64_t tokens, top_k, num_rows, width;

  // Null for a slot without a row.
  __device__ const scalar_t* operator[](int64_t slot) const {
    const int64_t row = row_id_map[slot];
    return row >= 0 && row < num_rows ? rows + row * stride : nullptr;
  }
};

template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads)
    moe_gather_rows_kernel(const SlotRows<scalar_t> slots, const RowWeights<scalar_t> weights,
                           scalar_t* out) {
  using compute_t = compute_type<scalar_t>;
  constexpr int kBatch = 4;                    // rows on their way at once
  const int64_t pieces = slots.width / kSize;  // of a row
  const int64_t piece = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t token = piece / pieces, column = piece % pieces * kSize;
  if (token >= slots.tokens) return;
  compute_t sum[kSize] = {};
  const int64_t end = (token + 1) * slots.top_k;
  for (int64_t first = token * slots.top_k; first < end; first += kBatch) {
    Piece<scalar_t, kSize> batch[kBatch] = {};
    compute_t weight[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= end) continue;
      if (const scalar_t* row = slots[first + i]; row != nullptr) {
        batch[i] = Piece<scalar_t, kSize>::load(row + column);
        weight[i] = weights[first + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        sum[j] += weight[i] * static_cast<compute_t>(batch[i].values[j]);
      }
    }
  }
  Piece<scalar_t, kSize> result;
#pragma unroll
  for (int j = 0; j < kSize; ++j) result.values[j] = static_cast<scalar_t>(sum[j]);
  result.store(out + token * slots.width + column);
}

// ---- dot: a warp takes a slot, in a fixed order ------------------------------------------------

template <typename scalar_t, typename out_t, int kSize>
__global__ void __launch_bounds__(kThreads)
    moe_dot_rows_kernel(const SlotRows<scalar_t> slots, const scalar_t* grad, int64_t grad_stride,
                        out_t* out) {
  using compute_t = compute_type<scalar_t>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t slot = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarpSize;
  if (slot >= slots.tokens * slots.top_k) return;
  const scalar_t* row = slots[slot];
  const scalar_t* grad_row = grad + slot / slots.top_k * grad_stride;
  compute_t sum = 0;
  if (row != nullptr) {
    for (int64_t column = lane * kSize; column < slots.width; column += kWarpSize * kSize) {
      const auto a = Piece<scalar_t, kSize>::load(grad_row + column);
      const auto b = Piece<scalar_t, kSize>::load(row + column);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        sum += static_cast<compute_t>(a.values[j]) * static_cast<compute_t>(b.values[j]);
      }
    }
  }
  sum = team_reduce<kWarpSize>(sum, Sum{});
  if (lane == 0) out[slot] = static_cast<out_t>(sum);
}

template <typename scalar_t>
SlotRows<scalar_t> make_slot_rows(const at::Tensor& rows, const at::Tensor& row_id_map) {
  return {rows.const_data_ptr<scalar_t>(),
          rows.stride(0),
          row_id_map.const_data_ptr<int64_t>(),
          row_id_map.size(0),
          row_id_map.size(1),
          rows.size(0),
          rows.size(1)};
}

// Calls function(kSize) with the widest pieces that both matrices allow.
template <typename scalar_t, typename Function>
void with_piece_size(const at::Tensor& a, const at::Tensor& b, const Function& function) {
  if (has_whole_pieces(a) && has_whole_pieces(b)) {
    function(std::integral_constant<int, kPieceSize<scalar_t>>{});
  } else {
    function(std::integral_constant<int, 1>{});
  }
}

template <typename scalar_t>
void gather(const at::Tensor& rows, const at::Tensor& row_id_map,
            const std::optional<at::Tensor>& weights, const at::Tensor& out) {
  const auto slots = make_slot_rows<scalar_t>(rows, row_id_map);
  with_piece_size<scalar_t>(rows, out, [&](auto size) {
    const int64_t pieces = slots.tokens * (slots.width / size);
    launch(moe_gather_rows_kernel<scalar_t, size>, ceil_div(pieces, kThreads), kThreads, 0,
           c10::cuda::getCurrentCUDAStream(), slots, RowWeights<scalar_t>(weights),
           out.mutable_data_ptr<scalar_t>());
  });
}

template <typename scalar_t, typename out_t>
void dot(const at::Tensor& grad, const at::Tensor& rows, const at::Tensor& row_id_map,
         const at::Tensor& out) {
  const auto slots = make_slot_rows<scalar_t>(rows, row_id_map);
  with_piece_size<scalar_t>(rows, grad, [&](auto size) {
    launch(moe_dot_rows_kernel<scalar_t, out_t, size>, ceil_div(out.numel(), kThreads / kWarpSize),
           kThreads, 0, c10::cuda::getCurrentCUDAStream(), slots, grad.const_data_ptr<scalar_t>(),
           grad.stride(0), out.mutable_data_ptr<out_t>());
  });
}

}  // namespace

void moe_scatter_rows_cuda(const at::Tensor& x, const at::Tensor& row_id_map,
                           const std::optional<at::Tensor>& weights, const at::Tensor& rows) {
  if (rows.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(rows.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(),
                                  "moe_scatter_rows_cuda",
                                  [&] { scatter<scalar_t>(x, row_id_map, weights, rows); });
}

void moe_gather_rows_cuda(const at::Tensor& rows, const at::Tensor& row_id_map,
                          const std::optional<at::Tensor>& weights, const at::Tensor& out) {
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(),
                                  "moe_gather_rows_cuda",
                                  [&] { gather<scalar_t>(rows, row_id_map, weights, out); });
}

void moe_dot_rows_cuda(const at::Tensor& grad, const at::Tensor& rows, const at::Tensor& row_id_map,
                       const at::Tensor& out) {
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, rows.scalar_type(), "moe_dot_rows_cuda", [&] {
        using compute_t = compute_type<scalar_t>;
        if (out.scalar_type() == c10::CppTypeToScalarType<compute_t>::value) {
          dot<scalar_t, compute_t>(grad, rows, row_id_map, out);
        } else {
          dot<scalar_t, scalar_t>(grad, rows, row_id_map, out);
        }
      });
}

}  // namespace equipoise
