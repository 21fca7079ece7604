// SPDX-License-Identifier: Apache-2.0
// balance_loss on CUDA: formulas in ../csrc/ops/balance_loss_terms.h. A block takes a segment and
// reads its 2 E + 5 sums, forward and backward; forward, the last block to arrive adds up the
// segments. All in a fixed order.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "../csrc/ops/balance_loss_arguments.h"
#include "block.cuh"
#include "host.h"
#include "launch.cuh"
#include "rows.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxLosses = 32;

template <typename scalar_t>
struct Losses {
  BalanceLossKind kinds[kMaxLosses];
  int count;
  const float* coefficients;  // [count]
  SegmentSums<scalar_t> first;
};

// What balance_loss_terms.h calls `sum` and `each`, of one block.
struct BlockSum {
  template <typename F>
  __device__ double operator()(int64_t count, const F& f) const {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += f(i);
    return block_reduce(sum, Sum{});
  }
};
struct BlockEach {
  template <typename F>
  __device__ void operator()(int64_t count, const F& f) const {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) f(i);
    __syncthreads();  // the next loss may come to the same place with another thread
  }
};

template <typename scalar_t>
__device__ SegmentSums<scalar_t> segment_of_block(const Losses<scalar_t>& losses) {
  auto segment = losses.first;
  segment.sums += blockIdx.x * RoutingSums::width(segment.experts);
  return segment;
}

// segment_values [S, count] is scratch; ticket is zero where there are several segments.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    balance_loss_kernel(const Losses<scalar_t> losses, double* segment_values, unsigned* ticket,
                        scalar_t* total, scalar_t* values) {
  const auto segment = segment_of_block(losses);
  const auto totals = segment_totals(losses.first, gridDim.x, BlockSum{});
  for (int l = 0; l < losses.count; ++l) {
    const double part = part_of_loss(losses.kinds[l], blockIdx.x, segment, totals);
    double value = 0;
    if (part > 0) value = part * loss_value(losses.kinds[l], segment, BlockSum{});
    if (threadIdx.x == 0) segment_values[blockIdx.x * losses.count + l] = value;
  }
  if (gridDim.x > 1 && !last_to_arrive(ticket, gridDim.x)) return;
  __syncthreads();  // with a single block its values are not yet seen by all
  double sum = 0;
  for (int l = 0; l < losses.count; ++l) {
    const double value =
        BlockSum{}(gridDim.x, [&](int64_t s) { return segment_values[s * losses.count + l]; });
    sum += losses.coefficients[l] * value;
    if (threadIdx.x == 0) values[l] = static_cast<scalar_t>(value);
  }
  if (threadIdx.x == 0) *total = static_cast<scalar_t>(sum);
}

// grad_gate_sums is null where there are none.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    balance_loss_backward_kernel(const Losses<scalar_t> losses, const scalar_t* grad_total,
                                 const scalar_t* grad_values, scalar_t* grad_sums,
                                 scalar_t* grad_gate_sums) {
  const auto segment = segment_of_block(losses);
  const auto totals = segment_totals(losses.first, gridDim.x, BlockSum{});
  const int64_t width = RoutingSums::width(segment.experts);
  scalar_t* grad_of_segment = grad_sums + blockIdx.x * width;
  BlockEach{}(width, [&](int64_t i) { grad_of_segment[i] = 0; });
  if (grad_gate_sums != nullptr && blockIdx.x == 0) {
    BlockEach{}(segment.experts, [&](int64_t e) { grad_gate_sums[e] = 0; });
  }
  for (int l = 0; l < losses.count; ++l) {
    const double part = part_of_loss(losses.kinds[l], blockIdx.x, segment, totals);
    if (part == 0) continue;
    double grad = grad_values == nullptr ? 0.0 : grad_values[l];
    if (grad_total != nullptr) grad += *grad_total * static_cast<double>(losses.coefficients[l]);
    add_loss_gradient(losses.kinds[l], segment, grad * part, BlockSum{}, BlockEach{},
                      grad_of_segment, grad_gate_sums);
  }
}

template <typename scalar_t>
Losses<scalar_t> make_losses(const BalanceLossArguments& arguments) {
  TORCH_CHECK(arguments.kinds.size() <= kMaxLosses, "balance_loss: at most ", kMaxLosses,
              " losses are allowed, got ", arguments.kinds.size());
  Losses<scalar_t> losses{};
  for (size_t i = 0; i < arguments.kinds.size(); ++i) {
    losses.kinds[i] = BalanceLossKind{arguments.kinds[i]};
  }
  losses.count = static_cast<int>(arguments.kinds.size());
  losses.coefficients = arguments.coefficients.const_data_ptr<float>();
  losses.first = arguments.first_segment<scalar_t>();
  return losses;
}

}  // namespace

void balance_loss_cuda(const BalanceLossArguments& arguments, const at::Tensor& total,
                       const at::Tensor& values) {
  const c10::DeviceGuard guard(arguments.sums.device());
  const int64_t segments = arguments.sums.size(0);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  // The values of the segments, and a ticket behind them.
  const auto workspace = values.new_empty({segments * values.size(0) + 1}, at::kDouble);
  auto* segment_values = workspace.mutable_data_ptr<double>();
  auto* ticket = reinterpret_cast<unsigned*>(segment_values + segments * values.size(0));
  if (segments > 1) C10_CUDA_CHECK(cudaMemsetAsync(ticket, 0, sizeof(unsigned), stream));
  AT_DISPATCH_FLOATING_TYPES(arguments.sums.scalar_type(), "balance_loss_cuda", [&] {
    launch(balance_loss_kernel<scalar_t>, segments, kThreads, 0, stream,
           make_losses<scalar_t>(arguments), segment_values, ticket,
           total.mutable_data_ptr<scalar_t>(), values.mutable_data_ptr<scalar_t>());
  });
}

void balance_loss_backward_cuda(const std::optional<at::Tensor>& grad_total,
                                const std::optional<at::Tensor>& grad_values,
                                const BalanceLossArguments& arguments, const at::Tensor& grad_sums,
                                const at::Tensor& grad_gate_sums) {
  const c10::DeviceGuard guard(arguments.sums.device());
  AT_DISPATCH_FLOATING_TYPES(arguments.sums.scalar_type(), "balance_loss_backward_cuda", [&] {
    launch(balance_loss_backward_kernel<scalar_t>, arguments.sums.size(0), kThreads, 0,
           c10::cuda::getCurrentCUDAStream(), make_losses<scalar_t>(arguments),
           pointer_or_null<scalar_t>(grad_total), pointer_or_null<scalar_t>(grad_values),
           grad_sums.mutable_data_ptr<scalar_t>(),
           arguments.gate_sums ? grad_gate_sums.mutable_data_ptr<scalar_t>() : nullptr);
  });
}

}  // namespace equipoise
