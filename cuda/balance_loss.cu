// SPDX-License-Identifier: Apache-2.0
// balance_loss on CUDA: formulas in ../csrc/ops/balance_loss.h. One block reads the 2 E + 5 sums
// once, forward and backward; what a loss needs of them all is added up in a fixed order.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../csrc/ops/balance_loss.h"
#include "../csrc/ops/routing_sums.h"
#include "block.cuh"
#include "host.h"
#include "launch.cuh"
#include "rows.cuh"

namespace equipoise {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxLosses = 32;

template <typename compute_t>
struct Losses {
  BalanceLossKind kinds[kMaxLosses];  // another value: 0
  int count;
  const float* coefficients;  // [count]
  // The parts of `sums`.
  const compute_t* prob_sum;  // [E]
  const compute_t* load;      // [E]
  const compute_t* num_tokens;
  const compute_t* lse_squared;
  int64_t experts;
  compute_t top_k;
};

// 1 / W, or 0 without tokens, where every loss is 0.
template <typename compute_t>
__device__ compute_t per_token(const Losses<compute_t>& losses) {
  return *losses.num_tokens > 0 ? 1 / *losses.num_tokens : compute_t(0);
}

// What makes E f_e of a load; 0 with a single expert, which cannot be out of balance.
template <typename compute_t>
__device__ compute_t per_load(const Losses<compute_t>& losses) {
  return losses.experts > 1 ? losses.experts * per_token(losses) / losses.top_k : compute_t(0);
}

template <typename compute_t>
__global__ void __launch_bounds__(kThreads)
    balance_loss_kernel(const Losses<compute_t> losses, compute_t* total, compute_t* values) {
  const compute_t scale = per_token(losses), slope = per_load(losses);
  compute_t switch_value = 0;
  for (int64_t e = threadIdx.x; e < losses.experts; e += kThreads) {
    switch_value += slope * losses.load[e] * (losses.prob_sum[e] * scale);
  }
  switch_value = block_reduce(switch_value, Sum{});
  if (threadIdx.x > 0) return;
  compute_t sum = 0;
  for (int i = 0; i < losses.count; ++i) {
    compute_t value = 0;
    if (losses.kinds[i] == BalanceLossKind::kSwitch) value = switch_value;
    if (losses.kinds[i] == BalanceLossKind::kZ) value = *losses.lse_squared * scale;
    values[i] = value;
    sum += losses.coefficients[i] * value;
  }
  *total = sum;
}

// grad_prob_sum and grad_lse_squared are parts of grad_sums, whose other parts are zero.
template <typename compute_t>
__global__ void __launch_bounds__(kThreads)
    balance_loss_backward_kernel(const Losses<compute_t> losses, const compute_t* grad_total,
                                 const compute_t* grad_values, compute_t* grad_sums, int64_t width,
                                 compute_t* grad_prob_sum, compute_t* grad_lse_squared) {
  const compute_t scale = per_token(losses), slope = per_load(losses);
  compute_t grad_switch = 0, grad_z = 0;
  for (int i = 0; i < losses.count; ++i) {
    compute_t grad = grad_values == nullptr ? compute_t(0) : grad_values[i];
    if (grad_total != nullptr) grad += *grad_total * losses.coefficients[i];
    if (losses.kinds[i] == BalanceLossKind::kSwitch) grad_switch += grad;
    if (losses.kinds[i] == BalanceLossKind::kZ) grad_z += grad;
  }
  for (int64_t i = threadIdx.x; i < width; i += kThreads) grad_sums[i] = 0;
  __syncthreads();
  for (int64_t e = threadIdx.x; e < losses.experts; e += kThreads) {
    grad_prob_sum[e] = grad_switch * scale * (slope * losses.load[e]);
  }
  if (threadIdx.x == 0) *grad_lse_squared = grad_z * scale;
}

template <typename compute_t>
Losses<compute_t> make_losses(const at::Tensor& sums, const at::Tensor& coefficients,
                              const std::vector<int64_t>& kinds, int64_t top_k) {
  TORCH_CHECK(kinds.size() <= kMaxLosses, "balance_loss: at most ", kMaxLosses,
              " losses are allowed, got ", kinds.size());
  const auto* from = sums.const_data_ptr<compute_t>();
  const int64_t experts = (sums.size(0) - RoutingSums::kTail) / 2;
  Losses<compute_t> losses{};
  for (size_t i = 0; i < kinds.size(); ++i) losses.kinds[i] = BalanceLossKind{kinds[i]};
  losses.count = static_cast<int>(kinds.size());
  losses.coefficients = coefficients.const_data_ptr<float>();
  losses.prob_sum = from + RoutingSums::prob;
  losses.load = from + RoutingSums::load(experts);
  losses.num_tokens = from + RoutingSums::weight(experts);
  losses.lse_squared = from + RoutingSums::lse_squared(experts);
  losses.experts = experts;
  losses.top_k = static_cast<compute_t>(top_k);
  return losses;
}

}  // namespace

void balance_loss_cuda(const at::Tensor& sums, const at::Tensor& coefficients,
                       const std::vector<int64_t>& kinds, int64_t top_k, const at::Tensor& total,
                       const at::Tensor& values) {
  const c10::cuda::CUDAGuard guard(sums.device());
  AT_DISPATCH_FLOATING_TYPES(sums.scalar_type(), "balance_loss_cuda", [&] {
    launch(balance_loss_kernel<scalar_t>, 1, kThreads, 0, c10::cuda::getCurrentCUDAStream(),
           make_losses<scalar_t>(sums, coefficients, kinds, top_k),
           total.mutable_data_ptr<scalar_t>(), values.mutable_data_ptr<scalar_t>());
  });
}

void balance_loss_backward_cuda(const std::optional<at::Tensor>& grad_total,
                                const std::optional<at::Tensor>& grad_values,
                                const at::Tensor& sums, const at::Tensor& coefficients,
                                const std::vector<int64_t>& kinds, int64_t top_k,
                                const at::Tensor& grad_sums) {
  const c10::cuda::CUDAGuard guard(sums.device());
  AT_DISPATCH_FLOATING_TYPES(sums.scalar_type(), "balance_loss_backward_cuda", [&] {
    const auto losses = make_losses<scalar_t>(sums, coefficients, kinds, top_k);
    auto* to = grad_sums.mutable_data_ptr<scalar_t>();
    launch(balance_loss_backward_kernel<scalar_t>, 1, kThreads, 0,
           c10::cuda::getCurrentCUDAStream(), losses, pointer_or_null<scalar_t>(grad_total),
           pointer_or_null<scalar_t>(grad_values), to, grad_sums.size(0), to + RoutingSums::prob,
           to + RoutingSums::lse_squared(losses.experts));
  });
}

}  // namespace equipoise
