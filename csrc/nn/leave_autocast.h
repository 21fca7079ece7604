// SPDX-License-Identifier: Apache-2.0
// LeaveAutocast: arithmetic that stays in float32 where torch's autocast is on.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace equipoise::nn {

/// Nothing is cast by autocast while this lives.
struct LeaveAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace equipoise::nn
