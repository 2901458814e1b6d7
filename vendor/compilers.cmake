# The C and C++ compilers, or one message that says what is needed. CMake's own stops at the first
# thing that it misses, and knows neither C++17 nor that there are wheels.

set(_cure
  "A build from source needs a C compiler and one for C++17, with its standard library:\n"
  "  Debian, Ubuntu   apt-get install g++\n"
  "  Fedora, RHEL     dnf install gcc-c++\n"
  "  macOS            xcode-select --install\n"
  "  Windows          Visual Studio's Build Tools, \"Desktop development with C++\"\n"
  "CC and CXX name others than CMake finds. A wheel needs no compiler:\n"
  "  pip install --only-binary imatrix imatrix")

include(CheckLanguage)
foreach(_language C CXX)
  if(_language STREQUAL "C")
    set(_variable CC)
  else()
    set(_variable CXX)
  endif()
  set(_given "")
  if(DEFINED CMAKE_${_language}_COMPILER)
    set(_given " (CMAKE_${_language}_COMPILER=${CMAKE_${_language}_COMPILER})")
  elseif(DEFINED ENV{${_variable}})
    set(_given " (${_variable}=$ENV{${_variable}})")
  endif()
  string(REPLACE "CXX" "C++" _name "${_language}")
  check_language(${_language})
  if(NOT CMAKE_${_language}_COMPILER)
    unset(CMAKE_${_language}_COMPILER CACHE) # another try looks again
    message(FATAL_ERROR "imatrix: no ${_name} compiler that works was found${_given}.\n" ${_cure})
  endif()
  enable_language(${_language})
endforeach()

# by trying: of an old compiler CMake knows what it was written for, and its library may be older
include(CheckCXXSourceCompiles)
check_cxx_source_compiles("
  #include <filesystem>
  #include <optional>
  #include <string_view>
  int main() {
    std::optional<std::string_view> name = \"x\";
    return std::filesystem::path(*name).empty() ? 1 : 0;
  }" IMATRIX_CXX17)
if(NOT IMATRIX_CXX17)
  unset(IMATRIX_CXX17 CACHE)
  message(FATAL_ERROR
    "imatrix: ${CMAKE_CXX_COMPILER} (${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}) does not "
    "compile C++17 with <filesystem>.\n" ${_cure})
endif()
