// SPDX-License-Identifier: Apache-2.0
// All that a C++ application includes, as <equipoise/equipoise.h>.
#pragma once

#include "export.h"
#include "nn/balance_loss.h"
#include "nn/moe_layer.h"
#include "nn/router.h"
#include "ops/balance_loss.h"
#include "ops/direct_losses.h"
#include "ops/dispatch_layout.h"
#include "ops/expert_bincount.h"
#include "ops/expert_choice.h"
#include "ops/moe_align_block_size.h"
#include "ops/moe_permute.h"
#include "ops/moe_unpermute.h"
#include "ops/sinkhorn.h"
#include "ops/sort_chunks_by_index.h"
#include "ops/topk_gating.h"
#include "version.h"
