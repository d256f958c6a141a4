# The habits. Each does its own set-up in .venv and is quick when there is nothing to do; nothing to activate.
#   make train | test | lint | format | bench | docs | install | constraints | clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# constraints.txt holds the versions that were tested together; CONSTRAINTS= installs the newest allowed instead
CONSTRAINTS ?= constraints.txt
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS))

.PHONY: install train test lint format bench docs constraints clean
.DEFAULT_GOAL := install

install: $(VENV)/ready-run

# A minute or two on two cores: the embedded sample, a small network, a table of validation figures.
train: $(VENV)/ready-run
	$(BIN)/python -m pcam_jax.train configs/default.toml $(ARGS)

# All tests, or some: make test ARGS="tests/data -k split"
test: $(VENV)/ready-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 2 --dist loadfile $(ARGS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pcam_jax

format: $(VENV)/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every scripts/bench_*.py, one after the other, so that they do not disturb each other's figures.
bench: $(VENV)/ready-test
	set -e; for script in scripts/bench_*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

# What is made from the code: docs/configuration.md, configs/default.toml and the pictures.
docs: $(VENV)/ready-run
	$(BIN)/python scripts/write_configuration.py
	$(BIN)/python scripts/draw_pictures.py

# The versions that a fresh environment gets today; run the tests before you commit them.
constraints: | $(VENV)/bin/python
	$(PYTHON) -m venv --clear $(VENV)/fresh
	$(VENV)/fresh/bin/python -m pip install --quiet -e '.[dev]'
	( sed -n '/^#/p' constraints.txt; $(VENV)/fresh/bin/python -m pip list --format=freeze --exclude-editable \
	  | grep -viE '^(pip|setuptools|wheel)==' | sed 's/+[^ ]*//' ) > constraints.new
	mv constraints.new constraints.txt
	rm -rf $(VENV)/fresh

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pcam_jax needs Python 3.11 or newer: name one with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "No virtual environment: on Debian and Ubuntu, apt-get install python3-venv first."; exit 1; }

$(VENV)/ready-run: pyproject.toml $(wildcard constraints.txt) | $(BIN)/python
	@echo "Setting up $(VENV): a minute or two, once"
	$(PIP) -e .
	@touch $@

$(VENV)/ready-test: pyproject.toml $(wildcard constraints.txt) | $(BIN)/python
	@echo "Adding what the tests need to $(VENV)"
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/ready-run

$(VENV)/ready-dev: pyproject.toml $(wildcard constraints.txt) | $(BIN)/python
	@echo "Adding what lint needs to $(VENV)"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/ready-test $(VENV)/ready-run
