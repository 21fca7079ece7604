// SPDX-License-Identifier: Apache-2.0
// What both directions of topk_gating share: the rows, how logits are read, and the team of lanes
// that takes a row of at most 512 experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "../csrc/ops/routing_sums.h"
#include "../csrc/ops/score_function.h"
#include "rows.cuh"
#include "warp.cuh"

namespace equipoise::gating {

constexpr int kThreads = 256;
constexpr int kMaxTeamExperts = 512;

// The scalars after the [E] parts of `sums`, in their order.
enum Tail { kWeight, kLseSquared, kEntropy, kNanRows, kInvalid, kTailSize };
static_assert(kTailSize == RoutingSums::kTail && kWeight == RoutingSums::weight(0) &&
              kLseSquared == RoutingSums::lse_squared(0) && kEntropy == RoutingSums::entropy(0) &&
              kNanRows == RoutingSums::nan_rows(0) && kInvalid == RoutingSums::invalid(0));

// ---- score functions ----------------------------------------------------------------------------
// With them -inf stays an absent expert: score 0, log score -inf, finite slope.

// Where e^x is all there is of log(1 + e^x), in float64 too.
constexpr int kSoftplusIsExp = -40;

template <typename compute_t>
__device__ compute_t softplus(compute_t x) {
  return Max{}(x, compute_t(0)) + std::log1p(std::exp(-std::abs(x)));
}

template <typename compute_t>
__device__ compute_t sigmoid(compute_t x) {
  const compute_t e = std::exp(-std::abs(x));
  return (x >= 0 ? compute_t(1) : e) / (1 + e);
}

// y = log s.
template <typename compute_t>
__device__ compute_t log_score(ScoreFunction function, compute_t x) {
  if (function == ScoreFunction::kSigmoid) return -softplus(-x);
  if (function != ScoreFunction::kSqrtSoftplus) return x;
  return (x < kSoftplusIsExp ? x : std::log(softplus(x))) / 2;
}

// s; the softmax, which needs the row, is not among them.
template <typename compute_t>
__device__ compute_t score(ScoreFunction function, compute_t x) {
  if (function == ScoreFunction::kSigmoid) return sigmoid(x);
  if (function != ScoreFunction::kSqrtSoftplus) return x;
  return x < kSoftplusIsExp ? std::exp(x / 2) : std::sqrt(softplus(x));
}

// phi = dy/dx.
template <typename compute_t>
__device__ compute_t log_score_slope(ScoreFunction function, compute_t x) {
  if (function == ScoreFunction::kSigmoid) return sigmoid(-x);
  if (function != ScoreFunction::kSqrtSoftplus) return 1;
  return x < kSoftplusIsExp ? compute_t(0.5) : sigmoid(x) / (2 * softplus(x));
}

// ---- rows --------------------------------------------------------------------------------------

// What both directions know of a token; null where absent. Kernels are compiled for what is common
// as well, without kGeneral: y is x, and there is neither noise nor a segment.
template <typename scalar_t>
struct Rows {
  using compute_t = compute_type<scalar_t>;
  const scalar_t* logits;
  int64_t row_stride;
  const scalar_t* noise;
  int64_t noise_stride;
  bool aligned;  // both
  const bool* token_mask;
  const compute_t* token_weights;
  const int64_t* segment_ids;
  int64_t segments;
  int64_t tokens;
  int experts, top_k;
  ScoreFunction score_function;
  bool norm_topk_prob;
  compute_t scaling_factor;

  __device__ const scalar_t* row(int64_t token) const { return logits + token * row_stride; }

  template <bool kGeneral>
  __device__ compute_t logit(int64_t token, int64_t expert) const {
    const auto x = static_cast<compute_t>(row(token)[expert]);
    if (!kGeneral || noise == nullptr) return x;
    return x + static_cast<compute_t>(noise[token * noise_stride + expert]);
  }

  __device__ bool is_segment(int64_t id) const { return id >= 0 && id < segments; }

  // An id that is none is reported in segment 0.
  __device__ int64_t segment(int64_t token) const {
    if (segment_ids == nullptr) return 0;
    const int64_t id = segment_ids[token];
    return is_segment(id) ? id : 0;
  }

  // 0 for a masked token. A negative or NaN weight masks too, as does a bad segment, and is
  // reported.
  template <bool kGeneral>
  __device__ compute_t weight(int64_t token, bool* invalid) const {
    if (kGeneral && segment_ids != nullptr && !is_segment(segment_ids[token])) {
      *invalid = true;
      return 0;
    }
    if (token_mask != nullptr) return token_mask[token] ? 1 : 0;
    if (token_weights == nullptr) return 1;
    const compute_t weight = token_weights[token];
    *invalid = !(weight >= 0);
    return *invalid ? 0 : weight;
  }

  // Whether p is softmax(x); it is softmax(y).
  __device__ bool has_plain_scores() const {
    return score_function == ScoreFunction::kSoftmax || score_function == ScoreFunction::kIdentity;
  }

  // Whether the weights of the chosen experts are their p, which takes the whole row.
  __host__ __device__ bool weights_are_probabilities() const {
    return score_function == ScoreFunction::kSoftmax && !norm_topk_prob;
  }
};

// A NaN is an absent expert, as -inf is; +inf becomes 1e18, whose square is finite.
template <typename compute_t>
__device__ compute_t clean(compute_t x) {
  if (x != x) return -INFINITY;
  return x == INFINITY ? compute_t(1e18) : x;
}

// What to subtract from logits of maximum `peak` before exp: absent ones (-inf) give 0 even if
// there is no other.
template <typename compute_t>
__device__ compute_t finite_shift(compute_t peak) {
  return peak > -INFINITY ? peak : compute_t(0);
}

template <typename compute_t>
__device__ compute_t reciprocal_or_zero(compute_t x) {
  return x > 0 ? 1 / x : compute_t(0);
}

// A team of kLanes lanes; each has kItems neighbouring experts.
template <int kLanes_, int kItems_>
struct Team {
  static constexpr int kLanes = kLanes_, kItems = kItems_, kExperts = kLanes * kItems;
  static constexpr int kTeams = kThreads / kLanes;  // per block
  static __device__ int number() { return threadIdx.x / kLanes; }
  static __device__ int lane() { return threadIdx.x % kLanes; }
  static __device__ int first_expert() { return lane() * kItems; }
};

// Neighbouring values of which `count` are there; the others are absent.
template <typename scalar_t>
__device__ Piece<scalar_t> load_piece(const scalar_t* from, bool aligned, int count) {
  constexpr int kSize = kPieceSize<scalar_t>;
  if (aligned && kSize <= count) return Piece<scalar_t>::load(from);
  Piece<scalar_t> piece;
#pragma unroll
  for (int j = 0; j < kSize; ++j) piece.values[j] = j < count ? from[j] : scalar_t(-INFINITY);
  return piece;
}

// The row of kItems neighbouring experts; those past the last are absent.
template <bool kGeneral, int kItems, typename scalar_t>
__device__ void load_logits(const Rows<scalar_t>& r, int64_t token, int first_expert,
                            float (&x)[kItems]) {
  constexpr int kSize = kPieceSize<scalar_t>;
  const scalar_t* from = r.row(token) + first_expert;
  const int count = r.experts - first_expert;
#pragma unroll
  for (int i = 0; i < kItems; i += kSize) {
    const auto piece = load_piece(from + i, r.aligned, count - i);
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[i + j] = piece.values[j];
  }
  if (!kGeneral || r.noise == nullptr) return;
  from = r.noise + token * r.noise_stride + first_expert;
#pragma unroll
  for (int i = 0; i < kItems; i += kSize) {
    const auto piece = load_piece(from + i, r.aligned, count - i);
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[i + j] += static_cast<float>(piece.values[j]);
  }
}

// ---- host --------------------------------------------------------------------------------------

template <typename scalar_t, typename Arguments>
Rows<scalar_t> make_rows(const Arguments& arguments, int64_t top_k) {
  using compute_t = compute_type<scalar_t>;
  const auto& mask = arguments.token_mask;
  const bool is_bool = mask.has_value() && mask->scalar_type() == at::kBool;
  Rows<scalar_t> rows{};
  rows.logits = arguments.logits.template const_data_ptr<scalar_t>();
  rows.row_stride = arguments.logits.stride(0);
  rows.aligned = has_aligned_rows(arguments.logits);
  if (arguments.noise.has_value()) {
    rows.noise = arguments.noise->template const_data_ptr<scalar_t>();
    rows.noise_stride = arguments.noise->stride(0);
    rows.aligned = rows.aligned && has_aligned_rows(*arguments.noise);
  }
  rows.token_mask = is_bool ? mask->template const_data_ptr<bool>() : nullptr;
  rows.token_weights = is_bool ? nullptr : pointer_or_null<compute_t>(mask);
  rows.segment_ids = pointer_or_null<int64_t>(arguments.segment_ids);
  rows.segments = arguments.num_segments;
  rows.tokens = arguments.logits.size(0);
  rows.experts = static_cast<int>(arguments.logits.size(1));
  rows.top_k = static_cast<int>(top_k);
  rows.score_function = arguments.score_function;
  rows.norm_topk_prob = arguments.norm_topk_prob;
  rows.scaling_factor = static_cast<compute_t>(arguments.scaling_factor);
  return rows;
}

// float64 is there for gradient checks and does not get kernels of its own for few experts.
template <typename scalar_t>
bool fits_team(const Rows<scalar_t>& rows) {
  return !std::is_same_v<scalar_t, double> && rows.experts <= kMaxTeamExperts;
}

// Calls function(team) with the team for a row of at most kMaxTeamExperts experts.
template <typename Function>
void with_team(int experts, const Function& function) {
  if (experts <= 8) {
    function(Team<1, 8>{});
  } else if (experts <= 32) {
    function(Team<4, 8>{});
  } else if (experts <= 64) {
    function(Team<8, 8>{});
  } else if (experts <= 128) {
    function(Team<16, 8>{});
  } else if (experts <= 256) {
    function(Team<32, 8>{});
  } else {
    function(Team<32, 16>{});
  }
}

// Whether a team needs a kernel of the general kind, whatever the direction.
template <typename scalar_t>
bool is_general(const Rows<scalar_t>& rows) {
  return rows.score_function != ScoreFunction::kSoftmax || rows.noise != nullptr ||
         rows.segment_ids != nullptr;
}

// Threads of a block that takes a row.
inline int block_threads(int experts) {
  return std::clamp(experts / kWarpSize / 4 * kWarpSize, kWarpSize, kThreads);
}

}  // namespace equipoise::gating
