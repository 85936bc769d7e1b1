# The first run of a target makes a virtual environment and installs into it; later runs start at once.
# Settings:  make launch ARGS="--prompt 'Once upon'"    PYTHON=python3.12    TORCH_INDEX=URL-of-an-index-with-torch

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-5.17
IPEX ?= .venv-ipex
ARGS ?=
TORCH_INDEX ?=
ENGINE_TESTS ?= $(wildcard tests/test_engine*.py tests/test_state_shapes.py)

BIN := $(VENV)/bin
PIP_OPTIONS := --quiet --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
TYPING := .cache/typing

.DEFAULT_GOAL := help
.PHONY: help launch test decisions test-oldest test-ipex lint wheel-check clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

launch: $(VENV)/.engine  ## generate text with the small hybrid model that comes with the package
	@$(BIN)/makeready launch $(ARGS)

test: $(VENV)/.dev  ## run the whole test-suite
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-oldest: $(OLDEST)/.dev  ## run the engine's tests with the oldest transformers that is served
	$(OLDEST)/bin/python -m pytest -n auto --dist loadfile $(ENGINE_TESTS) $(ARGS)

test-ipex: $(IPEX)/.dev $(TYPING)/makeready  ## run the tests of Intel's extension, in an environment of its own (1 GB to fetch)
	PYTHONPATH=$(TYPING) $(IPEX)/bin/python -m pytest $(wildcard tests/test_flash_ipex*.py) $(ARGS)

decisions: $(VENV)/.dev  ## check 200,000 random decisions of the planner (2 minutes)
	$(BIN)/python tests/check_random_decisions.py

lint: $(VENV)/.dev $(TYPING)/makeready  ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	MYPYPATH=$(TYPING) $(BIN)/mypy --strict -p makeready
	PYTHONPATH=$(TYPING) $(BIN)/lint-imports --no-cache

wheel-check: $(VENV)/.dev  ## build a wheel from the committed tree and use it in an empty environment
	tests/wheel_check.sh $(BIN)/python

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(OLDEST) $(IPEX) .cache build dist *.egg-info

# pip's own copy is enough to install, but wheels are built by the setuptools that constraints.txt names.
$(VENV)/.engine: pyproject.toml constraints.txt
	@echo "installing makeready into $(VENV) (this is done once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install $(PIP_OPTIONS) -e '.[engine]' -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.engine
	@echo "installing the test tools into $(VENV) (this is done once) ..."
	@$(BIN)/python -m pip install $(PIP_OPTIONS) -e '.[engine,dev]' -c constraints.txt
	@touch $@

$(OLDEST)/.dev: pyproject.toml constraints-oldest.txt
	@echo "installing makeready with the oldest transformers into $(OLDEST) (this is done once) ..."
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install $(PIP_OPTIONS) -e '.[engine]' pytest pytest-xdist hypothesis -c constraints-oldest.txt
	@touch $@

$(IPEX)/.dev: tools/ipex_environment.py
	@echo "installing Intel's extension for PyTorch into $(IPEX) (this is done once) ..."
	@$(PYTHON) tools/ipex_environment.py $(IPEX)
	@touch $@

# The repository root is the package, so the type checker and the import linter see it under its name by a link.
$(TYPING)/makeready:
	@mkdir -p $(TYPING)
	@ln -sfn $(CURDIR) $@
