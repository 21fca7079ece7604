// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "export.h"

namespace equipoise {

/// The version of the library, as "0.1.0". An application that only uses registered ops (through
/// the dispatcher or a scripted model) calls this once, so that the linker keeps the library.
EQUIPOISE_API const char* version();

}  // namespace equipoise
