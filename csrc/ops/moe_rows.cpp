// SPDX-License-Identifier: Apache-2.0
// Row movement on the CPU: types, threads and memory advice around ../cpu/moe_rows.cpp.
#include "moe_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/moe_rows.h"
#include "../huge_pages.h"
#include "../optional_tensor.h"

EQUIPOISE_DECLARE_CPU_KERNEL(template <typename scalar_t, typename weight_t>
                             void scatter_rows(const MoeRows<scalar_t, weight_t>&, int64_t,
                                               int64_t);
                             template <typename scalar_t, typename weight_t>
                             void gather_rows(const MoeRows<scalar_t, weight_t>&, int64_t, int64_t);
                             template <typename scalar_t, typename weight_t>
                             void dot_rows(const MoeRows<scalar_t, weight_t>&, int64_t, int64_t))

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

}  // namespace

void moe_scatter_rows_cpu(const Tensor& tokens, const Tensor& row_id_map,
                          const OptionalTensor& weights_in, const Tensor& rows) {
  const int64_t num_tokens = row_id_map.size(0), top_k = row_id_map.size(1), width = rows.size(1);
  const int64_t num_rows = rows.size(0);
  const auto map = row_id_map.contiguous();
  const auto weights = contiguous(weights_in);
  const int64_t* to = map.const_data_ptr<int64_t>();
  advise_huge_pages(rows);
  dispatch(rows.scalar_type(), weights ? std::optional(weights->scalar_type()) : std::nullopt,
           [&](auto scalar, auto weight) {
             using scalar_t = decltype(scalar);
             using weight_t = decltype(weight);
             auto* out = rows.mutable_data_ptr<scalar_t>();
             const cpu::MoeRows<scalar_t, weight_t> move{tokens.const_data_ptr<scalar_t>(),
                                                         tokens.stride(0),
                                                         nullptr,
                                                         to,
                                                         data_or_null<weight_t>(weights),
                                                         out,
                                                         nullptr,
                                                         top_k,
                                                         width};
             at::parallel_for(0, num_tokens, grain(top_k, width), [&](int64_t begin, int64_t end) {
               EQUIPOISE_CALL_CPU_KERNEL(scatter_rows, move, begin, end);
             });
             std::vector<char> filled(num_rows);
             for (int64_t slot = 0; slot < map.numel(); ++slot) {
               if (to[slot] >= 0) filled[to[slot]] = 1;
             }
             at::parallel_for(0, num_rows, grain(1, width), [&](int64_t begin, int64_t end) {
               for (int64_t row = begin; row < end; ++row) {
                 if (!filled[row]) std::fill_n(out + row * width, width, scalar_t(0));
               }
             });
           });
}

void moe_gather_rows_cpu(const Tensor& rows_in, const Tensor& row_id_map,
                         const OptionalTensor& weights_in, const Tensor& out) {
  const int64_t num_tokens = row_id_map.size(0), top_k = row_id_map.size(1),
                width = rows_in.size(1);
  const auto map = row_id_map.contiguous(), rows = rows_in.contiguous();
  const auto weights = contiguous(weights_in);
  advise_huge_pages(out);
  dispatch(rows.scalar_type(), weights ? std::optional(weights->scalar_type()) : std::nullopt,
           [&](auto scalar, auto weight) {
             using scalar_t = decltype(scalar);
             using weight_t = decltype(weight);
             const cpu::MoeRows<scalar_t, weight_t> move{nullptr,
                                                         0,
                                                         rows.const_data_ptr<scalar_t>(),
                                                         map.const_data_ptr<int64_t>(),
                                                         data_or_null<weight_t>(weights),
                                                         out.mutable_data_ptr<scalar_t>(),
                                                         nullptr,
                                                         top_k,
                                                         width};
             at::parallel_for(0, num_tokens, grain(top_k, width), [&](int64_t begin, int64_t end) {
               EQUIPOISE_CALL_CPU_KERNEL(gather_rows, move, begin, end);
             });
           });
}

void moe_dot_rows_cpu(const Tensor& tokens_in, const Tensor& rows_in, const Tensor& row_id_map,
                      const Tensor& out) {
  const int64_t num_tokens = row_id_map.size(0), top_k = row_id_map.size(1),
                width = rows_in.size(1);
  const auto map = row_id_map.contiguous(), rows = rows_in.contiguous(),
             tokens = tokens_in.contiguous();
  dispatch(rows.scalar_type(), out.scalar_type(), [&](auto scalar, auto weight) {
    using scalar_t = decltype(scalar);
    using weight_t = decltype(weight);
    const cpu::MoeRows<scalar_t, weight_t> move{
        tokens.const_data_ptr<scalar_t>(), width,   rows.const_data_ptr<scalar_t>(),
        map.const_data_ptr<int64_t>(),     nullptr, nullptr,
        out.mutable_data_ptr<weight_t>(),  top_k,   width};
    at::parallel_for(0, num_tokens, grain(top_k, width), [&](int64_t begin, int64_t end) {
      EQUIPOISE_CALL_CPU_KERNEL(dot_rows, move, begin, end);
    });
  });
}

}  // namespace equipoise
