# SPDX-License-Identifier: Apache-2.0
# equipoise_add_torch(<root>): target equipoise_torch = the headers and libraries of the torch in <root>
# (site-packages/torch or libtorch), without find_package(Torch), which would ask for a CUDA toolkit.
# Sets equipoise_nvidia_lib_dirs, where pip's torch keeps its CUDA libraries.
function(equipoise_add_torch root)
  if(TARGET equipoise_torch)  # find_package was called twice
    return()
  endif()
  add_library(equipoise_torch INTERFACE IMPORTED GLOBAL)
  target_include_directories(equipoise_torch SYSTEM INTERFACE
    "${root}/include" "${root}/include/torch/csrc/api/include")
  # libtorch.so has no symbols of its own: it brings in libtorch_cuda.so where torch has one, without which a
  # program sees no CUDA device. Some linkers would drop it.
  target_link_libraries(equipoise_torch INTERFACE
    "-Wl,--push-state,--no-as-needed,${root}/lib/libtorch.so,--pop-state"
    "${root}/lib/libtorch_cpu.so" "${root}/lib/libc10.so")
  file(GLOB nvidia_lib_dirs "${root}/../nvidia/*/lib")
  foreach(dir IN LISTS nvidia_lib_dirs)  # so that ld takes these and not a toolkit's older copies
    target_link_options(equipoise_torch INTERFACE "LINKER:-rpath-link,${dir}")
  endforeach()
  set(equipoise_nvidia_lib_dirs "${nvidia_lib_dirs}" PARENT_SCOPE)
endfunction()
