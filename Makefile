# A fresh clone needs only `make demo` or `make test`: both set up what is missing first.

VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# SGLang's just-in-time kernels look for ninja on the PATH.
RUN := PATH="$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-release lint clean
# Two processes, each with the servers of its own tests; threads of one server would only wait for the other's.
PYTEST := env OMP_NUM_THREADS=1 PATH="$(BIN):$$PATH" "$(BIN)/python" -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  VENV=dir        use another environment (default .venv)"
	@echo "  PYTHON=python   build it from this interpreter (3.10-3.12)"
	@echo "  SGLANG=0.5.23   with this release of SGLang (default 0.5.17); give it a VENV of its own"
	@echo "  ARGS='...'      more arguments for the demo or pytest, e.g. make test ARGS='-m \"not server\"'"

setup: ## create the environment (about 9 GB) and the embedded model; fast when nothing changed
	@VENV="$(VENV)" PYTHON="$(PYTHON)" SGLANG="$(SGLANG)" scripts/setup.sh

demo: setup ## run the demonstration
	@$(RUN) "$(BIN)/sglang-lsa" demo $(ARGS)

test: setup lint ## linters, type checker, and the tests that prove the promises (11 minutes on 2 cores)
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: setup lint ## all tests, the long ones included (35 to 46 minutes on 2 cores)
	@$(PYTEST) $(ARGS)

test-release: setup ## the tests that tell releases of SGLang apart, e.g. make test-release SGLANG=0.5.23 VENV=.venv-0.5.23
	@$(PYTEST) -m release $(ARGS)

lint: setup ## ruff (lint and format) and mypy
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/mypy"

clean: ## remove the environment and everything generated (the model cache stays)
	test ! -e "$(VENV)/pyvenv.cfg" || rm -rf "$(VENV)"
	rm -f "$(VENV).lock"
	rm -rf build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
