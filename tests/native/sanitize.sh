#!/usr/bin/env bash
# Compiles ext/, the core's tests and the binding with sanitizers, beside the engine's own libraries
# of a finished build (`make dev`), and runs them: the core's tests, and whole runs from Python.
#
# tests/native/sanitize.sh [address|thread]      address: ASan and UBSan, the default
set -eu

cd "$(dirname "$0")/../.."
kind="${1:-address}"
export PATH="$PWD/.venv/bin:$PATH" # cmake and ninja of `make dev`
source="${IMATRIX_LLAMA_CPP:-bundled}"
test "$source" != bundled || source=vendor/llama.cpp

engine=
for found in build/cp*/bin/libimatrix-llama.*; do
  engine="$(dirname "$found")"
done
if [ ! -e "$engine" ]; then
  echo "no engine libraries in build/cp*/bin: run 'make dev' first" >&2
  exit 1
fi

case "$kind" in
  address)
    flags="-fsanitize=address,undefined -fno-sanitize-recover=all"
    runtime="libasan.so"
    export ASAN_OPTIONS="detect_leaks=1:strict_string_checks=1:${ASAN_OPTIONS:-}"
    export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
    ;;
  thread)
    flags="-fsanitize=thread"
    runtime="libtsan.so"
    # The engine, OpenMP and the interpreter are not instrumented: how they hand memory from one
    # thread to another cannot be seen.
    export TSAN_OPTIONS="ignore_noninstrumented_modules=1:${TSAN_OPTIONS:-}"
    export OMP_NUM_THREADS=1
    ;;
  *)
    echo "usage: $0 [address|thread]" >&2
    exit 2
    ;;
esac

folder="build/sanitize-$kind"
cmake -S tests/native -B "$folder" -G Ninja \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS="$flags -fno-omit-frame-pointer" \
  -DPython_EXECUTABLE="$(command -v python)" \
  -DIMATRIX_ENGINE_LIB="$PWD/$engine" \
  -DIMATRIX_ENGINE_SOURCE="$(cd "$source" && pwd)" >/dev/null
cmake --build "$folder" --target imatrix-core-tests imatrix-row-tests imatrix-native-engine

# two small models, one with a head, for whole sessions
PYTHONPATH=tests python - "$folder" <<'PY'
import sys
from pathlib import Path

from helpers.forge import make_model

folder = Path(sys.argv[1])
make_model(folder / "dense.gguf", "llama")
make_model(folder / "head.gguf", "qwen35moe", n_nextn=1)
PY
"$folder/imatrix-row-tests"
"$folder/imatrix-core-tests" "$folder/dense.gguf" "$folder/head.gguf"

# The interpreter keeps a good deal until it ends, which LeakSanitizer cannot tell from ours: there
# our own count of native objects is asked.
if [ "$(uname)" = Linux ]; then
  export ASAN_OPTIONS="${ASAN_OPTIONS:-}:detect_leaks=0"
  LD_PRELOAD="$("${CXX:-c++}" -print-file-name="$runtime")" \
    python tests/native/end_to_end.py "$folder" "$folder/dense.gguf" "$folder/head.gguf"
fi
