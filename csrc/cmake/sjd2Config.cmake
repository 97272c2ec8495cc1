# find_package(sjd2): the C core of an installed sjd2-engine.
#
#   cmake -DCMAKE_PREFIX_PATH=$(sjd2 config --prefix) ...      or  -Dsjd2_DIR=$(sjd2 config --cmake-dir)
#
# sjd2::sjd2              target: the library, with the folder of sjd2.h and sjd2.hpp
# sjd2_TORCH_OPS_SOURCE   torch_ops.cpp: compile it into a libtorch program, and it has the ops torch.ops.sjd2.*

get_filename_component(_sjd2_prefix "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
set(sjd2_TORCH_OPS_SOURCE "${_sjd2_prefix}/src/torch_ops.cpp")

if(NOT EXISTS "${_sjd2_prefix}/libsjd2.so")
  set(sjd2_FOUND FALSE)
  set(sjd2_NOT_FOUND_MESSAGE "${_sjd2_prefix} has no library: build it by `python -m sjd2_kernels.build`")
  return()
endif()

if(NOT TARGET sjd2::sjd2)
  add_library(sjd2::sjd2 SHARED IMPORTED)
  set_target_properties(sjd2::sjd2 PROPERTIES
    IMPORTED_LOCATION "${_sjd2_prefix}/libsjd2.so"
    INTERFACE_INCLUDE_DIRECTORIES "${_sjd2_prefix}/include")
endif()
unset(_sjd2_prefix)
