# The version of the C interface, as sjd2.h has it: the same major version is compatible, if it is not older.

file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../include/sjd2.h" _sjd2_line REGEX "^#define SJD2_VERSION +[0-9]+")
string(REGEX REPLACE "^#define SJD2_VERSION +([0-9]+).*" "\\1" _sjd2_number "${_sjd2_line}")
math(EXPR _sjd2_major "${_sjd2_number} / 10000")
math(EXPR _sjd2_minor "${_sjd2_number} / 100 % 100")
math(EXPR _sjd2_patch "${_sjd2_number} % 100")
set(PACKAGE_VERSION "${_sjd2_major}.${_sjd2_minor}.${_sjd2_patch}")

set(PACKAGE_VERSION_COMPATIBLE FALSE)
if(PACKAGE_FIND_VERSION_MAJOR EQUAL _sjd2_major AND NOT PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
if(PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
endif()
