// SPDX-License-Identifier: Apache-2.0
// The choices of topk_gating as its kernels take them; plain C++, shared by the API, the CPU and
// the CUDA side.
#pragma once

#include <cstdint>

namespace equipoise {

/// How a logit x becomes a score s(x). Kernels mostly need y = log s, of which the probabilities
/// and the renormalised weights are the softmax, and phi = dy/dx:
///
///   softmax       y = x                    phi = 1   (s is x normalised: p = s)
///   sigmoid       y = -log(1 + exp(-x))    phi = 1 - s
///   sqrtsoftplus  y = log(softplus(x)) / 2 phi = sigmoid(x) / (2 softplus(x)), 1/2 for x -> -inf
///   identity      y = x                    phi = 1   (the weights are the chosen x themselves)
enum class ScoreFunction : int32_t { kSoftmax, kSigmoid, kSqrtSoftplus, kIdentity };

/// How the experts of a group become the group's score.
enum class GroupScore : int32_t { kMax, kTop2Sum };

}  // namespace equipoise
