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

/// Makes `values`, logits of the chosen (-inf for an empty slot), the gate's gradient with respect
/// to those logits; grads [padded] holds that of the weights, 0 for an empty slot. Not for a
/// softmax without renormalisation, where every logit has a part.
template <ScoreFunction kScore, typename T>
void gate_gradient(int64_t padded, bool norm_topk_prob, T scaling_factor, const T* grads,
                   T* values) {
  using Vec = Vectorized<T>;
  if (!norm_topk_prob) {
    for (int64_t k = 0; k < padded; k += Vec::size()) {
      const Vec x = Vec::loadu(values + k), grad = Vec(scaling_factor) * Vec::loadu(grads + k);
      if constexpr (kScore == ScoreFunction::kIdentity) {
        grad.store(values + k);
      } else {
        (grad * score<kScore>(x) * log_score_slope<kScore>(x)).store(values + k);
      }
    }
    return;
  }
  constexpr bool kCurved = kScore != ScoreFunction::kIdentity;
  const T top = maximum_of(values, padded);
  if (!(top > kNegativeInfinity<T>)) return;  // no slot is filled
  Vec totals(0), means(0);
  for (int64_t k = 0; k < padded; k += Vec::size()) {
    const Vec value = in_proportion<kScore>(Vec::loadu(values + k), top);
    totals = totals + value;
    if constexpr (!kCurved) value.store(values + k);  // else the logits are needed again
  }
  // Of a single expert the ratio is 1 exactly, and the gradient 0: exp(0) / 1, or s / s.
  const T sum = sum_of_lanes(totals);
  const Vec total(sum), inverse(T(1) / sum), scale(scaling_factor);
  const auto ratio = [&](const Vec& value) {
    return kCurved ? in_proportion<kScore>(value, top) / total : value * inverse;
  };
  for (int64_t k = 0; k < padded; k += Vec::size()) {
    means = at::vec::fmadd(ratio(Vec::loadu(values + k)), Vec::loadu(grads + k), means);
  }
  const Vec mean(sum_of_lanes(means));
  for (int64_t k = 0; k < padded; k += Vec::size()) {
    const Vec value = Vec::loadu(values + k);
    const Vec grad = scale * ratio(value) * (Vec::loadu(grads + k) - mean);
    (kCurved ? grad * log_score_slope<kScore>(value) : grad).store(values + k);
  }
}

/// The same for a softmax without renormalisation: `values` are exps of the chosen and `scale`
/// makes them weights. Returns what is taken from every expert's slope.
template <typename T>
T gate_gradient_of_softmax(int64_t padded, T scale, const T* grads, T* values) {
  using Vec = Vectorized<T>;
  Vec means(0);
  for (int64_t k = 0; k < padded; k += Vec::size()) {
    const Vec grad = Vec::loadu(grads + k);  // 0 where the slot is empty, and the value -inf
    const Vec value = at::vec::clamp_min(Vec::loadu(values + k), Vec(0)) * Vec(scale) * grad;
    value.store(values + k);
    means = means + value;
  }
  return sum_of_lanes(means);
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

  template <typename Function>
  void for_each(const Function& function) const {
    for (int64_t k = 0; k < top_k; ++k) {
      if (static_cast<uint64_t>(experts[k]) < static_cast<uint64_t>(num_experts))
        function(k, experts[k]);
    }
  }
};

/// Room for what the slots of some rows hold: many rows, or one of many slots in `scratch`.
template <typename T>
struct SlotMemory {
  alignas(64) T short_values[kChunkRows][kGroups], short_grads[kChunkRows][kGroups];
  T* scratch;  // [2 padded]
  int64_t padded;

  SlotMemory(int64_t top_k, T* scratch)
      : scratch(scratch), padded((top_k + kGroups - 1) / kGroups * kGroups) {}
  int64_t capacity() const { return padded == kGroups ? kChunkRows : 1; }
  T* values(int64_t r) { return padded == kGroups ? short_values[r] : scratch; }
  T* grads(int64_t r) { return padded == kGroups ? short_grads[r] : scratch + padded; }

  /// values = logit(expert) and grads = grad_weights of the filled slots; -inf and 0 elsewhere.
  template <typename scalar_t, typename Logit>
  void gather(int64_t r, const Slots<scalar_t>& slots, const T* grad_weights, const Logit& logit) {
    using Vec = Vectorized<T>;
    T *const to = values(r), *const grads_to = grads(r);
    for (int64_t k = 0; k < padded; k += Vec::size()) {
      Vec(kNegativeInfinity<T>).store(to + k);
      Vec(T(0)).store(grads_to + k);
    }
    slots.for_each([&](int64_t k, int64_t expert) {
      to[k] = logit(expert);
      grads_to[k] = grad_weights[k];
    });
  }
};

/// Gradient of the tokens [begin, end) of a gate without any other loss: of the chosen logits only.
template <typename scalar_t>
void sparse_backward(const TopKGatingBackwardRows<scalar_t>& rows, int64_t begin, int64_t end,
                     compute_t<scalar_t>* scratch) {
  using T = compute_t<scalar_t>;
  const int64_t num_experts = rows.num_experts;
  SlotMemory<T> memory(rows.top_k, scratch);
  const int64_t capacity = memory.capacity();
  const auto takes_part = [&](int64_t token) {
    return rows.grad_weights != nullptr &&
           (rows.token_weights == nullptr || rows.token_weights[token] > 0);
  };
  for (int64_t first = begin; first < end; first += capacity) {
    const int64_t size = end - first < capacity ? end - first : capacity;
    __builtin_memset(rows.grad_logits + first * num_experts, 0,
                     size * num_experts * sizeof(scalar_t));
    for (int64_t r = 0; r < size; ++r) {
      const int64_t token = first + r;
      if (!takes_part(token)) continue;
      const scalar_t* const row = rows.logits + token * rows.row_stride;
      const scalar_t* const noise = rows.noise + token * rows.noise_stride;
      memory.gather(
          r, Slots<scalar_t>(rows, token), rows.grad_weights + token * rows.top_k,
          [&](int64_t expert) {
            const T x = static_cast<T>(row[expert]);
            return sanitize(rows.noise != nullptr ? x + static_cast<T>(noise[expert]) : x);
          });
    }
    with_score(rows.score_function, [&](auto kScore) {
      for (int64_t r = 0; r < size; ++r) {
        if (!takes_part(first + r)) continue;
        gate_gradient<kScore>(memory.padded, rows.norm_topk_prob, rows.scaling_factor,
                              memory.grads(r), memory.values(r));
      }
    });
    for (int64_t r = 0; r < size; ++r) {
      if (!takes_part(first + r)) continue;
      scalar_t* const grad_row = rows.grad_logits + (first + r) * num_experts;
      Slots<scalar_t>(rows, first + r).for_each([&](int64_t k, int64_t expert) {
        grad_row[expert] = static_cast<scalar_t>(memory.values(r)[k]);
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

  Chunk<T> chunk;
  ChunkMemory<T> memory;
  const int64_t part = padded_experts(num_experts);
  memory.give(num_experts, scratch, chunk);
  const int64_t padded = (num_experts + kGroups - 1) / kGroups * kGroups;
  T* const a = scratch + 3 * part;  // the gradient of prob_sum, padded with zeros
  SlotMemory<T> slot_memory(top_k, a + part);
  if (chunk.capacity > slot_memory.capacity()) chunk.capacity = slot_memory.capacity();
  int64_t segment_of_a = -1;
  for (int64_t e = 0; e < part; ++e) a[e] = 0;
  T grad_lse_squared = 0, grad_entropy = 0;
  const bool curved = is_curved(rows.score_function);
  T* const y = curved ? chunk.keys : chunk.x;  // where the gradient is written, too

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
    T common[kChunkRows];
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
    with_score(rows.score_function, [&](auto kScore) {
      for (int64_t r = 0; gate && r < chunk.size; ++r) {
        T *const values = slot_memory.values(r), *const grads = slot_memory.grads(r);
        if (gate_of_all) {
          common[r] -= gate_gradient_of_softmax(
              slot_memory.padded, rows.scaling_factor / chunk.totals[r], grads, values);
        } else {
          gate_gradient<kScore>(slot_memory.padded, rows.norm_topk_prob, rows.scaling_factor, grads,
                                values);
        }
      }
    });
    for (int64_t r = 0; r < chunk.size; ++r) {
      const T* const x = chunk.x + r * chunk.stride;
      const T* const exps = chunk.exps + r * chunk.stride;
      T* const out = y + r * chunk.stride;
      const T inverse = T(1) / chunk.totals[r];
      const Vec weight(chunk.token_weights[r]), shared(common[r]), share(inverse);
      const Vec of_entropy(chunk.token_weights[r] * grad_entropy);
      with_score(rows.score_function, [&](auto kScore) {
        for (int64_t e = 0; e < padded; e += Vec::size()) {
          const Vec slope = at::vec::fmadd(weight, Vec::loadu(a + e), shared) -
                            of_entropy * from_peak(Vec::loadu(out + e), chunk.peaks[r]);
          Vec grad = Vec::loadu(exps + e) * share * slope;
          if constexpr (kScore != ScoreFunction::kIdentity)
            grad = grad * log_score_slope<kScore>(Vec::loadu(x + e));
          grad.store(out + e);
        }
      });
      if (curved && needs_lse) {
        const Vec of_lse(grad_lse[r] / totals_of_x[r]);
        for (int64_t e = 0; e < padded; e += Vec::size()) {
          const Vec q = exponential(from_peak(Vec::loadu(x + e), peaks_of_x[r]));
          at::vec::fmadd(of_lse, q, Vec::loadu(out + e)).store(out + e);
        }
      }
      if (gate) {
        const T* const values = slot_memory.values(r);
        Slots<scalar_t>(rows, chunk.tokens[r]).for_each([&](int64_t k, int64_t expert) {
          out[expert] += values[k];
        });
      }
      store_row(out, num_experts, rows.grad_logits + chunk.tokens[r] * num_experts);
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
