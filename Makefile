# A fresh machine needs Python 3.11 or newer (with venv) and make; the rest is installed into .venv.
#
#   make serve                 install what serving needs, then serve the demo on localhost:8000
#   make serve ARGS="--port 9000 --model /path/to/model"
#   make serve DEMO=seq2seq    another base of demo/, with its own prompts and a store in build/demo
#   make test                  install what developing needs, then run the tests
#   make test-fast             the quick ones of them, in a minute or so
#   make check                 format, lint, types, import contracts, then `make test`
#
# PYTHON            the interpreter that makes .venv
# TORCH_INDEX_URL   a package index to take torch from (a CPU-only or another CUDA build);
#                   empty: pip's own default index
# ARGS              passed on to the command
# DEMO              a base of demo/ to serve instead of the default one

PYTHON ?= python3
TORCH_INDEX_URL ?=
ARGS ?=
DEMO =

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two files at a time, in the order of tests/conftest.py; `make soak` and measurements go one by one.
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
INSTALL := $(PIP) install --quiet --constraint constraints.txt
OTHER_DEMO = --model demo/$(DEMO) --store build/demo/$(DEMO)/store --import-dir demo/$(DEMO)-prompts

.DEFAULT_GOAL := help
.PHONY: help serve test test-fast check soak bench demo clean format

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/.serve  ## serve the demo model and its tasks on localhost:8000
	exec $(BIN)/promptplex serve $(if $(DEMO),$(OTHER_DEMO)) $(ARGS)

test: $(VENV)/.dev  ## run the tests
	$(TESTS) $(ARGS)

test-fast: $(VENV)/.dev  ## run the quick tests, in a minute or so
	$(TESTS) -m "not soak and not slow" $(ARGS)

check: $(VENV)/.dev  ## check format, lint, types and import contracts, then run the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

soak: $(VENV)/.dev  ## run the tests that take longer than ten minutes
	$(BIN)/python -m pytest -m soak $(ARGS) || test $$? -eq 5  # 5: there are none

bench: $(VENV)/.dev  ## measure throughput against its peers, on random weights
	$(BIN)/python -m benchmarks $(ARGS)

demo: $(VENV)/.dev  ## rebuild the demo model and its prompts
	$(BIN)/python -m demo.recipes.build $(ARGS)

format: $(VENV)/.dev  ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove everything that make and the tools made
	rm -rf $(VENV) .clients dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find app benchmarks demo tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch is installed first, alone: a build chosen by TORCH_INDEX_URL then satisfies the pin for everything
# that follows. Such an index rarely holds anything else, hence --no-deps.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Promptplex needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch (once; this can take some minutes)"
	$(PIP) install --constraint constraints.txt $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL) --no-deps) torch
	@touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml
	@echo "Installing what serving needs"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "Installing what developing needs"
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.serve
