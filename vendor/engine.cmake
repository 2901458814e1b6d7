# The engine as CMake targets: llama, ggml, ggml-base and the chosen backends, shared.
#
# IMATRIX_LLAMA_CPP (define or environment): "bundled", or a llama.cpp source folder.
# Engine options (GGML_CUDA, GGML_METAL, GGML_VULKAN, GGML_RPC, GGML_BLAS, ...) are
# the engine's own cache variables: give them as -DGGML_CUDA=ON and they reach it.
#
# IMATRIX_PORTABLE: what a wheel for others needs. Its backends are modules that the package loads
# when it runs, the CPU's in a variant for each set of instructions, so that nothing in it is
# compiled for the machine that it was built on.

if(NOT DEFINED IMATRIX_LLAMA_CPP AND DEFINED ENV{IMATRIX_LLAMA_CPP})
  set(IMATRIX_LLAMA_CPP "$ENV{IMATRIX_LLAMA_CPP}")
endif()
set(IMATRIX_LLAMA_CPP "${IMATRIX_LLAMA_CPP}" CACHE STRING
    "Where llama.cpp comes from: bundled, or the path of a source folder")
if(IMATRIX_LLAMA_CPP STREQUAL "")
  set(IMATRIX_LLAMA_CPP "bundled")
endif()

if(IMATRIX_LLAMA_CPP STREQUAL "bundled")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/fetch.py"
    OUTPUT_VARIABLE _fetched OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE _status ERROR_VARIABLE _why)
  if(NOT _status EQUAL 0)
    message(FATAL_ERROR "${_why}")
  endif()
  set(IMATRIX_ENGINE_SOURCE "${CMAKE_CURRENT_LIST_DIR}/llama.cpp")
else()
  get_filename_component(IMATRIX_ENGINE_SOURCE "${IMATRIX_LLAMA_CPP}" ABSOLUTE)
  foreach(_needed include/llama.h src/llama-ext.h ggml/CMakeLists.txt)
    if(NOT EXISTS "${IMATRIX_ENGINE_SOURCE}/${_needed}")
      message(FATAL_ERROR
        "IMATRIX_LLAMA_CPP=${IMATRIX_LLAMA_CPP}: ${IMATRIX_ENGINE_SOURCE}/${_needed} does not exist.\n"
        "Give the top folder of a llama.cpp source tree (with ggml inside), or 'bundled'.")
    endif()
  endforeach()
endif()
message(STATUS "engine source: ${IMATRIX_ENGINE_SOURCE}")

file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/llama.cpp.toml" _pin REGEX "^build ")
string(REGEX MATCH "build += \"([^\"]+)\"" _ "${_pin}")
set(IMATRIX_ENGINE_BUILD "${CMAKE_MATCH_1}")
if(NOT IMATRIX_LLAMA_CPP STREQUAL "bundled")
  set(IMATRIX_ENGINE_BUILD "unknown")
endif()
# The archive is no git checkout: ggml would ask the repository around it, report our commit
# as its own and compile again after each of ours (ggml/CMakeLists.txt).
set(ENV{GIT_DIR} "${IMATRIX_ENGINE_SOURCE}")
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT "unknown")
if(IMATRIX_ENGINE_BUILD MATCHES "^build ([0-9]+)$")
  set(LLAMA_BUILD_NUMBER "${CMAKE_MATCH_1}")
else()
  set(LLAMA_BUILD_COMMIT "${IMATRIX_ENGINE_BUILD}")
endif()

option(IMATRIX_PORTABLE "Build for other machines: every CPU variant as a module, chosen at run time"
       OFF)
if(IMATRIX_PORTABLE)
  set(GGML_NATIVE OFF)
  set(GGML_BACKEND_DL ON)
  set(GGML_CPU_ALL_VARIANTS ON)
  # small, and without a server it does nothing
  if(NOT DEFINED GGML_RPC)
    set(GGML_RPC ON)
  endif()
  # a module that needs libibverbs only because the machine that built it had it
  set(GGML_RPC_RDMA OFF)
endif()

set(BUILD_SHARED_LIBS ON)                 # two extension modules, one set of ggml globals
set(CMAKE_PLATFORM_NO_VERSIONED_SONAME ON) # a wheel holds no symlinks: one file a library
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(LLAMA_BUILD_IS_DEV OFF)
set(LLAMA_ALL_WARNINGS OFF)
set(LLAMA_OPENSSL OFF)
foreach(_part COMMON TESTS TOOLS EXAMPLES SERVER APP)
  set(LLAMA_BUILD_${_part} OFF)
endforeach()
set(LLAMA_TOOLS_INSTALL OFF)

if(APPLE)
  set(_origin "@loader_path")
else()
  set(_origin "$ORIGIN")
endif()
set(CMAKE_INSTALL_RPATH "${_origin}")
set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)

if(IMATRIX_BUILD_TOOLS)
  set(LLAMA_BUILD_COMMON ON)
endif()
add_subdirectory("${IMATRIX_ENGINE_SOURCE}" engine EXCLUDE_FROM_ALL)
set(ENV{GIT_DIR})

set(IMATRIX_ENGINE_LIBRARIES llama ggml ggml-base ${GGML_AVAILABLE_BACKENDS})

# llama_internal_get_tensor_map (src/llama-model.h), which ext/weights.cpp calls, is not marked for
# export; elsewhere every symbol is visible.
set_target_properties(llama PROPERTIES WINDOWS_EXPORT_ALL_SYMBOLS ON)

# GCC's _tile_loadconfig says of the 64 bytes that it reads only that it reads the first 8
# (amxtileintrin.h), so the rows and columns that ggml_tile_config_init writes are left out
# (ggml-cpu/amx/mmq.cpp), and the first product of a quantized type on AMX ends the process with
# SIGILL. F16 and BF16 use no tiles, and without AMX the variant that would have it is zen4's.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-mno-amx-tile IMATRIX_HAS_NO_AMX)
  if(IMATRIX_HAS_NO_AMX AND TARGET ggml-cpu)
    target_compile_options(ggml-cpu PRIVATE -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
  endif()
  if(TARGET ggml-cpu-sapphirerapids) # not installed, so next to nothing of it is compiled
    list(REMOVE_ITEM IMATRIX_ENGINE_LIBRARIES ggml-cpu-sapphirerapids)
    set_target_properties(ggml-cpu-sapphirerapids PROPERTIES
      SOURCES "${IMATRIX_ENGINE_SOURCE}/ggml/src/ggml-cpu/hbm.cpp")
  endif()
endif()

# A library is found by its name alone if one of that name is loaded already (on Linux its soname, on
# Windows its file name): the libllama and libggml of another package in the process, such as
# llama-cpp-python, would take the place of these, or these of theirs. Modules are opened by their
# path and keep the names that the engine looks for.
foreach(_library ${IMATRIX_ENGINE_LIBRARIES})
  get_target_property(_type ${_library} TYPE)
  if(_type STREQUAL "SHARED_LIBRARY")
    set_target_properties(${_library} PROPERTIES OUTPUT_NAME "imatrix-${_library}")
    # one of an earlier build under the engine's name would be taken for a module
    file(REMOVE "${CMAKE_BINARY_DIR}/bin/${CMAKE_SHARED_LIBRARY_PREFIX}${_library}${CMAKE_SHARED_LIBRARY_SUFFIX}")
    if(NOT APPLE AND NOT WIN32)
      # a copy that the whole process sees must not have its objects constructed again by this one
      target_link_options(${_library} PRIVATE "LINKER:-Bsymbolic")
    endif()
  endif()
endforeach()

# The engine's own programs, for tests and benchmarks only: never installed.
if(IMATRIX_BUILD_TOOLS)
  set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
  set(_tools tools/imatrix tools/quantize tools/perplexity examples/speculative-simple)
  set(_programs llama-imatrix llama-quantize llama-perplexity llama-speculative-simple)
  if(GGML_RPC)
    list(APPEND _tools tools/rpc)
    list(APPEND _programs ggml-rpc-server)
  endif()
  foreach(_tool ${_tools})
    add_subdirectory("${IMATRIX_ENGINE_SOURCE}/${_tool}" "engine/${_tool}" EXCLUDE_FROM_ALL)
  endforeach()

  # llama-imatrix --nextn as it is meant: the program of 0.6.0 hands the head its state as a token's
  # embedding (nextn_collector::decode in tools/imatrix/imatrix.cpp), on which the engine ends the
  # process. Here its two calls hand it over as a state. Of an engine that has mended this itself
  # nothing is replaced.
  file(READ "${IMATRIX_ENGINE_SOURCE}/tools/imatrix/imatrix.cpp" _nextn)
  string(REPLACE "batch.set_embd(" "batch.set_embd_state(" _nextn "${_nextn}")
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/imatrix-nextn.cpp.new" "${_nextn}")
  configure_file("${CMAKE_CURRENT_BINARY_DIR}/imatrix-nextn.cpp.new"
                 "${CMAKE_CURRENT_BINARY_DIR}/imatrix-nextn.cpp" COPYONLY)
  add_executable(llama-imatrix-nextn EXCLUDE_FROM_ALL
                 "${CMAKE_CURRENT_BINARY_DIR}/imatrix-nextn.cpp")
  target_link_libraries(llama-imatrix-nextn PRIVATE llama-common llama)
  list(APPEND _programs llama-imatrix-nextn)

  add_custom_target(imatrix-tools DEPENDS ${_programs})
endif()
