# `make help` lists the targets. Everything happens in a virtual environment (VENV=folder to choose another).
VENV   ?= .venv
PYTHON ?= python3
OUT    ?= demo-out
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TYPED  := --jaxtyping-packages=iared2,typechecking.checked
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo check test bench clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

setup: $(VENV)/.test  ## virtual environment with everything that tests and checks need

demo: $(VENV)/.core  ## explain the photos in examples/ with the embedded model, without a network
	HF_HUB_OFFLINE=1 $(BIN)/iared2 explain -p examples/ -o $(OUT)
	@echo "Open $(abspath $(OUT))/index.html"

check: $(VENV)/.test  ## lint, types, and the layers contract
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## all checks and all tests, from nothing if need be
	$(PYTEST) -n 2 -m "not untyped" $(TYPED)
	$(PYTEST) -n 2 -m untyped || [ $$? -eq 5 ]  # 5: there is no such test

bench: $(VENV)/.test  ## measure speed and memory against the dense model on this machine
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:  ## remove the virtual environment, caches and outputs of the targets above
	rm -rf $(VENV) $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
