// SPDX-License-Identifier: Apache-2.0
// Row movement on the CPU: types, threads and memory advice around ../cpu/moe_rows.cpp.
#include "moe_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/moe_rows.h"
#include "../huge_pages.h"
#include "../optional_tensor.h"

EQUIPOISE_DECLARE_CPU_KERNEL(void copy_rows(const MoeRows<uint8_t, uint8_t>&, int64_t, int64_t);
                             template <typename scalar_t, typename weight_t>
                             void scatter_rows(const MoeRows<scalar_t, weight_t>&, int64_t,
                                               int64_t);
                             template <typename scalar_t, typename weight_t>
                             void gather_rows(const MoeRows<scalar_t, weight_t>&, int64_t, int64_t,
                                              int64_t*))

namespace equipoise {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Tokens that are worth a thread of their own.
int64_t grain(int64_t top_k, int64_t width) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, top_k * width));
}

/// Calls f(scalar_t{}, weight_t{}) for the types of the rows and of the weights (float64 rows take
/// float64 weights; half rows take float32 ones or their own type).
template <typename F>
void dispatch(at::ScalarType rows, std::optional<at::ScalarType> weights, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows, "moe_rows", [&] {
    using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    if (weights && *weights == rows) {
      f(scalar_t{}, scalar_t{});
    } else {
      f(scalar_t{}, compute_t{});
    }
  });
}

/// A result from this size on is written past the caches: it would not stay there until it is read,
/// and a plain store reads each line before it writes. Measured: smaller ones lose by it.
constexpr size_t kStreamBytes = size_t{32} << 20;
/// Shorter rows must be whole cache lines for that: the lines where others end and begin cost more
/// than the lines between them save.
constexpr int64_t kLineBytes = 64, kLongRowBytes = 2048;

bool is_streamed(const Tensor& rows) {
  const int64_t bytes = rows.size(1) * rows.element_size();
  return rows.nbytes() >= kStreamBytes && (bytes >= kLongRowBytes || bytes % kLineBytes == 0);
}

/// Calls move(begin, end) on runs of tokens, in parallel, to fill the rows that `map` names; zeroes
/// the others.
template <typename Move>
void fill_rows(const Tensor& map, const Tensor& rows, const Move& move) {
  const int64_t top_k = map.size(1), num_rows = rows.size(0), width = rows.size(1);
  const int64_t* to = map.const_data_ptr<int64_t>();
  int64_t num_filled = 0;
  for (int64_t slot = 0; slot < map.numel(); ++slot)
    num_filled += ~static_cast<uint64_t>(to[slot]) >> 63;
  std::vector<char> filled(num_filled == num_rows ? 0 : num_rows);  // most often all are
  advise_huge_pages(rows);
  at::parallel_for(0, map.size(0), grain(top_k, width), [&](int64_t begin, int64_t end) {
    move(begin, end);
    if (filled.empty()) return;
    for (int64_t slot = begin * top_k; slot < end * top_k; ++slot) {
      if (to[slot] >= 0) filled[to[slot]] = 1;
    }
  });
  if (filled.empty() || width == 0) return;
  auto* out = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t bytes = width * rows.element_size();
  at::parallel_for(0, num_rows, grain(1, width), [&](int64_t begin, int64_t end) {
    while (begin < end) {  // neighbours at once: memset knows best how to write much
      begin = std::find(filled.begin() + begin, filled.begin() + end, 0) - filled.begin();
      const int64_t next =
          std::find(filled.begin() + begin, filled.begin() + end, 1) - filled.begin();
      std::memset(out + begin * bytes, 0, (next - begin) * bytes);
      begin = next;
    }
  });
}

/// `rows` and `dots` may be absent: the scatter alone.
void scatter(const Tensor& tokens, const OptionalTensor& rows, const Tensor& row_id_map,
             const Tensor& weights_in, const Tensor& out, const OptionalTensor& dots) {
  const auto map = row_id_map.contiguous(), weights = weights_in.contiguous();
  dispatch(out.scalar_type(), weights.scalar_type(), [&](auto scalar, auto weight) {
    using scalar_t = decltype(scalar);
    using weight_t = decltype(weight);
    const cpu::MoeRows<scalar_t, weight_t> move{
        .tokens = tokens.const_data_ptr<scalar_t>(),
        .token_stride = tokens.stride(0),
        .rows = data_or_null<scalar_t>(rows),
        .row_stride = rows ? rows->stride(0) : 0,
        .map = map.const_data_ptr<int64_t>(),
        .weights = weights.const_data_ptr<weight_t>(),
        .out = out.mutable_data_ptr<scalar_t>(),
        .dots = dots ? dots->mutable_data_ptr<weight_t>() : nullptr,
        .top_k = map.size(1),
        .width = out.size(1),
        .stream = is_streamed(out),
    };
    fill_rows(map, out, [&](int64_t begin, int64_t end) {
      EQUIPOISE_CALL_CPU_KERNEL(scatter_rows, move, begin, end);
    });
  });
}

}  // namespace

void moe_scatter_rows_cpu(const Tensor& tokens, const Tensor& row_id_map,
                          const OptionalTensor& weights, const Tensor& rows) {
  if (weights) return scatter(tokens, std::nullopt, row_id_map, *weights, rows, std::nullopt);
  const auto map = row_id_map.contiguous();
  const cpu::MoeRows<uint8_t, uint8_t> move{
      .tokens = static_cast<const uint8_t*>(tokens.const_data_ptr()),
      .token_stride = tokens.stride(0) * tokens.element_size(),
      .rows = nullptr,
      .row_stride = 0,
      .map = map.const_data_ptr<int64_t>(),
      .weights = nullptr,
      .out = static_cast<uint8_t*>(rows.mutable_data_ptr()),
      .dots = nullptr,
      .top_k = map.size(1),
      .width = rows.size(1) * rows.element_size(),
      .stream = is_streamed(rows),
  };
  fill_rows(map, rows, [&](int64_t begin, int64_t end) {
    EQUIPOISE_CALL_CPU_KERNEL(copy_rows, move, begin, end);
  });
}

void moe_gather_rows_cpu(const Tensor& rows, const Tensor& row_id_map,
                         const OptionalTensor& weights_in, const Tensor& out) {
  const auto map = row_id_map.contiguous();
  const auto weights = contiguous(weights_in);
  const int64_t top_k = map.size(1), width = out.size(1);
  advise_huge_pages(out);
  dispatch(rows.scalar_type(), weights ? std::optional(weights->scalar_type()) : std::nullopt,
           [&](auto scalar, auto weight) {
             using scalar_t = decltype(scalar);
             using weight_t = decltype(weight);
             const cpu::MoeRows<scalar_t, weight_t> move{
                 .tokens = nullptr,
                 .token_stride = 0,
                 .rows = rows.const_data_ptr<scalar_t>(),
                 .row_stride = rows.stride(0),
                 .map = map.const_data_ptr<int64_t>(),
                 .weights = data_or_null<weight_t>(weights),
                 .out = out.mutable_data_ptr<scalar_t>(),
                 .dots = nullptr,
                 .top_k = top_k,
                 .width = width,
                 .stream = false,
             };
             at::parallel_for(0, map.size(0), grain(top_k, width), [&](int64_t begin, int64_t end) {
               std::vector<int64_t> listed(top_k);
               EQUIPOISE_CALL_CPU_KERNEL(gather_rows, move, begin, end, listed.data());
             });
           });
}

void moe_gather_rows_backward_cpu(const Tensor& grad, const Tensor& rows, const Tensor& row_id_map,
                                  const Tensor& weights, const Tensor& grad_rows,
                                  const Tensor& grad_weights) {
  scatter(grad, rows, row_id_map, weights, grad_rows, grad_weights);
}

}  // namespace equipoise
