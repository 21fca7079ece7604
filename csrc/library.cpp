// SPDX-License-Identifier: Apache-2.0
// Declares the operator library. Each op adds its own schemas in csrc/ops/X.cpp
// (TORCH_LIBRARY_FRAGMENT).
#include "library.h"

#include <torch/library.h>

#include "version.h"

namespace equipoise {

const char* version() { return EQUIPOISE_VERSION; }

}  // namespace equipoise

TORCH_LIBRARY(equipoise, m) { (void)m; }
