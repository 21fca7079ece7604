// SPDX-License-Identifier: Apache-2.0
// topk_gating on CUDA, backward: the gradients of the gate and of every loss in one read of the
// logits and one write of grad_logits. With a, g_z, g_H the gradients of prob_sum, sum w lse^2 and
// sum w H, and g_lse that of lse:
//
//   dx_e = gate_e + p_e (w (a_e - sum_j a_j p_j + 2 g_z lse - g_H (log p_e + H)) + g_lse)
//
// p is exp(x - lse); a large lse was rounded when it was stored, so p is divided by its sum, which
// is 1 but for that. Threads as in topk_gating.cu: a team of lanes per row, else a block.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>

#include "../csrc/ops/routing_sums.h"
#include "block.cuh"
#include "host.h"
#include "launch.cuh"
#include "rows.cuh"
#include "topk_gating.cuh"
#include "warp.cuh"

namespace equipoise {
namespace {

using namespace gating;

template <typename scalar_t>
struct Backward : Rows<scalar_t> {
  using compute_t = compute_type<scalar_t>;
  const int64_t* topk_indices;
  const compute_t* lse;
  const compute_t* grad_weights;
  const compute_t* grad_lse;
  const compute_t* grad_prob_sum;   // [E]; null without gradients of the sums, as is the tail
  const compute_t* grad_sums_tail;  // [kTailSize]
  scalar_t* grad_logits;
  int64_t grad_stride;
  bool grad_aligned;

  // Whether every p of a row is needed; a renormalised gate needs those of the chosen experts
  // alone.
  __device__ bool is_dense() const {
    return grad_lse != nullptr || grad_prob_sum != nullptr ||
           (grad_weights != nullptr && !this->norm_topk_prob);
  }
};

// The gate's gradient for this lane's experts. It goes from the lane that has slot k to the lane
// that has its expert through `row`, one per team in shared memory, which is and stays zero between
// calls. Renormalised weights are c r, r the softmax of the chosen logits: the gradient for the
// logits is c r (g - sum g r). Otherwise they are c p: the gradient for p is c g.
template <typename Team, typename scalar_t, int kItems = Team::kItems>
__device__ void gate_gradient(const Backward<scalar_t>& b, int64_t token, bool active, float* row,
                              float (&gate)[kItems]) {
  constexpr int kLanes = Team::kLanes;
  const int64_t* experts = b.topk_indices + token * b.top_k;
  const float* grad = b.grad_weights + token * b.top_k;
  const int top_k = active ? b.top_k : 0;
  const auto is_chosen = [&](int k) { return experts[k] >= 0 && experts[k] < b.experts; };
  const auto logit = [&](int k) {
    return is_chosen(k) ? clean(static_cast<float>(b.row(token)[experts[k]])) : -INFINITY;
  };
  if (b.norm_topk_prob) {
    float peak = -INFINITY, sum = 0, dot = 0;
#pragma unroll 1
    for (int k = Team::lane(); k < top_k; k += kLanes) peak = fmaxf(peak, logit(k));
    peak = finite_shift(team_reduce<kLanes>(peak, Max{}));
#pragma unroll 1
    for (int k = Team::lane(); k < top_k; k += kLanes) {
      const float numerator = std::exp(logit(k) - peak);
      sum += numerator;
      dot += numerator * grad[k];
    }
    const float inverse_sum = reciprocal_or_zero(team_reduce<kLanes>(sum, Sum{}));
    dot = team_reduce<kLanes>(dot, Sum{}) * inverse_sum;
#pragma unroll 1
    for (int k = Team::lane(); k < top_k; k += kLanes) {
      const float r = std::exp(logit(k) - peak) * inverse_sum;
      if (is_chosen(k)) row[experts[k]] = b.scaling_factor * r * (grad[k] - dot);
    }
  } else {
#pragma unroll 1
    for (int k = Team::lane(); k < top_k; k += kLanes) {
      if (is_chosen(k)) row[experts[k]] = b.scaling_factor * grad[k];
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kItems; i += kPieceSize<float>) {
    float* from = row + Team::first_expert() + i;
    const auto piece = Piece<float>::load(from);
    Piece<float>{}.store(from);
#pragma unroll
    for (int j = 0; j < kPieceSize<float>; ++j) gate[i + j] = piece.values[j];
  }
  __syncwarp();
}

template <typename scalar_t, typename Team>
__global__ void __launch_bounds__(kThreads)
    topk_gating_backward_team_kernel(const Backward<scalar_t> b) {
  constexpr int kLanes = Team::kLanes, kItems = Team::kItems;
  constexpr int kSize = kPieceSize<scalar_t>;
  float* gate_row = reinterpret_cast<float*>(shared_memory) + Team::number() * Team::kExperts;
#pragma unroll
  for (int i = 0; i < kItems; i += kPieceSize<float>) {
    Piece<float>{}.store(gate_row + Team::first_expert() + i);
  }
  __syncwarp();

  const bool dense = b.is_dense();
  float grad_prob[kItems] = {}, grad_lse_squared = 0, grad_entropy = 0;
  if (b.grad_prob_sum != nullptr) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = Team::first_expert() + i;
      if (e < b.experts) grad_prob[i] = b.grad_prob_sum[e];
    }
    grad_lse_squared = b.grad_sums_tail[kLseSquared];
    grad_entropy = b.grad_sums_tail[kEntropy];
  }
  for (int64_t first = blockIdx.x * int64_t{Team::kTeams}; first < b.tokens;
       first += gridDim.x * int64_t{Team::kTeams}) {
    const int64_t token = first + Team::number();
    const bool exists = token < b.tokens;
    bool invalid = false;
    const float token_weight = exists ? b.weight(token, &invalid) : 0.f;
    const bool active = token_weight > 0;
    float x[kItems];
    if (dense && active) {
      load_logits(b, token, Team::first_expert(), x);
    } else {
#pragma unroll
      for (float& value : x) value = -INFINITY;
    }
#pragma unroll
    for (float& value : x) value = clean(value);

    float lse = 0;
    if (dense && b.lse != nullptr) {
      lse = active ? b.lse[token] : 0.f;
    } else if (dense) {
      float peak = -INFINITY, sum = 0;
#pragma unroll
      for (const float value : x) peak = fmaxf(peak, value);
      peak = finite_shift(team_reduce<kLanes>(peak, Max{}));
#pragma unroll
      for (const float value : x) sum += std::exp(value - peak);
      sum = team_reduce<kLanes>(sum, Sum{});
      lse = sum > 0 ? peak + std::log(sum) : 0.f;
    }

    float gate[kItems] = {};  // of the logits if renormalised, else of p
    if (b.grad_weights != nullptr) gate_gradient<Team>(b, token, active, gate_row, gate);
    const bool gate_is_for_p = !b.norm_topk_prob;

    if (dense) {
      // dx = p (a - sum a p) + ... with a the gradient for p, of the sums and (without
      // renormalisation) of the gate.
      float p[kItems], sum = 0, dot = 0, descent = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        p[i] = std::exp(x[i] - lse);
        sum += p[i];
        dot += p[i] * (token_weight * grad_prob[i] + (gate_is_for_p ? gate[i] : 0.f));
        if (p[i] > 0) descent += p[i] * (lse - x[i]);
      }
      sum = team_reduce<kLanes>(sum, Sum{});
      const float inverse_sum = reciprocal_or_zero(sum);
      const float log_sum = sum > 0 ? std::log(sum) : 0.f;
      dot = team_reduce<kLanes>(dot, Sum{}) * inverse_sum;
      const float entropy = team_reduce<kLanes>(descent, Sum{}) * inverse_sum + log_sum;
      const float grad_lse = b.grad_lse != nullptr && active ? b.grad_lse[token] : 0.f;
      const float common =
          grad_lse - dot + token_weight * (2 * grad_lse_squared * lse - grad_entropy * entropy);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float log_p = x[i] - lse - log_sum;
        const float for_p = token_weight * (grad_prob[i] - grad_entropy * log_p) + common;
        const float dx =
            p[i] > 0 ? p[i] * inverse_sum * (for_p + (gate_is_for_p ? gate[i] : 0.f)) : 0.f;
        gate[i] = gate_is_for_p ? dx : gate[i] + dx;
      }
    }

    if (!exists) continue;
    scalar_t* to = b.grad_logits + token * b.grad_stride + Team::first_expert();
    const int count = b.experts - Team::first_expert();
#pragma unroll
    for (int i = 0; i < kItems; i += kSize) {
      Piece<scalar_t> piece;
#pragma unroll
      for (int j = 0; j < kSize; ++j) piece.values[j] = static_cast<scalar_t>(gate[i + j]);
      if (b.grad_aligned && i + kSize <= count) {
        piece.store(to + i);
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          if (i + j < count) to[i + j] = piece.values[j];
        }
      }
    }
  }
}

// Asking for 1 block per multiprocessor keeps ptxas from spilling to fit more of them.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    topk_gating_backward_block_kernel(const Backward<scalar_t> b) {
  using compute_t = compute_type<scalar_t>;
  const bool dense = b.is_dense();
  const bool has_grad_sums = b.grad_prob_sum != nullptr;
  const compute_t grad_lse_squared = has_grad_sums ? b.grad_sums_tail[kLseSquared] : 0;
  const compute_t grad_entropy = has_grad_sums ? b.grad_sums_tail[kEntropy] : 0;
  for (int64_t token = blockIdx.x; token < b.tokens; token += gridDim.x) {
    const scalar_t* row = b.row(token);
    scalar_t* to = b.grad_logits + token * b.grad_stride;
    const int64_t* experts = b.topk_indices + token * b.top_k;
    const compute_t* grad = b.grad_weights == nullptr ? nullptr : b.grad_weights + token * b.top_k;
    const int top_k = grad == nullptr ? 0 : b.top_k;
    const auto is_chosen = [&](int k) { return experts[k] >= 0 && experts[k] < b.experts; };
    const auto logit = [&](int64_t e) { return clean(static_cast<compute_t>(row[e])); };

    bool invalid = false;
    const compute_t token_weight = b.weight(token, &invalid);
    if (token_weight <= 0) {
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) to[e] = scalar_t(0);
      continue;
    }

    compute_t lse = 0;
    if (dense && b.lse != nullptr) {
      lse = b.lse[token];
    } else if (dense) {
      compute_t peak = -INFINITY, sum = 0;
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) peak = Max{}(peak, logit(e));
      peak = finite_shift(block_reduce(peak, Max{}));
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) sum += std::exp(logit(e) - peak);
      sum = block_reduce(sum, Sum{});
      lse = sum > 0 ? peak + std::log(sum) : compute_t(0);
    }

    // p is exp(x - lse) divided by its sum, as in topk_gating_backward_team_kernel.
    compute_t sum = 0, dot = 0, descent = 0;
    if (dense) {
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) {
        const compute_t x = logit(e), numerator = std::exp(x - lse);
        sum += numerator;
        if (has_grad_sums) dot += numerator * token_weight * b.grad_prob_sum[e];
        if (numerator > 0) descent += numerator * (lse - x);
      }
    }
    compute_t chosen_peak = -INFINITY, chosen_scale = 0, chosen_dot = 0;
    if (b.norm_topk_prob) {
      for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        if (is_chosen(k)) chosen_peak = Max{}(chosen_peak, logit(experts[k]));
      }
      chosen_peak = finite_shift(block_reduce(chosen_peak, Max{}));
      compute_t chosen_sum = 0;
      for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        if (!is_chosen(k)) continue;
        const compute_t numerator = std::exp(logit(experts[k]) - chosen_peak);
        chosen_sum += numerator;
        chosen_dot += numerator * grad[k];
      }
      chosen_scale = reciprocal_or_zero(block_reduce(chosen_sum, Sum{}));
      chosen_dot = block_reduce(chosen_dot, Sum{}) * chosen_scale;
    } else {
      for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        if (is_chosen(k)) dot += b.scaling_factor * grad[k] * std::exp(logit(experts[k]) - lse);
      }
    }
    sum = block_reduce(sum, Sum{});
    const compute_t inverse_sum = reciprocal_or_zero(sum);
    const compute_t log_sum = sum > 0 ? std::log(sum) : compute_t(0);
    dot = block_reduce(dot, Sum{}) * inverse_sum;
    const compute_t entropy = block_reduce(descent, Sum{}) * inverse_sum + log_sum;
    const compute_t grad_lse = b.grad_lse == nullptr ? compute_t(0) : b.grad_lse[token];
    const compute_t common =
        grad_lse - dot + token_weight * (2 * grad_lse_squared * lse - grad_entropy * entropy);
    // What an expert gets whether it was chosen or not.
    const auto dense_gradient = [&](int64_t e) {
      if (!dense) return compute_t(0);
      const compute_t log_p = logit(e) - lse - log_sum, p = std::exp(logit(e) - lse) * inverse_sum;
      const compute_t a = has_grad_sums ? b.grad_prob_sum[e] : 0;
      return p > 0 ? p * (common + token_weight * (a - grad_entropy * log_p)) : compute_t(0);
    };

    for (int e = threadIdx.x; e < b.experts; e += blockDim.x) {
      to[e] = static_cast<scalar_t>(dense_gradient(e));
    }
    __syncthreads();  // the chosen ones are written again
    for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
      if (!is_chosen(k)) continue;
      const compute_t x = logit(experts[k]);
      const compute_t gate = b.norm_topk_prob
                                 ? std::exp(x - chosen_peak) * chosen_scale * (grad[k] - chosen_dot)
                                 : std::exp(x - lse) * inverse_sum * grad[k];
      to[experts[k]] = static_cast<scalar_t>(dense_gradient(experts[k]) + b.scaling_factor * gate);
    }
  }
}

// ---- host --------------------------------------------------------------------------------------

template <typename scalar_t>
void backward(const TopKGatingBackwardArguments& arguments, const at::Tensor& grad_logits) {
  using compute_t = compute_type<scalar_t>;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  Backward<scalar_t> b{make_rows<scalar_t>(arguments, arguments.topk_indices.size(1))};
  b.topk_indices = arguments.topk_indices.const_data_ptr<int64_t>();
  b.lse = pointer_or_null<compute_t>(arguments.lse);
  b.grad_weights = pointer_or_null<compute_t>(arguments.grad_weights);
  b.grad_lse = pointer_or_null<compute_t>(arguments.grad_lse);
  if (arguments.grad_sums.has_value()) {
    const auto* sums = arguments.grad_sums->const_data_ptr<compute_t>();
    b.grad_prob_sum = sums + RoutingSums::prob;
    b.grad_sums_tail = sums + RoutingSums::weight(b.experts);
  }
  b.grad_logits = grad_logits.mutable_data_ptr<scalar_t>();
  b.grad_stride = grad_logits.stride(0);
  b.grad_aligned = has_aligned_rows(grad_logits);

  constexpr int64_t kMaxBackwardBlocks = 2048;
  if constexpr (!std::is_same_v<scalar_t, double>) {
    if (fits_team(b)) {
      with_team(b.experts, [&](auto team) {
        using Team = decltype(team);
        const int64_t blocks = std::min(ceil_div(b.tokens, Team::kTeams), kMaxBackwardBlocks);
        const int64_t gate_bytes = Team::kTeams * Team::kExperts * sizeof(float);
        launch(topk_gating_backward_team_kernel<scalar_t, Team>, blocks, kThreads, gate_bytes,
               stream, b);
      });
      return;
    }
  }
  const int64_t blocks = std::min(b.tokens, kMaxBackwardBlocks);
  launch(topk_gating_backward_block_kernel<scalar_t>, blocks, block_threads(b.experts), 0, stream,
         b);
}

}  // namespace

void topk_gating_backward_cuda(const TopKGatingBackwardArguments& arguments,
                               const at::Tensor& grad_logits) {
  if (grad_logits.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(grad_logits.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad_logits.scalar_type(),
                                  "topk_gating_backward_cuda",
                                  [&] { backward<scalar_t>(arguments, grad_logits); });
}

}  // namespace equipoise
