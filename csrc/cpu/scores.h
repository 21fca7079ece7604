// SPDX-License-Identifier: Apache-2.0
// Exponentials and the score functions of ../ops/score_function.h, one vector at a time; for
// kernels of csrc/cpu, compiled once per instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

#include "../ops/score_function.h"

namespace equipoise::cpu::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

template <typename T>
constexpr T kNegativeInfinity = -__builtin_huge_val();
template <typename T>
constexpr T kLowest = std::is_same_v<T, double> ? -__DBL_MAX__ : -__FLT_MAX__;

/// exp(x) for x <= 1000. For float32 on AVX-512 without a call: 2^n (1 + r (1 + r q(r))) with
/// x = n log 2 + r, |r| <= log(2) / 2, and q of degree 4 fitted to a relative error of 3e-9; within
/// 1 ulp of exp, as the library's, and 0 where exp would be denormal, which the hardware is slow
/// at.
template <typename T>
__attribute__((always_inline)) inline Vectorized<T> exponential(Vectorized<T> x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33654f), _CMP_GE_OQ);
    const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 2^23: adding it rounds to an integer
    const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), magic), magic);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // log 2, exact in 10 bits
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);      // and its remainder
    __m512 q = _mm512_set1_ps(0.001381459878757596f);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.008368716575205326f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.04166838899254799f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.1666652113199234f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.4999999403953552f));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 power = _mm512_fmadd_ps(_mm512_fmadd_ps(q, r, one), r, one);
    return _mm512_maskz_scalef_ps(normal, power, n);
  }
#endif
  return x.exp();
}

template <typename T>
T sum_of_lanes(Vectorized<T> value) {
  return at::vec::vec_reduce_all<T>([](auto& a, auto& b) { return a + b; }, value);
}

/// x - peak, at least -1000: an expert that far below has p = 0, and an infinity must not meet that
/// 0.
template <typename T>
Vectorized<T> from_peak(Vectorized<T> x, Vectorized<T> peak) {
  return at::vec::clamp_min(x - peak, Vectorized<T>(T(-1000)));
}

// Below this softplus(x) and sigmoid(x) are exp(x), to the last bit of float64.
template <typename T>
constexpr T kScoreIsExp = -37;

/// 1 / (1 + exp(-x)); 0 for -inf.
template <typename T>
__attribute__((always_inline)) inline Vectorized<T> sigmoid(Vectorized<T> x) {
  using Vec = Vectorized<T>;
  return Vec(1) / (Vec(1) + exponential(at::vec::clamp_max(x.neg(), Vec(T(1000)))));
}

#if defined(CPU_CAPABILITY_AVX512)
/// sigmoid(x), off by less than kRoughSigmoidError: exp(-x) is 2^n (a + f (b + f c)), to 0.18 %, of
/// which 1 / (1 + exp(-x)) gets a quarter at most; the reciprocal has 14 bits.
inline __m512 rough_sigmoid(__m512 x) {
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));  // n + f, 0 <= f < 1
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
  __m512 power = _mm512_fmadd_ps(f, _mm512_set1_ps(0.33718943f), _mm512_set1_ps(0.65763628f));
  power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(1.00172476f));
  return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(power, t)));
}
constexpr float kRoughSigmoidError = 1.0f / 1024;
#endif

/// log(1 + exp(-|x|)).
template <typename T>
Vectorized<T> log_one_plus_exp(Vectorized<T> x) {
  return exponential(x.abs().neg()).log1p();
}

/// s(x); of an absent expert, x = -inf, 0 (identity: -inf).
template <ScoreFunction kScore, typename T>
__attribute__((always_inline)) inline Vectorized<T> score(Vectorized<T> x) {
  if constexpr (kScore == ScoreFunction::kSigmoid) {
    return sigmoid(x);
  } else if constexpr (kScore == ScoreFunction::kSqrtSoftplus) {
    return (at::vec::clamp_min(x, Vectorized<T>(0)) + log_one_plus_exp(x)).sqrt();
  } else {
    return x;
  }
}

/// log s(x); of an absent expert -inf.
template <ScoreFunction kScore, typename T>
Vectorized<T> log_score(Vectorized<T> x) {
  using Vec = Vectorized<T>;
  if constexpr (kScore == ScoreFunction::kSigmoid) {
    return at::vec::clamp_max(x, Vec(0)) - log_one_plus_exp(x);
  } else if constexpr (kScore == ScoreFunction::kSqrtSoftplus) {
    const Vec softplus = at::vec::clamp_min(x, Vec(0)) + log_one_plus_exp(x);
    return Vec(T(0.5)) * Vec::blendv(softplus.log(), x, x < Vec(kScoreIsExp<T>));
  } else {
    return x;
  }
}

/// The derivative of log s(x).
template <ScoreFunction kScore, typename T>
Vectorized<T> log_score_slope(Vectorized<T> x) {
  using Vec = Vectorized<T>;
  if constexpr (kScore == ScoreFunction::kSigmoid) {
    return sigmoid(x.neg());
  } else if constexpr (kScore == ScoreFunction::kSqrtSoftplus) {
    const Vec softplus = at::vec::clamp_min(x, Vec(0)) + log_one_plus_exp(x);
    return Vec::blendv(sigmoid(x) / (softplus + softplus), Vec(T(0.5)), x < Vec(kScoreIsExp<T>));
  } else {
    return Vec(1);
  }
}

/// `value`, or -inf where the logit x is absent.
template <typename T>
__attribute__((always_inline)) inline Vectorized<T> unless_absent(Vectorized<T> x,
                                                                  Vectorized<T> value) {
  const Vectorized<T> absent(kNegativeInfinity<T>);
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, absent, _CMP_EQ_OQ), absent);
  }
#endif
  return Vectorized<T>::blendv(value, absent, x == absent);
}

/// Numbers in proportion to the scores (identity: to exp(x)), of which the largest, that of the
/// logit `top`, is far from 0: what renormalised weights are made of without 0 / 0.
template <ScoreFunction kScore, typename T>
__attribute__((always_inline)) inline Vectorized<T> in_proportion(Vectorized<T> x,
                                                                  Vectorized<T> top) {
  using Vec = Vectorized<T>;
  const Vec distance = from_peak(x, top);
  if constexpr (kScore == ScoreFunction::kIdentity) return exponential(distance);
  const Vec far = Vec(kScoreIsExp<T>) < top;
  if (far.zero_mask() == 0) return score<kScore>(x);
  constexpr T kSlope = kScore == ScoreFunction::kSqrtSoftplus ? 0.5 : 1;
  return Vec::blendv(exponential(distance * Vec(kSlope)), score<kScore>(x), far);
}

/// Calls function(std::integral_constant) with the score function as a constant.
template <typename Function>
void with_score(ScoreFunction score_function, const Function& function) {
  switch (score_function) {
    case ScoreFunction::kSigmoid:
      return function(std::integral_constant<ScoreFunction, ScoreFunction::kSigmoid>{});
    case ScoreFunction::kSqrtSoftplus:
      return function(std::integral_constant<ScoreFunction, ScoreFunction::kSqrtSoftplus>{});
    default:  // softmax is the identity, but for what makes it sum to 1
      return function(std::integral_constant<ScoreFunction, ScoreFunction::kIdentity>{});
  }
}

/// Whether log s(x) is not x itself.
inline bool is_curved(ScoreFunction score_function) {
  return score_function == ScoreFunction::kSigmoid ||
         score_function == ScoreFunction::kSqrtSoftplus;
}

}  // namespace
}  // namespace equipoise::cpu::CPU_CAPABILITY
