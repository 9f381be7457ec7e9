# `make demo` and `make test` work in an empty checkout: each first builds the environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-ray lint types clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)  ## the environment in .venv, at the versions of constraints.txt

demo: $(STAMP)  ## compress a real family, serve it, ask 40 routed questions (under 5 minutes on 2 cores)
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest

test-ray: $(STAMP)  ## the tests of replicas on Ray Serve, in an environment of their own
	test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install -q -c constraints.txt torch
	.venv-ray/bin/python -m pip install -q -c constraints.txt -e '.[dev,ray]' kubernetes-validate
	.venv-ray/bin/python -m pytest tests/deploy

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) .venv-ray runs
