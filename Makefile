# Two commands for a fresh machine: `make demo` trains and compares, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = OMP_NUM_THREADS=1 $(BIN)
WORKERS ?= 2
PARALLEL = --numprocesses $(WORKERS) --dist worksteal

.PHONY: help demo test test-matrix lint install clean

help:  ## say what each target does
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## make the virtual environment, CPU torch first

# torch comes first and alone: left to another package's requirement it pulls several GB of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## train backprop, DNI, a critic and a pipeline on digits, print a table, draw a picture
	$(RUN)/python recipes/demo.py

lint: install  ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## all checks, tests and doctests; WORKERS=4 on a machine with four cores
	$(RUN)/python -m pytest -q $(PARALLEL)

# lightning,torch: the oldest and the newest that are supported; both torches bring several GB of CUDA.
# The progress bar of lightning 2.5.0 fails with rich from 14 on.
MATRIX = 2.5.0,2.4.0 2.6.6,2.15.0

test-matrix:  ## the tests with other versions of lightning and torch, in .matrix/
	@set -e; for pair in $(MATRIX); do \
	  lightning=$${pair%,*}; torch=$${pair#*,}; there=.matrix/$$pair; rich=rich; \
	  case $$lightning in 2.5.0) rich='rich<14';; esac; \
	  echo "lightning $$lightning, torch $$torch"; \
	  test -x $$there/bin/python || $(PYTHON) -m venv $$there; \
	  $$there/bin/python -m pip install --quiet torch==$$torch; \
	  $$there/bin/python -m pip install --quiet torch==$$torch lightning==$$lightning $$rich --editable '.[test]'; \
	  OMP_NUM_THREADS=1 $$there/bin/python -m pytest -q $(PARALLEL); \
	done

clean:  ## remove what the targets made
	rm -rf $(VENV) .matrix runs .mypy_cache .ruff_cache .pytest_cache
