# Two commands for a fresh machine: `make demo` trains and compares, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = OMP_NUM_THREADS=1 $(BIN)

.PHONY: help demo test lint install clean

help:  ## say what each target does
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## make the virtual environment, CPU torch first

# torch comes first and alone: left to another package's requirement it pulls several GB of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## train backprop, DNI and a critic on digits, print a table, draw a picture
	$(RUN)/python recipes/demo.py

lint: install  ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## all checks, tests and doctests
	$(RUN)/python -m pytest -q

clean:  ## remove what the targets made
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
