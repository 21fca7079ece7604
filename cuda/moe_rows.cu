// SPDX-License-Identifier: Apache-2.0
// Moving rows between tokens and the permuted buffer on CUDA, see host.h: what moe_permute,
// moe_unpermute and both gradients are made of. Rows travel 16 bytes a thread.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <type_traits>

#include "host.h"
#include "launch.cuh"
#include "rows.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;

// ---- many slots --------------------------------------------------------------------------------

// With more slots than this a token has one for each expert, most of them without a row: warps take
// pieces of one token and look at 32 slots at once.
constexpr int64_t kManySlots = kWarpSize;

// The token and the first column of this thread; the lanes of a warp have one token.
struct Share {
  int64_t token, column;

  __device__ Share(int64_t width, int size) {
    const int64_t warp = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarpSize;
    const int64_t warps = warps_of_token(width, size);
    token = warp / warps;
    column = (warp % warps * kWarpSize + threadIdx.x % kWarpSize) * size;
  }
  static __host__ __device__ int64_t warps_of_token(int64_t width, int size) {
    return (width / size + kWarpSize - 1) / kWarpSize;
  }
  static int64_t blocks(int64_t tokens, int64_t width, int size) {
    return ceil_div(tokens * warps_of_token(width, size), kThreads / kWarpSize);
  }
};

// Calls function(slot, row) with the whole warp for the slots from `begin` that have a row, in
// order.
template <typename Function>
__device__ void for_each_row(const int64_t* row_id_map, int64_t begin, int64_t end,
                             int64_t num_rows, const Function& function) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t first = begin; first < end; first += kWarpSize) {
    const int64_t row = first + lane < end ? row_id_map[first + lane] : -1;
    const bool has_row = row >= 0 && row < num_rows;
    for (unsigned rest = __ballot_sync(kFullMask, has_row); rest != 0; rest &= rest - 1) {
      const int source = __ffs(rest) - 1;
      function(first + source, __shfl_sync(kFullMask, row, source));
    }
  }
}

// ---- scatter: x is read once and written K times -----------------------------------------------

// Rows of any type, as pieces of kSize integers: stride and width count integers.
template <typename T>
struct Scatter {
  const T* x;  // [T, H]
  int64_t x_stride;
  const int64_t* row_id_map;  // [T, K]
  T* rows;                    // [N, H]
  bool* filled;               // [N], false at first
  int64_t tokens, top_k, num_rows, width;
};

// A thread takes a piece of a token to its K rows.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) moe_scatter_rows_kernel(const Scatter<T> s) {
  const int64_t pieces = s.width / kSize;  // of a row
  const int64_t piece = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t token = piece / pieces, column = piece % pieces * kSize;
  if (token >= s.tokens) return;
  const auto x = Piece<T, kSize>::load(s.x + token * s.x_stride + column);
  for (int64_t slot = token * s.top_k; slot < (token + 1) * s.top_k; ++slot) {
    const int64_t row = s.row_id_map[slot];
    if (row < 0 || row >= s.num_rows) continue;
    x.store(s.rows + row * s.width + column);
    if (column == 0) s.filled[row] = true;
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads)
    moe_scatter_rows_of_many_slots_kernel(const Scatter<T> s) {
  const Share share(s.width, kSize);
  if (share.token >= s.tokens) return;
  const bool has_piece = share.column < s.width;
  Piece<T, kSize> x{};
  if (has_piece) x = Piece<T, kSize>::load(s.x + share.token * s.x_stride + share.column);
  const int64_t begin = share.token * s.top_k;
  for_each_row(s.row_id_map, begin, begin + s.top_k, s.num_rows, [&](int64_t, int64_t row) {
    if (has_piece) x.store(s.rows + row * s.width + share.column);
    if (share.column == 0) s.filled[row] = true;
  });
}

// Zeroes the rows that no slot filled. Each warp looks at 32 rows at once: most often all are
// filled.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) moe_zero_rows_kernel(const Scatter<T> s) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x - lane;
  const bool is_empty = first + lane < s.num_rows && !s.filled[first + lane];
  for (unsigned rest = __ballot_sync(kFullMask, is_empty); rest != 0; rest &= rest - 1) {
    T* row = s.rows + (first + __ffs(rest) - 1) * s.width;
    for (int64_t column = lane * kSize; column < s.width; column += kWarpSize * kSize) {
      Piece<T, kSize>{}.store(row + column);
    }
  }
}

// Calls function(T{}, kSize) with the widest pieces that the rows of both matrices are made of,
// whatever is in them: 16 bytes, or the one integer that start, distance and width are multiples
// of.
template <typename Function>
void with_bytes(const at::Tensor& a, const at::Tensor& b, const Function& function) {
  uintptr_t all = 0;
  for (const auto& rows : {a, b}) {
    all |= reinterpret_cast<uintptr_t>(rows.const_data_ptr()) |
           static_cast<uintptr_t>((rows.stride(0) | rows.size(1)) * rows.element_size());
  }
  constexpr std::integral_constant<int, 1> one;
  if (all % 16 == 0) return function(uint32_t{}, std::integral_constant<int, 4>{});
  if (all % 8 == 0) return function(uint64_t{}, one);
  if (all % 4 == 0) return function(uint32_t{}, one);
  all % 2 == 0 ? function(uint16_t{}, one) : function(uint8_t{}, one);
}

// Runs fill(filled), whose kernels write some rows and mark them in `filled`, and zeroes the
// others.
template <typename Fill>
void fill_rows(const at::Tensor& rows, const Fill& fill) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t num_rows = rows.size(0);
  const auto marks = rows.new_empty({num_rows}, at::kBool);
  bool* filled = marks.mutable_data_ptr<bool>();
  if (num_rows > 0) C10_CUDA_CHECK(cudaMemsetAsync(filled, 0, num_rows, stream));
  fill(filled);
  if (rows.numel() == 0) return;
  with_bytes(rows, rows, [&](auto integer, auto size) {
    using T = decltype(integer);
    Scatter<T> s{};
    s.rows = static_cast<T*>(rows.mutable_data_ptr());
    s.filled = filled;
    s.num_rows = num_rows;
    s.width = rows.size(1) * rows.element_size() / sizeof(T);
    launch(moe_zero_rows_kernel<T, size>, ceil_div(num_rows, kThreads), kThreads, 0, stream, s);
  });
}

void scatter_bytes(const at::Tensor& x, const at::Tensor& row_id_map, const at::Tensor& rows) {
  fill_rows(rows, [&](bool* filled) {
    if (x.numel() == 0) return;
    with_bytes(x, rows, [&](auto integer, auto size) {
      using T = decltype(integer);
      const int64_t bytes = rows.element_size(), unit = sizeof(T);
      const Scatter<T> s{static_cast<const T*>(x.const_data_ptr()),
                         x.stride(0) * bytes / unit,
                         row_id_map.const_data_ptr<int64_t>(),
                         static_cast<T*>(rows.mutable_data_ptr()),
                         filled,
                         x.size(0),
                         row_id_map.size(1),
                         rows.size(0),
                         rows.size(1) * bytes / unit};
      const auto stream = c10::cuda::getCurrentCUDAStream();
      if (s.top_k > kManySlots) {
        launch(moe_scatter_rows_of_many_slots_kernel<T, size>,
               Share::blocks(s.tokens, s.width, size), kThreads, 0, stream, s);
      } else {
        launch(moe_scatter_rows_kernel<T, size>, ceil_div(s.tokens * (s.width / size), kThreads),
               kThreads, 0, stream, s);
      }
    });
  });
}

// ---- gather: a thread has 16 bytes of an output row and adds up its K pieces in slot order -----

// The rows that the slots of the tokens point at; a slot without a row holds -1.
template <typename scalar_t>
struct SlotRows {
  const scalar_t* rows;  // [N, H]
  int64_t stride;
  const int64_t* row_id_map;  // [T, K]
  int64_t tokens, top_k, num_rows, width;

  // -1 for a slot without a row.
  __device__ int64_t index(int64_t slot) const {
    const int64_t row = row_id_map[slot];
    return row >= 0 && row < num_rows ? row : -1;
  }
  // Null for a slot without a row.
  __device__ const scalar_t* operator[](int64_t slot) const {
    const int64_t row = index(slot);
    return row >= 0 ? rows + row * stride : nullptr;
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

template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads)
    moe_gather_rows_of_many_slots_kernel(const SlotRows<scalar_t> slots,
                                         const RowWeights<scalar_t> weights, scalar_t* out) {
  using compute_t = compute_type<scalar_t>;
  const Share share(slots.width, kSize);
  if (share.token >= slots.tokens) return;
  const bool has_piece = share.column < slots.width;
  compute_t sum[kSize] = {};
  const int64_t begin = share.token * slots.top_k;
  for_each_row(slots.row_id_map, begin, begin + slots.top_k, slots.num_rows,
               [&](int64_t slot, int64_t row) {
                 if (!has_piece) return;
                 const auto piece =
                     Piece<scalar_t, kSize>::load(slots.rows + row * slots.stride + share.column);
                 const compute_t weight = weights[slot];
#pragma unroll
                 for (int j = 0; j < kSize; ++j) {
                   sum[j] += weight * static_cast<compute_t>(piece.values[j]);
                 }
               });
  if (!has_piece) return;
  Piece<scalar_t, kSize> result;
#pragma unroll
  for (int j = 0; j < kSize; ++j) result.values[j] = static_cast<scalar_t>(sum[j]);
  result.store(out + share.token * slots.width + share.column);
}

// ---- gradients of a gather with weights: a warp takes a slot ------------------------------------

template <typename scalar_t>
struct GatherBackward {
  using compute_t = compute_type<scalar_t>;
  SlotRows<scalar_t>
      slots;             // the rows that were gathered, null if no gradient of weights is wanted
  const scalar_t* grad;  // [T, H]
  int64_t grad_stride;
  RowWeights<scalar_t> weights;
  scalar_t* grad_rows;           // [N, H]
  bool* filled;                  // [N], false at first
  compute_t* wide_grad_weights;  // [T, K], one of the two or none
  scalar_t* narrow_grad_weights;
};

// grad_rows[row] = weight grad[t] and grad_weights[t, k] = <grad[t], row>, in a fixed order. The K
// warps of a token are neighbours: its gradient comes from memory once.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kThreads)
    moe_gather_rows_backward_kernel(const GatherBackward<scalar_t> b) {
  using compute_t = compute_type<scalar_t>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t slot = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarpSize;
  if (slot >= b.slots.tokens * b.slots.top_k) return;
  const int64_t row = b.slots.index(slot), width = b.slots.width;
  compute_t sum = 0;
  if (row >= 0) {
    const compute_t weight = b.weights[slot];
    const scalar_t* grad = b.grad + slot / b.slots.top_k * b.grad_stride;
#pragma unroll 2  // more than that spills float64 on sm_75
    for (int64_t column = lane * kSize; column < width; column += kWarpSize * kSize) {
      const auto piece = Piece<scalar_t, kSize>::load(grad + column);
      Piece<scalar_t, kSize> values{}, scaled;
      if (b.slots.rows != nullptr) {
        values = Piece<scalar_t, kSize>::load(b.slots.rows + row * b.slots.stride + column);
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const auto value = static_cast<compute_t>(piece.values[j]);
        scaled.values[j] = static_cast<scalar_t>(weight * value);
        sum += value * static_cast<compute_t>(values.values[j]);
      }
      scaled.store(b.grad_rows + row * width + column);
    }
    if (lane == 0) b.filled[row] = true;
  }
  sum = team_reduce<kWarpSize>(sum, Sum{});
  if (lane != 0) return;
  if (b.wide_grad_weights != nullptr) {
    b.wide_grad_weights[slot] = sum;
  } else if (b.narrow_grad_weights != nullptr) {
    b.narrow_grad_weights[slot] = static_cast<scalar_t>(sum);
  }
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
    const auto run = [&](auto kernel, int64_t blocks) {
      launch(kernel, blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream(), slots,
             RowWeights<scalar_t>(weights), out.mutable_data_ptr<scalar_t>());
    };
    if (slots.top_k > kManySlots) {
      run(moe_gather_rows_of_many_slots_kernel<scalar_t, size>,
          Share::blocks(slots.tokens, slots.width, size));
    } else {
      run(moe_gather_rows_kernel<scalar_t, size>,
          ceil_div(slots.tokens * (slots.width / size), kThreads));
    }
  });
}

// `rows` and `grad_weights` may be absent: the gradient of the rows alone.
template <typename scalar_t>
void gather_backward(const at::Tensor& grad, const std::optional<at::Tensor>& rows,
                     const at::Tensor& row_id_map, const at::Tensor& weights,
                     const at::Tensor& grad_rows, const std::optional<at::Tensor>& grad_weights) {
  using compute_t = compute_type<scalar_t>;
  fill_rows(grad_rows, [&](bool* filled) {
    if (row_id_map.numel() == 0) return;
    GatherBackward<scalar_t> b{make_slot_rows<scalar_t>(rows ? *rows : grad_rows, row_id_map),
                               grad.const_data_ptr<scalar_t>(),
                               grad.stride(0),
                               RowWeights<scalar_t>(weights),
                               grad_rows.mutable_data_ptr<scalar_t>(),
                               filled,
                               nullptr,
                               nullptr};
    if (!rows) b.slots.rows = nullptr;
    if (grad_weights) {
      if (grad_weights->scalar_type() == c10::CppTypeToScalarType<compute_t>::value) {
        b.wide_grad_weights = grad_weights->mutable_data_ptr<compute_t>();
      } else {
        b.narrow_grad_weights = grad_weights->mutable_data_ptr<scalar_t>();
      }
    }
    const auto run = [&](auto size) {
      launch(moe_gather_rows_backward_kernel<scalar_t, size>,
             ceil_div(row_id_map.numel(), kThreads / kWarpSize), kThreads, 0,
             c10::cuda::getCurrentCUDAStream(), b);
    };
    const bool whole = has_whole_pieces(grad) && has_whole_pieces(grad_rows);
    if (whole && (!rows || has_whole_pieces(*rows))) {
      run(std::integral_constant<int, kPieceSize<scalar_t>>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

void moe_scatter_rows_cuda(const at::Tensor& x, const at::Tensor& row_id_map,
                           const std::optional<at::Tensor>& weights, const at::Tensor& rows) {
  if (rows.numel() == 0) return;
  const c10::DeviceGuard guard(rows.device());
  if (!weights) return scatter_bytes(x, row_id_map, rows);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, rows.scalar_type(), "moe_scatter_rows_cuda", [&] {
        gather_backward<scalar_t>(x, std::nullopt, row_id_map, *weights, rows, std::nullopt);
      });
}

void moe_gather_rows_cuda(const at::Tensor& rows, const at::Tensor& row_id_map,
                          const std::optional<at::Tensor>& weights, const at::Tensor& out) {
  if (out.numel() == 0) return;
  const c10::DeviceGuard guard(out.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(),
                                  "moe_gather_rows_cuda",
                                  [&] { gather<scalar_t>(rows, row_id_map, weights, out); });
}

void moe_gather_rows_backward_cuda(const at::Tensor& grad, const at::Tensor& rows,
                                   const at::Tensor& row_id_map, const at::Tensor& weights,
                                   const at::Tensor& grad_rows, const at::Tensor& grad_weights) {
  const c10::DeviceGuard guard(grad.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad.scalar_type(), "moe_gather_rows_backward_cuda",
      [&] { gather_backward<scalar_t>(grad, rows, row_id_map, weights, grad_rows, grad_weights); });
}

}  // namespace equipoise
