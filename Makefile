# `make demo` and `make test` are the two commands a newcomer needs; both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard kernels/distserve_kernels/csrc/*) distserve/transfer/copy.c

.PHONY: demo serve test lint types unit fast pure slow clean

$(STAMP): pyproject.toml constraints.txt setup.py build_backend.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Install python3-venv (apt-get install python3-venv)." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## one streamed chat answer from a local cluster of one prefill and one decode instance
	$(BIN)/distserve demo

serve: $(STAMP)  ## the same cluster, kept up with its HTTP endpoint on port 8000
	$(BIN)/distserve serve --prefill 1 --decode 1 --port 8000

test: lint types unit  ## everything CI checks, import contracts among the tests; pytest's summary comes last

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest

fast: $(STAMP) pure  ## compile the schedulers and the simulator: planning takes 40% of the time; again after every edit
	DISTSERVE_COMPILE=1 $(BIN)/python setup.py --quiet build_ext --inplace

pure:  ## back to the sources as they are
	find . -path ./$(VENV) -prune -o -name '*.cpython-*.so' -print | xargs -r grep -l mypyc | xargs -r rm --

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV)
