# make demo | test | lint | bench | constraints | clean
# Each target makes what it needs: a virtual environment in .venv, and the packages in it, editable.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYPROJECTS := $(wildcard packages/*/pyproject.toml)
PARITY_DIR ?=
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench constraints clean

help:
	@echo "make demo         set up, then show what polyzoo does: out/demo/index.html"
	@echo "make test         the test suite; PARITY_DIR=DIR takes further reference cases from DIR,"
	@echo "                  PYTEST_ARGS are handed on"
	@echo "make lint         ruff, types, import layers"
	@echo "make bench        every benchmark, in its quick form"
	@echo "make constraints  write constraints/tested.txt from what is installed in .venv"
	@echo "make clean        remove .venv and what the other targets left"
	@echo "PYTHON=python3.12 make ... chooses the interpreter of .venv (3.11 or later)"

.venv/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"{sys.version}: polyzoo needs 3.11")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: .venv/.made requirements.txt constraints/tested.txt $(PYPROJECTS)
	$(PIP) install -q -c constraints/tested.txt -r requirements.txt
	@touch $@

.venv/.dev: .venv/.run requirements-dev.txt
	$(PIP) install -q -c constraints/tested.txt -r requirements-dev.txt
	@touch $@

demo: .venv/.run
	$(BIN)/python scripts/demo.py

test: .venv/.dev
	$(BIN)/python -m pytest -q $(if $(PARITY_DIR),--parity-dir=$(PARITY_DIR)) $(PYTEST_ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

bench: .venv/.dev
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" --quick; done

constraints: .venv/.dev
	@$(BIN)/python -m pip freeze --exclude-editable | grep -v -i -E '^(nvidia-|cuda-|triton=|pip=|setuptools=)' \
		| sed -e '1i # Exact versions of the last green run. `make constraints` writes them anew from .venv.' \
		-e '1i # What torch pins itself (the CUDA libraries, triton) is left to torch.' > constraints/new.txt
	@mv constraints/new.txt constraints/tested.txt

clean:
	rm -rf .venv out dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find packages tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
