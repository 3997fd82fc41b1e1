# make demo: everything a newcomer needs, from nothing to a table, a plot and a report.
# make test: the quick suite. make test-all: with the slow checks.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup demo test test-all lint format benchmark clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kvjax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

demo: setup
	$(BIN)/python -m kvjax.models.embedded
	$(BIN)/python -m experiments.compress --config=configs/demo.py

test: setup
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	@# Two processes: compiling takes one core each, and is what the tests cost.
	$(BIN)/python -m pytest -q -m 'not slow' -n 2

test-all: setup
	$(BIN)/python -m kvjax.models.embedded
	KVJAX_HYPOTHESIS=all $(BIN)/python -m pytest -q

lint: setup
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

format: setup
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

benchmark: setup
	$(BIN)/python -m kvjax.models.embedded
	$(BIN)/python -m experiments.benchmark

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
