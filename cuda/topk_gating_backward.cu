// SPDX-License-Identifier: Apache-2.0
// topk_gating on CUDA, backward: the gradients of the gate and of every loss in one read of the
// logits and one write of grad_logits. With y the logarithms of the scores, phi = dy/dx, p =
// softmax(y), q = softmax(x), with a, g_z, g_H the gradients of prob_sum, sum w lse^2 and sum w H,
// and g_lse that of lse:
//
//   dx_e = gate_e + phi_e w p_e (a_e - sum_j a_j p_j - g_H (log p_e + H))
//                 + q_e (g_lse + 2 g_z w lse)
//
// p = q is exp(x - lse); a large lse was rounded when it was stored, so it is divided by its sum,
// which is 1 but for that. Threads as in topk_gating.cu: a team of lanes per row, else a block.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>
#include <limits>

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
  const compute_t* grad_sums;  // [S, RoutingSums::width(E)]
  scalar_t* grad_logits;
  int64_t grad_stride;
  bool grad_aligned;

  // Whether every p of a row is needed; a renormalised gate needs those of the chosen experts
  // alone.
  __device__ bool is_dense() const {
    return grad_lse != nullptr || grad_sums != nullptr ||
           (grad_weights != nullptr && this->weights_are_probabilities());
  }

  // The gradients of the sums that a token enters.
  struct GradSums {
    const compute_t* prob = nullptr;  // [E], or null
    compute_t lse_squared = 0, entropy = 0;
  };
  __device__ GradSums grad_of_segment(int64_t segment) const {
    if (grad_sums == nullptr) return {};
    const auto* sums = grad_sums + segment * RoutingSums::width(this->experts);
    const auto* tail = sums + RoutingSums::weight(this->experts);
    return {sums + RoutingSums::prob, tail[kLseSquared], tail[kEntropy]};
  }

  // Of weights that are no softmax, by the logit: ds/dx.
  __device__ compute_t score_slope(compute_t x) const {
    if (this->score_function == ScoreFunction::kIdentity) return 1;
    return score(this->score_function, x) * log_score_slope(this->score_function, x);
  }
};

// The gate's gradient for this lane's experts. It goes from the lane that has slot k to the lane
// that has its expert through `row`, one per team in shared memory, which is and stays zero between
// calls. Renormalised weights are c r, r the softmax of the chosen y: the gradient for y is
// c r (g - sum g r). Otherwise they are c s, and for the softmax c p: there the gradient for p is
// c g, and all others are for the logits.
template <typename Team, bool kGeneral, typename scalar_t, int kItems = Team::kItems>
__device__ void gate_gradient(const Backward<scalar_t>& b, int64_t token, bool active, float* row,
                              float (&gate)[kItems]) {
  constexpr int kLanes = Team::kLanes;
  const int64_t* experts = b.topk_indices + token * b.top_k;
  const float* grad = b.grad_weights + token * b.top_k;
  const int top_k = active ? b.top_k : 0;
  const auto is_chosen = [&](int k) { return experts[k] >= 0 && experts[k] < b.experts; };
  const auto logit = [&](int k) { return clean(b.template logit<kGeneral>(token, experts[k])); };
  const auto chosen_log_score = [&](int k) {
    if (!is_chosen(k)) return -INFINITY;
    return kGeneral ? log_score(b.score_function, logit(k)) : logit(k);
  };
  if (b.norm_topk_prob) {
    float peak = -INFINITY, sum = 0, dot = 0;
#pragma unroll 1
    for (int k = Team::lane(); k < top_k; k += kLanes) peak = fmaxf(peak, chosen_log_score(k));
    peak = finite_shift(team_reduce<kLanes>(peak, Max{}));
#pragma unroll 1
    for (int k = Team::lane(); k < top_k; k += kLanes) {
      const float numerator = std::exp(chosen_log_score(k) - peak);
      sum += numerator;
      dot += numerator * grad[k];
    }
    const float inverse_sum = reciprocal_or_zero(team_reduce<kLanes>(sum, Sum{}));
    dot = team_reduce<kLanes>(dot, Sum{}) * inverse_sum;
#pragma unroll 1
    for (int k = Team::lane(); k < top_k; k += kLanes) {
      const float r = std::exp(chosen_log_score(k) - peak) * inverse_sum;
      if (!is_chosen(k)) continue;
      const float slope = kGeneral ? log_score_slope(b.score_function, logit(k)) : 1.f;
      row[experts[k]] = b.scaling_factor * r * (grad[k] - dot) * slope;
    }
  } else {
    const bool of_logit = kGeneral && !b.weights_are_probabilities();
#pragma unroll 1
    for (int k = Team::lane(); k < top_k; k += kLanes) {
      if (!is_chosen(k)) continue;
      row[experts[k]] = b.scaling_factor * grad[k] * (of_logit ? b.score_slope(logit(k)) : 1.f);
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

// kGeneral: any score function, noise and segments are allowed for. Asking for 3 blocks per
// multiprocessor, which is 80 registers, keeps ptxas from spilling to fit a fourth.
template <typename scalar_t, typename Team, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kGeneral&& Team::kItems <= 8 ? 3 : 0)
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
  const bool has_plain_scores = !kGeneral || b.has_plain_scores();
  float grad_prob[kItems] = {}, grad_lse_squared = 0, grad_entropy = 0;
  using GradSums = typename Backward<scalar_t>::GradSums;
  const auto keep = [&](const GradSums& grad_sums, int experts) {  // this lane's part
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = Team::first_expert() + i;
      if (e < experts) grad_prob[i] = grad_sums.prob[e];
    }
    grad_lse_squared = grad_sums.lse_squared;
    grad_entropy = grad_sums.entropy;
  };
  const bool has_segments = kGeneral && b.segment_ids != nullptr;
  if (b.grad_sums != nullptr && !has_segments) {  // read once for all teams of the block
    float* shared_sums = reinterpret_cast<float*>(shared_memory) + Team::kTeams * Team::kExperts;
    float* shared_tail = shared_sums + Team::kExperts;
    for (int e = threadIdx.x; e < b.experts; e += kThreads) {
      shared_sums[e] = b.grad_sums[RoutingSums::prob + e];
    }
    if (threadIdx.x < kTailSize) {
      shared_tail[threadIdx.x] = b.grad_sums[RoutingSums::weight(b.experts) + threadIdx.x];
    }
    __syncthreads();
    keep({shared_sums, shared_tail[kLseSquared], shared_tail[kEntropy]}, b.experts);
  }
  for (int64_t first = blockIdx.x * int64_t{Team::kTeams}; first < b.tokens;
       first += gridDim.x * int64_t{Team::kTeams}) {
    const int64_t token = first + Team::number();
    const bool exists = token < b.tokens;
    bool invalid = false;
    const float token_weight = exists ? b.template weight<kGeneral>(token, &invalid) : 0.f;
    const bool active = token_weight > 0;
    if (b.grad_sums != nullptr && has_segments && active) {
      keep(b.grad_of_segment(b.segment(token)), b.experts);
    }
    float x[kItems];
    if (dense && active) {
      load_logits<kGeneral>(b, token, Team::first_expert(), x);
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

    float gate[kItems] = {};  // for the logits, or for p
    if (b.grad_weights != nullptr) {
      gate_gradient<Team, kGeneral>(b, token, active, gate_row, gate);
    }

    const bool gate_is_for_p = kGeneral ? b.weights_are_probabilities() : !b.norm_topk_prob;
    if (dense) {
      // dx = phi p (a - sum a p) + ... with a the gradient for p, of the sums and (of weights that
      // are probabilities) of the gate; p = exp(y - shift) but for a factor.
      float shift = lse;
      if (!has_plain_scores) {
        float peak = -INFINITY;
#pragma unroll
        for (const float value : x) peak = fmaxf(peak, value);
        peak = finite_shift(team_reduce<kLanes>(peak, Max{}));
        shift = log_score(b.score_function, peak);
      }
      const auto log_score_of = [&](float logit) {
        return has_plain_scores ? logit : log_score(b.score_function, logit);
      };
      float p[kItems], sum = 0, dot = 0, descent = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float y = log_score_of(x[i]);
        p[i] = std::exp(y - shift);
        sum += p[i];
        dot += p[i] * (token_weight * grad_prob[i] + (gate_is_for_p ? gate[i] : 0.f));
        if (p[i] > 0) descent += p[i] * (shift - y);
      }
      sum = team_reduce<kLanes>(sum, Sum{});
      const float inverse_sum = reciprocal_or_zero(sum);
      const float log_sum = sum > 0 ? std::log(sum) : 0.f;
      dot = team_reduce<kLanes>(dot, Sum{}) * inverse_sum;
      const float entropy = team_reduce<kLanes>(descent, Sum{}) * inverse_sum + log_sum;
      const float grad_lse = b.grad_lse != nullptr && active ? b.grad_lse[token] : 0.f;
      float common = -token_weight * grad_entropy * entropy - dot, for_q = 0;
      if (has_plain_scores) {
        common =
            grad_lse - dot + token_weight * (2 * grad_lse_squared * lse - grad_entropy * entropy);
      } else {  // q is not p; it is exp(x - lse) but for a factor, which for_q has
        float sum_of_q = 0;
#pragma unroll
        for (const float value : x) sum_of_q += std::exp(value - lse);
        sum_of_q = team_reduce<kLanes>(sum_of_q, Sum{});
        for_q =
            (grad_lse + 2 * token_weight * grad_lse_squared * lse) * reciprocal_or_zero(sum_of_q);
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float log_p = log_score_of(x[i]) - shift - log_sum;
        const float for_p = token_weight * (grad_prob[i] - grad_entropy * log_p) + common;
        float dx = p[i] > 0 ? p[i] * inverse_sum * (for_p + (gate_is_for_p ? gate[i] : 0.f)) : 0.f;
        if (!has_plain_scores) {
          dx = dx * log_score_slope(b.score_function, x[i]) + for_q * std::exp(x[i] - lse);
        }
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
  const bool dense = b.is_dense(), has_plain_scores = b.has_plain_scores();
  for (int64_t token = blockIdx.x; token < b.tokens; token += gridDim.x) {
    scalar_t* to = b.grad_logits + token * b.grad_stride;
    const int64_t* experts = b.topk_indices + token * b.top_k;
    const compute_t* grad = b.grad_weights == nullptr ? nullptr : b.grad_weights + token * b.top_k;
    const int top_k = grad == nullptr ? 0 : b.top_k;
    const auto is_chosen = [&](int k) { return experts[k] >= 0 && experts[k] < b.experts; };
    const auto logit = [&](int64_t e) { return clean(b.template logit<true>(token, e)); };
    const auto log_score_of = [&](int64_t e) { return log_score(b.score_function, logit(e)); };

    bool invalid = false;
    const compute_t token_weight = b.template weight<true>(token, &invalid);
    if (token_weight <= 0) {
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) to[e] = scalar_t(0);
      continue;
    }

    compute_t peak = 0, lse = 0;
    if (dense && (b.lse == nullptr || !has_plain_scores)) {
      peak = -INFINITY;
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) peak = Max{}(peak, logit(e));
      peak = finite_shift(block_reduce(peak, Max{}));
    }
    if (dense && b.lse != nullptr) {
      lse = b.lse[token];
    } else if (dense) {
      compute_t sum = 0;
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) sum += std::exp(logit(e) - peak);
      sum = block_reduce(sum, Sum{});
      lse = sum > 0 ? peak + std::log(sum) : compute_t(0);
    }

    // p and q as in topk_gating_backward_team_kernel.
    const auto grad_sums = b.grad_of_segment(b.segment(token));
    const compute_t shift = has_plain_scores ? lse : log_score(b.score_function, peak);
    compute_t sum = 0, dot = 0, descent = 0, sum_of_q = 0;
    if (dense) {
      for (int e = threadIdx.x; e < b.experts; e += blockDim.x) {
        const compute_t y = log_score_of(e), numerator = std::exp(y - shift);
        sum += numerator;
        if (grad_sums.prob != nullptr) dot += numerator * token_weight * grad_sums.prob[e];
        if (numerator > 0) descent += numerator * (shift - y);
        if (!has_plain_scores) sum_of_q += std::exp(logit(e) - lse);
      }
    }
    compute_t chosen_peak = -INFINITY, chosen_scale = 0, chosen_dot = 0;
    if (b.norm_topk_prob) {
      for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        if (is_chosen(k)) chosen_peak = Max{}(chosen_peak, log_score_of(experts[k]));
      }
      chosen_peak = finite_shift(block_reduce(chosen_peak, Max{}));
      compute_t chosen_sum = 0;
      for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        if (!is_chosen(k)) continue;
        const compute_t numerator = std::exp(log_score_of(experts[k]) - chosen_peak);
        chosen_sum += numerator;
        chosen_dot += numerator * grad[k];
      }
      chosen_scale = reciprocal_or_zero(block_reduce(chosen_sum, Sum{}));
      chosen_dot = block_reduce(chosen_dot, Sum{}) * chosen_scale;
    } else if (b.weights_are_probabilities()) {
      for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        if (is_chosen(k)) dot += b.scaling_factor * grad[k] * std::exp(logit(experts[k]) - lse);
      }
    }
    sum = block_reduce(sum, Sum{});
    const compute_t inverse_sum = reciprocal_or_zero(sum);
    const compute_t log_sum = sum > 0 ? std::log(sum) : compute_t(0);
    dot = block_reduce(dot, Sum{}) * inverse_sum;
    const compute_t entropy = block_reduce(descent, Sum{}) * inverse_sum + log_sum;
    const compute_t grad_of_lse = (b.grad_lse == nullptr ? compute_t(0) : b.grad_lse[token]) +
                                  2 * token_weight * grad_sums.lse_squared * lse;
    const compute_t for_q = has_plain_scores
                                ? compute_t(0)
                                : grad_of_lse * reciprocal_or_zero(block_reduce(sum_of_q, Sum{}));
    const compute_t common = (has_plain_scores ? grad_of_lse : compute_t(0)) - dot -
                             token_weight * grad_sums.entropy * entropy;
    // What an expert gets whether it was chosen or not.
    const auto dense_gradient = [&](int64_t e) {
      if (!dense) return compute_t(0);
      const compute_t x = logit(e), y = log_score(b.score_function, x);
      const compute_t log_p = y - shift - log_sum, p = std::exp(y - shift) * inverse_sum;
      const compute_t a = grad_sums.prob == nullptr ? compute_t(0) : grad_sums.prob[e];
      const compute_t for_y =
          p > 0 ? p * (common + token_weight * (a - grad_sums.entropy * log_p)) : compute_t(0);
      if (has_plain_scores) return for_y;
      return for_y * log_score_slope(b.score_function, x) + for_q * std::exp(x - lse);
    };

    for (int e = threadIdx.x; e < b.experts; e += blockDim.x) {
      to[e] = static_cast<scalar_t>(dense_gradient(e));
    }
    __syncthreads();  // the chosen ones are written again
    for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
      if (!is_chosen(k)) continue;
      const compute_t x = logit(experts[k]);
      compute_t gate = grad[k];
      if (b.norm_topk_prob) {
        const compute_t y = log_score(b.score_function, x);
        gate = std::exp(y - chosen_peak) * chosen_scale * (grad[k] - chosen_dot) *
               log_score_slope(b.score_function, x);
      } else {
        gate *= b.weights_are_probabilities() ? std::exp(x - lse) * inverse_sum : b.score_slope(x);
      }
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
  b.grad_sums = pointer_or_null<compute_t>(arguments.grad_sums);
  b.grad_logits = grad_logits.mutable_data_ptr<scalar_t>();
  b.grad_stride = grad_logits.stride(0);
  b.grad_aligned = has_aligned_rows(grad_logits);

  constexpr int64_t kMaxBackwardBlocks = 2048;
  if constexpr (!std::is_same_v<scalar_t, double>) {
    if (fits_team(b)) {
      with_team(b.experts, [&](auto team) {
        using Team = decltype(team);
        const int64_t blocks = std::min(ceil_div(b.tokens, Team::kTeams), kMaxBackwardBlocks);
        const int64_t shared_bytes =
            ((Team::kTeams + 1) * Team::kExperts + kTailSize) * sizeof(float);
        const auto kernel = is_general(b) ? topk_gating_backward_team_kernel<scalar_t, Team, true>
                                          : topk_gating_backward_team_kernel<scalar_t, Team, false>;
        launch(kernel, blocks, kThreads, shared_bytes, stream, b);
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
  const c10::DeviceGuard guard(grad_logits.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad_logits.scalar_type(),
                                  "topk_gating_backward_cuda",
                                  [&] { backward<scalar_t>(arguments, grad_logits); });
}

}  // namespace equipoise
