# make demo       scores the photographs in tests/photos and draws the results into demo/
# make test       runs the tests
# make test-all   runs the slow ones as well
# make test-gpu   runs those that need a GPU
# make bench      compares speed and memory with the published computation
# make bench-gpu  the same of training, on a GPU
# make lint       checks style and types
#
# PYTHON=python3.12 chooses the interpreter that .venv is made with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file of tests to a process; in the files' order, or one that takes long would come last and alone.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-gpu bench bench-gpu lint format clean

demo: $(VENV)/.installed
	$(BIN)/python -m adpretrain_hf.cli demo --image-size 224 --output demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "slow or not slow"

test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu tests/gpu

bench: $(VENV)/.installed-test
	$(BIN)/python -m tests.benchmarks

bench-gpu: $(VENV)/.installed-test
	$(BIN)/python -m tests.benchmarks.bench_training --device cuda

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || \
	    { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

$(VENV)/.installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[test]'
	touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
