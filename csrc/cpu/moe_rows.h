// SPDX-License-Identifier: Apache-2.0
// The CPU kernels that move rows for moe_permute, moe_unpermute and their gradients, over raw
// pointers;
// ../ops/moe_rows.cpp splits the tokens among threads.
#pragma once

#include <cstdint>

namespace equipoise::cpu {

/// T tokens of K slots; `map[t, k]` is the row of slot (t, k), or -1. `weight_t` is the type of the
/// weights.
template <typename scalar_t, typename weight_t>
struct MoeRows {
  const scalar_t* tokens;  // [T, H] read by scatter and dot
  int64_t token_stride;
  const scalar_t* rows;     // [N, H] read by gather and dot
  const int64_t* map;       // [T, K]
  const weight_t* weights;  // [T, K] or null: 1
  scalar_t* out;            // scatter: [N, H]; gather: [T, H]
  weight_t* dots;           // dot: [T, K]
  int64_t top_k;
  int64_t width;  // H
};

}  // namespace equipoise::cpu
