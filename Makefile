# `make demo` and `make test` set up their own environment in $(VENV); nothing need be installed first.
#
#   PYTHON=python3.12      the interpreter for a new $(VENV) (3.11 or newer)
#   TORCH=1 or TORCH=0     test with or without PyTorch; without it, tests that compare with it are skipped
#   TESTFLAGS="-x -k vae"  flags for pytest
#   JOBS=2                 test processes at a time; each compiles on one core

PYTHON ?= python3
VENV ?= .venv
TESTFLAGS ?=
JOBS ?= 2

VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip -qq --disable-pip-version-check

# Only Python 3.11 runs the PyTorch parity tests by default. Newer interpreters test the JAX side with the newest JAX,
# because PyTorch usually brings gigabytes of CUDA libraries that no test uses. If pip is set up to find CPU builds of
# PyTorch, TORCH=1 runs everything with them, too.
INTERPRETER := $(or $(wildcard $(VENV_PYTHON)),$(PYTHON))
TORCH ?= $(shell $(INTERPRETER) -c 'import sys; print(int(sys.version_info[:2] == (3, 11)))' 2>/dev/null)
ifeq ($(TORCH),1)
TEST_PACKAGES := -e '.[test,app,convert]' peft -c tests/constraints.txt
else
TEST_PACKAGES := -e '.[test,app]'
endif

# If a stamp is older than the files it depends on, the installation is repeated.
BASE_STAMP := $(VENV)/.installed-base
TEST_STAMP := $(VENV)/.installed-test-torch$(if $(filter 1,$(TORCH)),1,0)

.PHONY: help demo test lint types format cuda-compiler clean

help:
	@echo "make demo     upscale the example photographs; a CPU is enough, the first time takes a few minutes"
	@echo "make test     run the test suite      (TESTFLAGS='-k lora', TORCH=0, PYTHON=python3.12)"
	@echo "make lint     check style and formatting"
	@echo "make types    check the library's type hints"
	@echo "make cuda-compiler   install what tests and bench/gpu_plan.py need to compile for a GPU without having one (140 MB)"
	@echo "make format   apply the formatter and the safe fixes"
	@echo "make clean    remove .venv, caches and what the demo wrote"

demo: $(BASE_STAMP)
	@$(VENV_PYTHON) examples/demo.py

test: $(TEST_STAMP)
	@$(VENV_PYTHON) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTFLAGS)

lint: $(TEST_STAMP)
	@$(VENV_PYTHON) -m ruff check --quiet --no-cache .
	@$(VENV_PYTHON) -m ruff format --quiet --check .

types: $(TEST_STAMP)
	@$(VENV_PYTHON) -m mypy

format: $(TEST_STAMP)
	@$(VENV_PYTHON) -m ruff check --quiet --fix .
	@$(VENV_PYTHON) -m ruff format --quiet .

$(BASE_STAMP): pyproject.toml | $(VENV)/bin/pip
	@echo "Installing tsdsr_jax into $(VENV) (one to three minutes)"
	@$(PIP) install -e .
	@touch $@

$(TEST_STAMP): pyproject.toml tests/constraints.txt | $(VENV)/bin/pip
	@echo "Installing tsdsr_jax and its test packages into $(VENV)$(if $(filter 1,$(TORCH)), with PyTorch)"
	@$(PIP) install $(TEST_PACKAGES)
	@touch $(BASE_STAMP) $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "tsdsr_jax needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not there'): try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# Installed beside the environment: inside it, JAX would look for a GPU at every start.
cuda-compiler: $(TEST_STAMP)
	@version=$$($(VENV_PYTHON) -c 'import jax; print(jax.__version__)'); folder=$(VENV)/cuda-compiler-$$version; \
	  test -d $$folder || { echo "Installing JAX's CUDA plugin into $$folder"; \
	  $(PIP) install --no-deps --target $$folder.part jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version && \
	  mv $$folder.part $$folder; }

clean:
	rm -rf .venv build dist demo *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
