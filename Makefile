# Each target sets up what it needs on a bare Debian-like machine (Python >= 3.10, apt-get when root), then runs.
# A second run installs and builds nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc cmake tests/cpp tests/simt tests/gpu -type f -not -name '*.py*') CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-long bench bench-quick gpu-check lint format build clean

# Waiting threads sleep: on a busy machine, spinning ones take the cores from those that work.
demo: $(VENV)/.cli
	OMP_WAIT_POLICY=passive $(BIN)/python -m freqrank demo

# CUDA is compiled here wherever nvcc is, for the GPUs of FREQRANK_CUDA_ARCHS if that is set; no GPU is needed.
test: $(VENV)/.test $(VENV)/.cpp-tests
	$(BIN)/ctest --test-dir build/native --output-on-failure
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Sweeps too long for every change. The log is kept in the repository.
test-long: $(VENV)/.test
	set -o pipefail; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long -n 2 --durations=10 2>&1 | tee docs/test-long.log

# Rewrites bench/results in some 30 minutes. On an idle machine, or the figures mean nothing.
bench: $(VENV)/.bench
	$(BIN)/python -m bench.python.run $(if $(QUICK),--quick)
	$(BIN)/python -m bench.python.cpp $(if $(QUICK),--quick) build/native/bench/cpp/freqrank_bench

# A minute; writes to build/bench-quick.
bench-quick:
	$(MAKE) bench QUICK=1

# On a machine with an NVIDIA GPU: builds for it, tests, measures. Needs torch, numpy, pytest, nvcc, cmake and ninja in
# PYTHON and on the PATH, no network and nothing of what the other targets set up. Where there is no GPU, tools/gpu-check
# exits 3; make says `Error 3` and exits 2 itself, as after any failure.
OUT ?= build/gpu-check-output
gpu-check:
	@$(PYTHON) tools/gpu-check --out "$(OUT)" --peers "$(PEERS)"

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

# The package, editable, with nothing but what the ops need.
build: $(VENV)/.build

clean:
	rm -rf $(VENV) build python/freqrank/_lib demo-output

SHELL := /bin/bash
# It configures the build without C++ tests and, for a torch without CUDA, without CUDA: both are to be built again.
INSTALL = rm -f $(VENV)/.cpp-tests && $(BIN)/pip install -q --no-build-isolation -e

$(VENV)/.torch:
	tools/bare-machine $(PYTHON) $(VENV)
	touch $@

$(VENV)/.build: $(VENV)/.torch $(SOURCES)
	$(INSTALL) .
	touch $@

$(VENV)/.cli: $(VENV)/.build
	$(INSTALL) '.[cli]'
	touch $@

$(VENV)/.test: $(VENV)/.build
	$(INSTALL) '.[test]'
	touch $@

$(VENV)/.bench: $(VENV)/.build $(wildcard bench/cpp/*)
	$(INSTALL) '.[bench]'
	tools/bare-machine --system-only libbenchmark-dev
	$(BIN)/cmake -S . -B build/native -DFREQRANK_BENCH=ON >/dev/null
	$(BIN)/cmake --build build/native --target freqrank_bench
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) '.[test,lint]'
	touch $@

$(VENV)/.cpp-tests: $(VENV)/.test
	tools/bare-machine --system-only libgtest-dev libboost-context-dev
	$(BIN)/python -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || \
	  tools/bare-machine --system-only python3-dev
	$(BIN)/cmake -S . -B build/native -DFREQRANK_TESTS=ON -DPython3_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DFREQRANK_CUDA=AUTO -DFREQRANK_CUDA_WERROR=ON "-DFREQRANK_CUDA_ARCHS=$(FREQRANK_CUDA_ARCHS)" >/dev/null
	$(BIN)/cmake --build build/native
	touch $@
