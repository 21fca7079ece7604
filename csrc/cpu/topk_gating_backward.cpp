// SPDX-License-Identifier: Apache-2.0
// topk_gating on the CPU, backward: the gradients of the gate and of every loss in one read of the
// logits and one write of grad_logits, in chunks of rows (row_chunks.h).
#include <cstdint>

#include "../ops/routing_sums.h"
#include "row_chunks.h"
#include "scores.h"
#include "select_experts.h"
#include "topk_gating.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

/// Makes values [top_k, kChunkRows], logits of the chosen (-inf for an empty slot), the gate's
/// gradient with respect to those logits, in `size` lanes; `grads` is that of the weights, `shares`
/// room of the same size. Not for a softmax without renormalisation, where every logit has a part.
template <ScoreFunction kScore, typename T>
void gate_gradient(int64_t size, int64_t top_k, bool norm_topk_prob, T scaling_factor,
                   const T* grads, T* shares, T* values) {
  using Vec = Vectorized<T>;
  const Vec scale(scaling_factor);
  for (int64_t lane = 0; lane < size; lane += Vec::size()) {
    const int64_t end = lane + top_k * kChunkRows;
    Vec mean(0);
    if (norm_topk_prob) {
      const Vec top = maximum_of_slots(values + lane, top_k);
      Vec total(0);
      for (int64_t k = lane; k < end; k += kChunkRows) {
        const Vec value = in_proportion<kScore>(Vec::loadu(values + k), top);
        value.store(shares + k);
        total = total + value;
      }
      // Of a single expert the share is 1 exactly, and the gradient 0.
      for (int64_t k = lane; k < end; k += kChunkRows) {
        const Vec share = Vec::loadu(shares + k) / total;
        share.store(shares + k);
        mean = at::vec::fmadd(share, Vec::loadu(grads + k), mean);
      }
    }
    for (int64_t k = lane; k < end; k += kChunkRows) {
      const Vec x = Vec::loadu(values + k), grad = scale * (Vec::loadu(grads + k) - mean);
      if constexpr (kScore == ScoreFunction::kIdentity) {
        (norm_topk_prob ? grad * Vec::loadu(shares + k) : grad).store(values + k);
      } else {
        const Vec share = norm_topk_prob ? Vec::loadu(shares + k) : score<kScore>(x);
        (grad * share * log_score_slope<kScore>(x)).store(values + k);
      }
    }
  }
}

/// The same for a softmax without renormalisation: `values` are exps of the chosen and
/// scaling_factor / totals makes them weights. Takes from `common` what every expert's slope loses.
template <typename T>
void gate_gradient_of_softmax(int64_t size, int64_t top_k, T scaling_factor, const T* totals,
                              const T* grads, T* values, T* common) {
  using Vec = Vectorized<T>;
  for (int64_t lane = 0; lane < size; lane += Vec::size()) {
    const Vec scale = Vec(scaling_factor) / Vec::loadu(totals + lane);
    Vec mean(0);
    for (int64_t k = lane; k < lane + top_k * kChunkRows; k += kChunkRows) {
      const Vec grad = Vec::loadu(grads + k);  // 0 where the slot is empty, and the value -inf
      const Vec value = at::vec::clamp_min(Vec::loadu(values + k), Vec(0)) * scale * grad;
      value.store(values + k);
      mean = mean + value;
    }
    (Vec::loadu(common + lane) - mean).store(common + lane);
  }
}

/// The slots of one token. What is not in [0, E) chose no expert.
template <typename scalar_t>
struct Slots {
  const int64_t* experts;  // [K]
  int64_t top_k, num_experts;

  Slots(const TopKGatingBackwardRows<scalar_t>& rows, int64_t token)
      : experts(rows.topk_indices + token * rows.top_k),
        top_k(rows.top_k),
        num_experts(rows.num_experts) {}

  bool is_filled(int64_t k) const {
    return static_cast<uint64_t>(experts[k]) < static_cast<uint64_t>(num_experts);
  }
  template <typename Function>
  void for_each(const Function& function) const {
    for (int64_t k = 0; k < top_k; ++k) {
      if (is_filled(k)) function(k, experts[k]);
    }
  }
};

/// What the slots of some rows hold, [top_k, kChunkRows] each, in `scratch`.
template <typename T>
struct SlotMemory {
  T *values, *grads, *shares;

  SlotMemory(int64_t top_k, T* scratch)
      : values(scratch), grads(values + top_k * kChunkRows), shares(grads + top_k * kChunkRows) {
    for (int64_t k = 0; k < 2 * top_k * kChunkRows; ++k) scratch[k] = 0;  // in unused lanes, too
  }

  /// values = logit(expert) and grads = grad_weights of the filled slots; -inf and 0 elsewhere.
  template <typename scalar_t, typename Logit>
  void gather(int64_t r, const Slots<scalar_t>& slots, const T* grad_weights, const Logit& logit) {
    for (int64_t k = 0; k < slots.top_k; ++k) {
      const int64_t expert = slots.experts[k], at = k * kChunkRows + r;
      const bool filled = slots.is_filled(k);
      values[at] = filled ? logit(expert) : kNegativeInfinity<T>;
      grads[at] = filled ? grad_weights[k] : T(0);
    }
  }
};

/// Gradient of the tokens [begin, end) of a gate without any other loss: of the chosen logits only.
template <typename scalar_t>
void sparse_backward(const TopKGatingBackwardRows<scalar_t>& rows, int64_t begin, int64_t end,
                     compute_t<scalar_t>* scratch) {
  using T = compute_t<scalar_t>;
  const int64_t num_experts = rows.num_experts, top_k = rows.top_k;
  SlotMemory<T> memory(top_k, scratch);
  const auto takes_part = [&](int64_t token) {
    return rows.grad_weights != nullptr &&
           (rows.token_weights == nullptr || rows.token_weights[token] > 0);
  };
  for (int64_t first = begin; first < end; first += kChunkRows) {
    const int64_t size = end - first < kChunkRows ? end - first : kChunkRows;
    __builtin_memset(rows.grad_logits + first * num_experts, 0,
                     size * num_experts * sizeof(scalar_t));
    for (int64_t r = 0; r < size; ++r) {
      const int64_t token = first + r;
      if (!takes_part(token)) continue;
      const scalar_t* const row = rows.logits + token * rows.row_stride;
      const scalar_t* const noise = rows.noise + token * rows.noise_stride;
      memory.gather(
          r, Slots<scalar_t>(rows, token), rows.grad_weights + token * top_k, [&](int64_t expert) {
            const T x = static_cast<T>(row[expert]);
            return sanitize(rows.noise != nullptr ? x + static_cast<T>(noise[expert]) : x);
          });
    }
    with_score(rows.score_function, [&](auto kScore) {
      gate_gradient<kScore>(size, top_k, rows.norm_topk_prob, rows.scaling_factor, memory.grads,
                            memory.shares, memory.values);
    });
    for (int64_t r = 0; r < size; ++r) {
      if (!takes_part(first + r)) continue;
      scalar_t* const grad_row = rows.grad_logits + (first + r) * num_experts;
      Slots<scalar_t>(rows, first + r).for_each([&](int64_t k, int64_t expert) {
        grad_row[expert] = static_cast<scalar_t>(memory.values[k * kChunkRows + r]);
      });
    }
  }
}

}  // namespace

/// Gradient of tokens [begin, end); one read of the logits, one write of grad_logits. With
/// y = log s(x), p its softmax, q that of x:
///   dx = dy/dx (p (w (a - <a, p>) - w g_H (log p + H)) + gate) + q (2 w g_z lse + g_lse)
template <typename scalar_t>
void topk_gating_backward_rows(const TopKGatingBackwardRows<scalar_t>& rows, int64_t begin,
                               int64_t end, compute_t<scalar_t>* scratch) {
  using T = compute_t<scalar_t>;
  using Vec = Vectorized<T>;
  const int64_t num_experts = rows.num_experts, top_k = rows.top_k;
  const bool gate = rows.grad_weights != nullptr;
  const bool gate_of_all =
      gate && rows.score_function == ScoreFunction::kSoftmax && !rows.norm_topk_prob;
  if (rows.grad_lse == nullptr && rows.grad_sums == nullptr && !gate_of_all) {
    sparse_backward(rows, begin, end, scratch);
    return;
  }

  Chunk<T> chunk(num_experts, scratch);
  const int64_t part = chunk.stride;
  const int64_t padded = (num_experts + kGroups - 1) / kGroups * kGroups;
  T* const a = chunk.scratch;  // the gradient of prob_sum, padded with zeros
  SlotMemory<T> slot_memory(top_k, a + part);
  int64_t segment_of_a = -1;
  for (int64_t e = 0; e < part; ++e) a[e] = 0;
  T grad_lse_squared = 0, grad_entropy = 0;
  const bool curved = is_curved(rows.score_function);
  T* const y = curved ? chunk.keys : chunk.x;
  // Where rows need no rounding and no padding, the gradient is not made in the place of y first.
  const bool direct = std::is_same_v<scalar_t, T> && padded == num_experts;

  const auto settle = [&](int64_t token) {
    __builtin_memset(rows.grad_logits + token * num_experts, 0, num_experts * sizeof(scalar_t));
  };
  for (int64_t token = begin; token < end;) {
    token = fill_chunk(rows, token, end, chunk, settle, [](int64_t) {});
    if (chunk.size == 0) continue;
    if (rows.grad_sums != nullptr && chunk.segment != segment_of_a) {
      segment_of_a = chunk.segment;
      const T* const grad_sums = rows.grad_sums + segment_of_a * RoutingSums::width(num_experts);
      for (int64_t e = 0; e < num_experts; ++e) a[e] = grad_sums[RoutingSums::prob + e];
      grad_lse_squared = grad_sums[RoutingSums::lse_squared(num_experts)];
      grad_entropy = grad_sums[RoutingSums::entropy(num_experts)];
    }

    // The gradient of lse, which goes to x past y: of lse itself and of lse^2.
    T grad_lse[kChunkRows], peaks_of_x[kChunkRows];
    const bool needs_lse = rows.grad_lse != nullptr || grad_lse_squared != 0;
    for (int64_t r = 0; r < chunk.size; ++r) peaks_of_x[r] = chunk.peaks[r];
    if (needs_lse || !curved) exponentials_of_chunk(chunk.x, padded, chunk);
    for (int64_t r = 0; r < chunk.size; ++r) {
      grad_lse[r] = rows.grad_lse != nullptr ? rows.grad_lse[chunk.tokens[r]] : T(0);
      if (needs_lse) {
        // From the row's own maximum: a large lse was rounded when it was stored.
        grad_lse[r] +=
            2 * chunk.token_weights[r] * grad_lse_squared * (chunk.peaks[r] + chunk.log_totals[r]);
      }
    }
    T totals_of_x[kChunkRows];
    if (curved) {
      for (int64_t r = 0; r < chunk.size; ++r) totals_of_x[r] = chunk.totals[r];
      log_scores_of_chunk(rows.score_function, padded, chunk.keys, chunk);
      exponentials_of_chunk(chunk.keys, padded, chunk);
    }

    // What all experts of a row share: common = -w <a, p> - w g_H H ..., with
    // g_H (log p + H) = g_H (spread / total - (peak - y)).
    T common[kChunkRows] = {};
    for (int64_t r = 0; r < chunk.size; ++r) {
      const T* const exps = chunk.exps + r * chunk.stride;
      Vec dot(0);
      for (int64_t e = 0; e < padded; e += Vec::size())
        dot = at::vec::fmadd(Vec::loadu(a + e), Vec::loadu(exps + e), dot);
      common[r] = -chunk.token_weights[r] * (sum_of_lanes(dot) + grad_entropy * chunk.spreads[r]) /
                  chunk.totals[r];
      if (!curved) common[r] += grad_lse[r];
    }
    for (int64_t r = 0; gate && r < chunk.size; ++r) {
      const T* const row = (gate_of_all ? chunk.exps : chunk.x) + r * chunk.stride;
      slot_memory.gather(r, Slots<scalar_t>(rows, chunk.tokens[r]),
                         rows.grad_weights + chunk.tokens[r] * top_k,
                         [&](int64_t expert) { return row[expert]; });
    }
    if (gate_of_all) {
      gate_gradient_of_softmax(chunk.size, top_k, rows.scaling_factor, chunk.totals,
                               slot_memory.grads, slot_memory.values, common);
    } else if (gate) {
      with_score(rows.score_function, [&](auto kScore) {
        gate_gradient<kScore>(chunk.size, top_k, rows.norm_topk_prob, rows.scaling_factor,
                              slot_memory.grads, slot_memory.shares, slot_memory.values);
      });
    }
    for (int64_t r = 0; r < chunk.size; ++r) {
      const T* const x = chunk.x + r * chunk.stride;
      const T* const exps = chunk.exps + r * chunk.stride;
      T* const y_row = y + r * chunk.stride;
      scalar_t* const grad_row = rows.grad_logits + chunk.tokens[r] * num_experts;
      T* const out = direct ? reinterpret_cast<T*>(grad_row) : y_row;
      const Vec weight(chunk.token_weights[r]), shared(common[r]), share(T(1) / chunk.totals[r]);
      const Vec of_entropy(chunk.token_weights[r] * grad_entropy), peak(chunk.peaks[r]);
      const auto dense = [&](auto kScore, auto kEntropy) {
        for (int64_t e = 0; e < padded; e += Vec::size()) {
          Vec slope = at::vec::fmadd(weight, Vec::loadu(a + e), shared);
          if constexpr (kEntropy)
            slope = slope - of_entropy * from_peak(Vec::loadu(y_row + e), peak);
          Vec grad = Vec::loadu(exps + e) * share * slope;
          if constexpr (kScore != ScoreFunction::kIdentity)
            grad = grad * log_score_slope<kScore>(Vec::loadu(x + e));
          grad.store(out + e);
        }
      };
      with_score(rows.score_function, [&](auto kScore) {
        grad_entropy != 0 ? dense(kScore, std::true_type{}) : dense(kScore, std::false_type{});
      });
      if (curved && needs_lse) {
        const Vec of_lse(grad_lse[r] / totals_of_x[r]);
        for (int64_t e = 0; e < padded; e += Vec::size()) {
          const Vec q = exponential(from_peak(Vec::loadu(x + e), Vec(peaks_of_x[r])));
          at::vec::fmadd(of_lse, q, Vec::loadu(out + e)).store(out + e);
        }
      }
      if (gate) {
        Slots<scalar_t>(rows, chunk.tokens[r]).for_each([&](int64_t k, int64_t expert) {
          out[expert] += slot_memory.values[k * kChunkRows + r];
        });
      }
      if (!direct) store_row(out, num_experts, grad_row);
    }
  }
}

#define INSTANTIATE(scalar_t)                                                                \
  template void topk_gating_backward_rows<scalar_t>(const TopKGatingBackwardRows<scalar_t>&, \
                                                    int64_t, int64_t, compute_t<scalar_t>*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE

}  // namespace equipoise::cpu::CPU_CAPABILITY
