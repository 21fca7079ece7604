# SPDX-License-Identifier: Apache-2.0
# Sets up .venv and build/ by itself; nothing outside this directory is changed.
#   make demo          train a small MoE model three times and write report/ (ARGS="--steps 50" is passed on)
#   make test          GoogleTest, a foreign CMake project, pytest and the doctests
#   make test-ptx      the CUDA kernels without a GPU: the tests marked cuda on an interpreter of PTX (PTXRUN=directory)
#   make kernels       writes docs/kernels.md: registers, machine code and memory traffic of the CUDA kernels, with limits
#   make nightly       what takes too long for every commit: make mutants (ARGS=numbers), test-schedules, test-asan and
#                      test-ptx-modes, which is test-ptx in ten runs instead of two
#   make bench         side-by-side tables (BENCH=gating, permute or losses for one of them; ARGS= is passed on)
#   make format        ruff and clang-format;  make format-check only looks
#   make clean         removes build/ and report/ (.venv stays)
# EQUIPOISE_CUDA=0 or 1 overrides whether the CUDA kernels are compiled.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-cpp test-consumer test-python test-ptx test-ptx-modes kernels nightly mutants \
        test-schedules test-asan bench format format-check clean prerequisites FORCE

PYTHON ?= python3
JOBS ?= 2
bin := .venv/bin
export PATH := $(CURDIR)/$(bin):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n '/^#   /s/^#   //p' Makefile

# ---- what the machine must have ----------------------------------------------------------------------
prerequisites:
	@command -v $(PYTHON) >/dev/null || { echo "python3 3.11 or newer is needed: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 3.11 or newer is needed, this is $$($(PYTHON) -V): name another with PYTHON="; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "python3 has no venv: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "the headers of python3 are needed: apt-get install python3-dev"; exit 1; }
	@major=$$( ($${CXX:-g++} -dumpversion 2>/dev/null || true) | cut -d. -f1); [ "$${major:-0}" -ge 11 ] 2>/dev/null || { echo "g++ 11 or newer is needed: apt-get install g++"; exit 1; }

# ---- .venv: stamps are files in it, so that removing it starts over --------------------------------------
requirements = $(bin)/python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))$(1)))"

$(bin)/python: | prerequisites
	$(PYTHON) -m venv .venv

.venv/torch.stamp: pyproject.toml | $(bin)/python
	@echo "installing torch (several GB, once)"
	@$(bin)/pip install -q -r <($(call requirements,['build-system']['requires']))
	@version=$$( (cmake --version 2>/dev/null || true) | sed -n 's/^cmake version //p'); \
	if [ "$$(printf '%s\n' 3.25 "$${version:-0}" | sort -V | head -1)" != 3.25 ]; then $(bin)/pip install -q 'cmake>=3.25'; fi
	@command -v ninja >/dev/null || $(bin)/pip install -q ninja
	@touch $@

.venv/dev.stamp: pyproject.toml | $(bin)/python
	@echo "installing ruff and clang-format"
	@$(bin)/pip install -q -r <($(call requirements,['project']['optional-dependencies']['dev']))
	@touch $@

# ---- the wheel, installed as a user gets it ------------------------------------------------------------
sources := CMakeLists.txt setup.py pyproject.toml $(shell find csrc cuda cmake python \
  \( -name __pycache__ -o -name '*.egg-info' \) -prune -o -print)
settings := $(EQUIPOISE_CUDA)|$(CMAKE_ARGS)|$(TORCH_CUDA_ARCH_LIST)|$(CUDA_HOME)|$(shell command -v nvcc)

.venv/settings.stamp: FORCE | $(bin)/python
	@cmp -s <(echo '$(settings)') $@ || echo '$(settings)' > $@

.venv/equipoise.stamp: $(sources) .venv/torch.stamp .venv/settings.stamp | prerequisites
	@mkdir -p build
	@echo "building and installing equipoise (log: build/install.log)"
	@$(bin)/pip install -v --no-build-isolation '.[test]' 2>&1 | tee build/install.log \
	  | sed -unE -e 's/^ *(\[ *[0-9]+(\/[0-9]+|%)\] .*)/\1/p' -e 's/^ *-- (equipoise .*)/\1/p' \
	  || { tail -n 60 build/install.log; exit 1; }
	@touch $@

demo: .venv/equipoise.stamp
	$(bin)/python -m equipoise.demo $(ARGS)

BENCH ?= gating permute losses
bench: .venv/equipoise.stamp
	for name in $(BENCH); do $(bin)/python benchmarks/$$name.py $(ARGS); done

# ---- tests ---------------------------------------------------------------------------------------------
test: test-cpp test-consumer test-python
	@echo "---- summary"
	@$(bin)/python -c "import torch; from equipoise import _build; \
	  print('CUDA kernels:', 'compiled,' if _build.cuda else 'not compiled (no toolkit, or EQUIPOISE_CUDA=0),', \
	        'run on ' + torch.cuda.get_device_name() if _build.cuda and torch.cuda.is_available() else 'not run (no GPU)')"
	@grep -E 'tests passed' build/ctest.log
	@tail -n 1 build/consumer.log
	@grep '^passed per backend' build/pytest.log
	@tail -n 1 build/pytest.log

# What the tests need is built in the tree that the wheel was built in, so that the library is compiled once.
build_tests = cmake -S . -B build/cmake -DBUILD_TESTING=ON > build/configure.log || { cat build/configure.log; exit 1; }; \
	cmake --build build/cmake

test-cpp: .venv/equipoise.stamp
	$(build_tests)
	ctest --test-dir build/cmake --output-on-failure -j $(JOBS) | tee build/ctest.log

test-consumer: .venv/equipoise.stamp
	cmake -S tests/consumer -B build/consumer -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_PREFIX_PATH="$$($(bin)/python -c 'import equipoise; print(equipoise.cmake_prefix_path)')"
	cmake --build build/consumer
	build/consumer/consumer | tee build/consumer.log

test-python: .venv/equipoise.stamp
	$(build_tests) --target equipoise_simt
	$(bin)/python -m pytest -n $(JOBS) --doctest-modules tests/python --pyargs equipoise $(ARGS) | tee build/pytest.log

# ---- the CUDA kernels without a GPU --------------------------------------------------------------------
# PTXRUN is a directory with `run`, which starts a program on an interpreter of PTX in place of a GPU.
PTXRUN ?= ../shared/ptxrun
build_ptx = cmake --build build/cmake --target equipoise_ptx_80 equipoise_ptx_90
if_cuda = $(bin)/python -c 'import sys; from equipoise import _build; sys.exit(not _build.cuda)' || \
	  { echo "$@ did not run: the CUDA kernels are not compiled"; exit 0; }

test-ptx: how_many := some
test-ptx-modes: how_many := all
test-ptx test-ptx-modes: .venv/equipoise.stamp
ifeq ($(wildcard $(PTXRUN)/run),)
	@echo "$@ did not run: no interpreter of PTX in $(PTXRUN) (PTXRUN= names its directory)"
else
	@$(if_cuda); \
	$(build_ptx); \
	tests/ptx.sh $(PTXRUN)/run $(bin)/python build $(how_many)
endif

# ---- machine code and memory traffic of the CUDA kernels ------------------------------------------------
.venv/nvdisasm.stamp: | $(bin)/python
	@command -v nvdisasm >/dev/null || $(bin)/pip install -q nvidia-cuda-nvdisasm
	@touch $@

kernels: .venv/equipoise.stamp .venv/nvdisasm.stamp
	@$(if_cuda); \
	$(build_ptx); \
	if [ -e $(PTXRUN)/run ]; then interpreter="--interpreter $(PTXRUN)/run"; \
	else echo "only the machine code: no interpreter of PTX in $(PTXRUN) (PTXRUN= names its directory)"; fi; \
	JOBS=$(JOBS) $(bin)/python tests/kernels/report.py build/cmake $$interpreter $(ARGS)

# ---- nightly -------------------------------------------------------------------------------------------
nightly: mutants test-schedules test-asan test-ptx-modes

# Breaks the CUDA sources in one place at a time: the tests of the ops must notice each.
mutants: .venv/equipoise.stamp
	$(bin)/python tests/simt/mutants.py build/mutants $(ARGS) | tee build/mutants.log

# The CUDA sources on the CPU under other random schedules, and with AddressSanitizer's eyes.
simt_tests = $(bin)/python -m pytest -q -n $(JOBS) -k simt tests/python
test-schedules: .venv/equipoise.stamp
	$(build_tests) --target equipoise_simt
	for seed in 2 3 4 5 6 7 8 9 10 11; do EQUIPOISE_SIMT_SEED=$$seed $(simt_tests); done

test-asan: .venv/equipoise.stamp
	cmake -S . -B build/asan -DEQUIPOISE_CUDA=OFF -DBUILD_TESTING=ON -DEQUIPOISE_SIMT_SANITIZE=address \
	  -DTORCH_INSTALL_PREFIX="$$($(bin)/python -c 'import torch; print(*torch.__path__)')" > build/configure.log
	cmake --build build/asan --target equipoise_simt
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 EQUIPOISE_SIMT_LIBRARY=build/asan/tests/simt/libequipoise_simt.so \
	  $(simt_tests) --ignore=tests/python/test_simt.py

# ---- style ---------------------------------------------------------------------------------------------
cpp_files = $(shell find csrc cuda tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: .venv/dev.stamp
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp_files)

format-check: .venv/dev.stamp
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $(cpp_files)

clean:
	rm -rf build report python/*.egg-info .pytest_cache .ruff_cache
	rm -f .venv/equipoise.stamp
