// SPDX-License-Identifier: Apache-2.0
// All that a C++ application includes, as <equipoise/equipoise.h>.
#pragma once

#include "export.h"
#include "nn/balance_loss.h"
#include "nn/moe_layer.h"
#include "nn/router.h"
#include "ops/balance_loss.h"
#include "ops/expert_bincount.h"
#include "ops/moe_permute.h"
#include "ops/moe_unpermute.h"
#include "ops/topk_gating.h"

namespace equipoise {

/// The version of the library, as "0.1.0". An application that only uses registered ops (through
/// the dispatcher or a scripted model) calls this once, so that the linker keeps the library.
EQUIPOISE_API const char* version();

}  // namespace equipoise
