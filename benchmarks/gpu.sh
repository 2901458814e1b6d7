#!/usr/bin/env bash
# benchmarks/gpu.py on a machine without a network: what is carried along is built there.
#
#     benchmarks/gpu.sh pack             here: fills build/gpu-carry/ (39 MB)
#     benchmarks/gpu.sh build            there: the engine with CUDA, our extension, llama-imatrix
#     benchmarks/gpu.sh measure [...]    there: benchmarks/gpu.py [...], into benchmarks/results/
#
# Take the working tree and build/gpu-carry/ along. `build` may be stopped and started again: it
# goes on where it was. It needs Linux, Python 3.10 or later with pip and NumPy, a C++ compiler and
# CUDA's nvcc; CMake, ninja, Cython, pybind11 and the rest are in build/gpu-carry/wheels. All weights of both models take 21 GB of disk.
#
# PACK_PYTHON (default 3.12) and PACK_PLATFORM: of the machine that will build.
# GPU_BACKEND=cpu: without CUDA, to see that all is there. That much was tried, without a package
# index; with CUDA nothing was, no GPU being at hand.
set -euo pipefail
cd "$(dirname "$0")/.."
here="$PWD"
carry="$here/build/gpu-carry"
built="$here/build/gpu"       # CMake's
work="$here/build/gpu-work"   # Python packages, and what else is found or made

pack() {
  local python="${VENV:-.venv}/bin/python" version="${PACK_PYTHON:-3.12}"
  test -x "$python" || python=python3
  "$python" vendor/fetch.py >/dev/null
  rm -rf "$carry"
  mkdir -p "$carry/wheels"
  # the backends that no machine here has are a good part of ggml
  tar -C vendor/llama.cpp -cJf "$carry/engine.tar.xz" \
    --exclude 'ggml/src/ggml-cann' --exclude 'ggml/src/ggml-et' --exclude 'ggml/src/ggml-hexagon' \
    --exclude 'ggml/src/ggml-metal' --exclude 'ggml/src/ggml-opencl' \
    --exclude 'ggml/src/ggml-openvino' --exclude 'ggml/src/ggml-sycl' \
    --exclude 'ggml/src/ggml-virtgpu' --exclude 'ggml/src/ggml-vulkan' \
    --exclude 'ggml/src/ggml-webgpu' --exclude 'ggml/src/ggml-zdnn' \
    --exclude 'ggml/src/ggml-zendnn' \
    .imatrix-pin CMakeLists.txt LICENSE cmake ggml include src common vendor \
    tools/imatrix tools/quantize tools/perplexity models/ggml-vocab-qwen35.gguf
  local platforms=()
  for platform in ${PACK_PLATFORM:-manylinux_2_28_x86_64 manylinux_2_27_x86_64 \
    manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux_2_12_x86_64 manylinux2010_x86_64 \
    manylinux_2_5_x86_64 manylinux1_x86_64}; do
    platforms+=(--platform "$platform")
  done
  # NumPy is left out: 17 MB, and where there is CUDA there is NumPy
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "$version" "${platforms[@]}" -d "$carry/wheels" \
    cython pybind11 cmake ninja gguf rich markdown-it-py mdurl pygments pyyaml tqdm
  du -sh "$carry"
}

# Python with the carried packages, which come before its own; of programs its own come first.
prepare_python() {
  site="$work/site"
  if [ ! -d "$site" ]; then
    mkdir -p "$work"
    rm -rf "$site.part"
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site.part" \
      "$carry"/wheels/*.whl
    mv "$site.part" "$site"
  fi
  export PYTHONPATH="$work/package:$site"
  export PATH="$PATH:$site/bin"
}

# Finds nvcc and cuBLAS wherever they are, and sets `cuda`, options for CMake.
find_cuda() {
  local nvcc root library
  nvcc="$(command -v nvcc || true)"
  for guess in "${CUDA_HOME:-/nowhere}"/bin/nvcc /usr/local/cuda/bin/nvcc /usr/local/cuda-*/bin/nvcc /opt/*/bin/nvcc; do
    if [ -z "$nvcc" ] && [ -x "$guess" ]; then nvcc="$guess"; fi
  done
  test -n "$nvcc" || nvcc="$(find / -xdev -name nvcc -type f -perm -u+x 2>/dev/null | head -n 1)"
  if [ -z "$nvcc" ]; then
    echo "no nvcc on this machine" >&2
    exit 1
  fi
  root="$(dirname "$(dirname "$(readlink -f "$nvcc")")")"
  # without the driver's memory pool: the driver's library need not be there to link
  cuda=(-DGGML_CUDA=ON -DGGML_CUDA_NO_VMM=ON -DCMAKE_CUDA_COMPILER="$nvcc"
    -DCUDAToolkit_ROOT="$root" -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-native}")
  if ! ls "$root"/lib64/libcublas.so "$root"/targets/*/lib/libcublas.so >/dev/null 2>&1; then
    # as Python's wheels have it: no name without a number, headers beside it
    library="$(find / -xdev -name 'libcublas.so.*' 2>/dev/null | head -n 1)"
    if [ -z "$library" ]; then
      echo "no libcublas on this machine" >&2
      exit 1
    fi
    mkdir -p "$work/cublas"
    ln -sf "$library" "$work/cublas/libcublas.so"
    ln -sf "$(ls "$(dirname "$library")"/libcublasLt.so.* | head -n 1)" "$work/cublas/libcublasLt.so"
    cuda+=(-DCUDA_cublas_LIBRARY="$work/cublas/libcublas.so"
      -DCUDA_cublasLt_LIBRARY="$work/cublas/libcublasLt.so"
      -DCMAKE_CUDA_FLAGS="-I$(dirname "$(dirname "$library")")/include"
      -DCMAKE_CXX_FLAGS="-I$(dirname "$(dirname "$library")")/include")
    export LD_LIBRARY_PATH="$(dirname "$library"):${LD_LIBRARY_PATH:-}"
  fi
}

# The engine's source, where vendor/fetch.py would put it: its stamp says that nothing is to be
# downloaded.
unpack() {
  engine="$here/vendor/llama.cpp"
  if [ ! -f "$engine/CMakeLists.txt" ]; then
    rm -rf "$work/engine.part"
    mkdir -p "$work/engine.part"
    tar -C "$work/engine.part" -xJf "$carry/engine.tar.xz"
    mkdir -p "$here/vendor"
    mv "$work/engine.part" "$engine"
  fi
}

build() {
  mkdir -p "$work"
  unpack
  prepare_python
  cuda=()
  if [ "${GPU_BACKEND:-cuda}" != cpu ]; then find_cuda; fi
  cmake -S . -B "$built" -G Ninja -DCMAKE_BUILD_TYPE=Release -DIMATRIX_BUILD_TOOLS=ON \
    -DPython_EXECUTABLE="$(command -v python3)" \
    ${cuda[@]+"${cuda[@]}"}
  cmake --build "$built" --target _session llama-imatrix
  # the package: our Python files and the module that was just built
  rm -rf "$work/package"
  mkdir -p "$work/package"
  cp -R src/imatrix "$work/package/"
  cp "$built"/_session.*.so "$work/package/imatrix/"
  python3 -c "import imatrix; print(imatrix.backends())"
}

measure() {
  prepare_python
  export IMATRIX_TOOLS="$built/bin"
  library="$(readlink -f "$work/cublas/libcublas.so" 2>/dev/null || true)"
  if [ -n "$library" ]; then export LD_LIBRARY_PATH="$(dirname "$library"):${LD_LIBRARY_PATH:-}"; fi
  python3 benchmarks/gpu.py "$@"
}

case "${1:-}" in
  pack | build) "$1" ;;
  measure) shift && measure "$@" ;;
  *)
    sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2
    exit 2
    ;;
esac
