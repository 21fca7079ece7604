// SPDX-License-Identifier: Apache-2.0
// EQUIPOISE_API marks what libequipoise.so exports; everything else in it is hidden.
#pragma once

#define EQUIPOISE_API __attribute__((visibility("default")))
