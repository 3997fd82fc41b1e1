# make demo: everything a newcomer needs, from nothing to a table, a plot and a report.
# make test: the quick suite. make test-all: with the slow checks.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -e
# Tests install the TPU's compiler; on a machine without accelerators jax would then look for a TPU
# at every start, and complain at length.
RUN = $(if $(wildcard /dev/accel* /dev/vfio/* /dev/nvidia* /dev/kfd),,JAX_PLATFORMS=cpu) $(BIN)/python

NEWEST ?= $(shell for v in 3.14 3.13 3.12; do python$$v -c '' 2>/dev/null && echo python$$v && break; done)

.PHONY: setup demo test test-all test-newest lint format benchmark clean

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

# The newest jax, which needs a newer Python than 3.11: that a decode step copies nothing of a cache
# depends on XLA's version (jax#40101).
test-newest:
	@if [ -z "$(NEWEST)" ]; then echo "skipped: no Python 3.12 or newer is at hand (NEWEST=...)"; \
	else $(MAKE) VENV=.venv-newest PYTHON="$(NEWEST)" .venv-newest/.tests && \
	  JAX_PLATFORMS=cpu .venv-newest/bin/python -m pytest -q tests/cache/test_no_copy.py \
	    tests/speculate/test_no_copy.py tests/decode; fi

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
	rm -rf $(VENV) .venv-newest .pytest_cache .ruff_cache .hypothesis
