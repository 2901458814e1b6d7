# Everything a person types. Each target makes its own .venv on a fresh machine
# (Python, a C++ compiler and git are enough; CMake and ninja come from the package index).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# `make dev CMAKE_DEFINES="GGML_CUDA=ON GGML_RPC=ON"` builds with those backends. The RPC backend
# is small, and its loopback stands in for a GPU in the tests.
CMAKE_DEFINES ?= GGML_RPC=ON
BUILD  := $(shell $(PYTHON) -c "import sys, sysconfig; t='cp%d%d' % sys.version_info[:2]; print('build/%s-%s-%s' % (t, t, sysconfig.get_platform().replace('-', '_').replace('.', '_')))")
STAMP  := $(VENV)/.dependencies
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test engine-check dev tools lint format types docs bench quality recipes sanitize fuzz dist dist-cuda try-dist workflows clean

help:
	@echo "make demo      build, then run the main job on a small trained model"
	@echo "make test      build, then lint, types and all tests"
	@echo "make engine-check  the tests that rest on the engine, after a move of the pin"
	@echo "make dev       editable install; again after a change, it takes seconds"
	@echo "make docs      the documentation as a site, build/site/index.html"
	@echo "make bench     benchmarks against llama-imatrix, written to benchmarks/results/"
	@echo "make quality   what head data are worth, by type, written there too (half an hour)"
	@echo "make recipes   recipes beside llama.cpp's mixtures, written there too (half an hour)"
	@echo "make sanitize  the core's tests and whole runs under ASan, UBSan and TSan"
	@echo "make fuzz      coverage-guided fuzzing of the readers, and of what opens models; RUNS=N each"
	@echo "make dist      the release's sdist and wheel into dist/, and what is in them checked"
	@echo "make dist-cuda the wheel of imatrix-cuda too (hours; CUDA_ARCHITECTURES=90 for one kind of card)"
	@echo "make try-dist  installs what is in dist/ in empty environments, and tries it"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

# Not isolated: the same interpreter, CMake and ninja each time, so that the engine in the
# persistent build folder stays built.
dev: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-build-isolation \
	  -C cmake.define.IMATRIX_BUILD_TOOLS=ON $(foreach d,$(CMAKE_DEFINES),-C cmake.define.$(d)) \
	  --editable .

demo: dev
	$(BIN)/imatrix demo

# llama-imatrix, llama-quantize, llama-perplexity and llama-speculative-simple of the same source,
# and the test-only module
tools: dev
	$(BIN)/cmake --build $(BUILD) --target imatrix-tools

# As many processes as there are cores, so that each has one thread for NumPy, and the engine's
# threads sleep while they wait for each other: where they spin, they take the cores from the other
# processes. The order of the files is that of tests/conftest.py.
ON_EVERY_CORE := OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=passive
test: lint types tools
	$(ON_EVERY_CORE) $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
	  --no-loadscope-reorder $(PYTEST_ARGS)

# the tests that hold assumptions about the engine, each with the engine's file it rests on;
# ENGINE_ARGS=--record notes these files once all pass
engine-check: tools
	$(ON_EVERY_CORE) $(BIN)/python tests/helpers/engine_check.py $(ENGINE_ARGS)

# the workflows by what is known of GitHub's; it asks nobody
workflows: $(STAMP)
	$(BIN)/python -m pip install --quiet --group release
	$(BIN)/zizmor --offline .github/workflows

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard ext/*.h ext/*.cpp src/imatrix/native/*.cpp tests/native/*.h tests/native/*.cpp vendor/cuda/*.c)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard ext/*.h ext/*.cpp src/imatrix/native/*.cpp tests/native/*.h tests/native/*.cpp vendor/cuda/*.c)

types: dev
	$(BIN)/mypy

# a broken link, a heading that is not there, a page that docs/index.md does not name: errors
docs: dev
	$(BIN)/python docs/make_cli.py
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -b html . build/site

bench: tools
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python -m pytest benchmarks --benchmark-only $(PYTEST_ARGS)

quality: dev
	$(BIN)/python benchmarks/quality.py

recipes: dev
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python benchmarks/recipes.py

sanitize: tools
	bash tests/native/sanitize.sh address
	bash tests/native/sanitize.sh thread

# found inputs stay in the folder; `tests/fuzz/run.py TARGET` runs one target
RUNS ?= 100000
fuzz: tools
	$(BIN)/python -m pip install --quiet --group fuzz
	for target in $$($(BIN)/python tests/fuzz/run.py list); do \
	  $(BIN)/python tests/fuzz/run.py $$target --runs $(RUNS) || exit 1; done
	$(BIN)/python tests/fuzz/engine.py build/fuzz --runs $(RUNS)

# the release's files, from a build folder of their own: every CPU variant, then the libraries that
# not every Linux has are put beside them (libgomp)
RELEASE := build/release
dist: $(STAMP)
	$(BIN)/python -m pip install --quiet --group release
	rm -rf dist $(RELEASE)
	$(BIN)/python -m build --no-isolation --sdist --outdir dist
	$(BIN)/python -m build --no-isolation --wheel --outdir $(RELEASE) \
	  -C cmake.define.IMATRIX_PORTABLE=ON -C "build-dir=build/release-{wheel_tag}"
	if [ "$$(uname)" = Linux ]; then $(BIN)/python -m auditwheel repair -w dist $(RELEASE)/*.whl; \
	  else cp $(RELEASE)/*.whl dist; fi
	$(BIN)/python tests/wheel/check_dist.py dist

# The CUDA backend by itself (vendor/cuda), for every card that CUDA 13 serves unless named; CUDA
# itself comes from the package index. What NVIDIA's packages, the driver and imatrix's wheel bring
# stays out of it.
dist-cuda: $(STAMP)
	$(BIN)/python -m pip install --quiet --group release
	rm -rf dist/imatrix_cuda-* $(RELEASE)-cuda
	$(BIN)/python -m build --wheel --outdir $(RELEASE)-cuda \
	  -C "build-dir=$(CURDIR)/build/cuda-{wheel_tag}" \
	  $(if $(CUDA_ARCHITECTURES),-C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)") vendor/cuda
	$(BIN)/python -m auditwheel repair $(foreach l,libcuda.so.1 libcudart.so.13 libcublas.so.13 libimatrix-ggml-base.so,--exclude $(l)) \
	  -w dist $(RELEASE)-cuda/*.whl
	$(BIN)/python tests/wheel/check_dist.py dist

# each file of dist/ installed in an empty environment: the wheel for the README's commands and a
# short suite, the sdist without a network, which compiles the engine; TRY_ARGS="--only wheel"
try-dist: $(STAMP)
	$(BIN)/python tests/wheel/try_dist.py dist $(TRY_ARGS)

clean:
	rm -rf build dist
