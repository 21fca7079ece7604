// SPDX-License-Identifier: Apache-2.0
// The operator library's name, in one place, and the look-up of its operators.
//
// A test library can compile these sources a second time under another name with
// -Dequipoise=<name>: the namespace, the registrations and every look-up below follow, because no
// other line spells the library's name as a string.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

#define EQUIPOISE_STRINGIZE_(name) #name
#define EQUIPOISE_STRINGIZE(name) EQUIPOISE_STRINGIZE_(name)
#define EQUIPOISE_LIBRARY_NAME EQUIPOISE_STRINGIZE(equipoise)

// Whom the CUDA side of an op serves. The test library runs it on the tensors of the CPU, whose own
// kernels it leaves out.
#ifdef EQUIPOISE_SIMT
#define EQUIPOISE_CUDA_KEY CPU
#else
#define EQUIPOISE_CUDA_KEY CUDA
#endif

namespace equipoise {

/// The registered operator `name` of this library. Keep the handle in a static of a function that
/// is local to one source file: a static of an inline function would be shared between two copies
/// of the library in one process.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  const std::string qualified = std::string(EQUIPOISE_LIBRARY_NAME "::") + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(qualified.c_str(), "").typed<Signature>();
}

/// A function of (first argument, Parameters) with the signature of a schema: `Parameters` is an
/// aggregate of the schema's other arguments in their order, so that an op with many arguments
/// lists them once.
template <auto function, typename Parameters, typename Signature>
struct WithSchema;
template <auto function, typename Parameters, typename Result, typename First, typename... Rest>
struct WithSchema<function, Parameters, Result(First, Rest...)> {
  static Result call(First first, Rest... rest) { return function(first, Parameters{rest...}); }
};

}  // namespace equipoise
