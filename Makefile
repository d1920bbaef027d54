# Everything runs in one virtual environment with the tested versions (constraints.txt).  Each target can be
# repeated; the environment is made again only when pyproject.toml or constraints.txt change.
#
#   make demo PYTHON=python3.12      another interpreter (>= 3.11)
#   make test PYTEST_ARGS='-x -k cache'
#   make test PYTEST_ARGS='-q -n 1'  one test process instead of one a core

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -q -n auto --dist worksteal
# The test processes share the cores; more threads than cores only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.hisa_compile-installed
# The oldest Triton that kernels have to compile with (torch 2.11's), beside the tested one.
OLD_TRITON := $(VENV)/triton-3.6.0

GPU_TESTS := $(wildcard tests/test_triton_*.py) tests/test_gpu_models.py $(wildcard tests/test_fidelity*.py) $(wildcard tests/test_shadow*.py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-old-triton test-slow test-gpu check fidelity clean

help:
	@echo "make demo   install into $(VENV), then compile a small DeepSeek-V3.2 with HISA (examples/quickstart.py)"
	@echo "make test   install into $(VENV), then run the test suite (GPU tests skip without a GPU)"
	@echo "make test-old-triton  compile the kernels of sm_90 with the oldest Triton that is supported"
	@echo "make test-slow  every model and case, ten thousand programs, a sweep: several hours on 2 cores"
	@echo "make test-gpu  what has code of its own for a GPU, on a machine with one"
	@echo "make check  install into $(VENV), then run ruff and mypy"
	@echo "make fidelity  what HISA costs a real model: fetches one and long texts (150 MB), measures, draws"
	@echo "make clean  remove $(VENV) and what the tools left behind"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) PYTEST_ARGS='$(PYTEST_ARGS)'"

demo: $(INSTALLED)
	@echo "== running examples/quickstart.py"
	@# Inductor's cache of its own: what other versions or environments left in the shared one is not met here.
	TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-cache $(BIN)/python examples/quickstart.py

test: $(INSTALLED)
	@echo "== running the test suite, a quarter of an hour on 2 cores"
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-old-triton: $(OLD_TRITON)
	@echo "== compiling the kernels with $(notdir $(OLD_TRITON))"
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -c 'import triton; assert f"triton-{triton.__version__}" == "$(notdir $(OLD_TRITON))"'
	PYTHONPATH=$(OLD_TRITON) $(PYTEST) tests/test_triton_compile.py tests/test_triton_again.py $(PYTEST_ARGS) -k "sm_90 or awkward or (of_its_own and float8)"

test-slow: $(INSTALLED)
	@echo "== running the slow tests: every model with every case, thousands of programs and near misses, a sweep"
	$(PYTEST) -m slow $(PYTEST_ARGS)

# What has a GPU's branch: kernels, fidelity and shadow mode, whole models.
test-gpu: $(INSTALLED)
	@echo "== running the tests of a GPU's own code"
	$(PYTEST) -m "(gpu or not slow) and not alone" $(PYTEST_ARGS) $(GPU_TESTS)
	$(PYTEST) -m alone -q $(GPU_TESTS)

check: $(INSTALLED)
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fidelity: $(INSTALLED)
	@echo "== selection quality on a real model: hours on 2 cores"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[fidelity]'
	$(BIN)/python -m benchmarks.fidelity

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find hisa_compile tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@echo "== installing into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "hisa_compile needs Python >= 3.11, $(PYTHON) is " + sys.version.split()[0] + ": set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch alone first: its pin decides the build.  setuptools too: the build below then needs no download.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

$(OLD_TRITON): $(INSTALLED)
	@echo "== installing into $(OLD_TRITON)"
	rm -rf $@ $@.new
	$(BIN)/python -m pip install --quiet --no-deps --target $@.new $(subst -,==,$(notdir $@))
	mv $@.new $@
