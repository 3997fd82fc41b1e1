# make demo: everything a newcomer needs, from nothing to a table, a plot and a report.
# make test: the quick suite. make test-all: with the slow checks.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -e
# Tests install the TPU's compiler; on a machine without accelerators jax would then look for a TPU
# at every start, and complain at length.
RUN = $(if $(wildcard /dev/accel* /dev/vfio/* /dev/nvidia* /dev/kfd),,JAX_PLATFORMS=cpu) $(BIN)/python

.PHONY: setup demo test test-all lint format benchmark clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kvjax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	@touch $@

$(VENV)/.tests: $(VENV)/.ready
	$(INSTALL) '.[test]'
	@touch $@

demo: setup
	$(RUN) -m kvjax.models.embedded
	$(RUN) -m experiments.compress --config=configs/demo.py

test: $(VENV)/.tests
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	@# Two processes: compiling takes one core each, and is what the tests cost.
	$(BIN)/python -m pytest -q -m 'not slow' -n 2

test-all: $(VENV)/.tests
	$(RUN) -m kvjax.models.embedded
	KVJAX_HYPOTHESIS=all $(BIN)/python -m pytest -q

lint: $(VENV)/.tests
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

format: $(VENV)/.tests
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

benchmark: setup
	$(RUN) -m kvjax.models.embedded
	$(RUN) -m experiments.benchmark

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
