// SPDX-License-Identifier: Apache-2.0
// The CPU kernels that move rows for moe_permute, moe_unpermute and their gradients, over raw
// pointers; ../ops/moe_rows.cpp splits the tokens among threads.
#pragma once

#include <cstdint>

namespace equipoise::cpu {

/// T tokens of K slots; `map[t, k]` is the row of slot (t, k), or -1. `weight_t` is the type of the
/// weights. A copy takes rows of any type as bytes: scalar_t is uint8_t.
template <typename scalar_t, typename weight_t>
struct MoeRows {
  const scalar_t* tokens;  // [T, H] read by copy and scatter
  int64_t token_stride;
  const scalar_t* rows;  // [N, H] read by gather, and by scatter where dots are wanted
  int64_t row_stride;
  const int64_t* map;       // [T, K]
  const weight_t* weights;  // [T, K]; gather: or null: 1
  scalar_t* out;            // copy and scatter: [N, H]; gather: [T, H]
  weight_t* dots;           // scatter: [T, K] or null
  int64_t top_k;
  int64_t width;  // H
  bool stream;    // copy and scatter: whether `out` is written past the caches
};

}  // namespace equipoise::cpu
