// SPDX-License-Identifier: Apache-2.0
// In place of c10's header: the CUDA runtime that our host functions call, on the CPU's memory.
#pragma once

#include "simt.h"

#define C10_CUDA_CHECK(call) call
