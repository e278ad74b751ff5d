# `make demo` and `make test` need Python 3.11 or newer and pip, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install -q -c constraints.txt
DEMO := outputs/demo

.PHONY: demo study test lint types clean

demo: $(VENV)/installed
	$(BIN)/neurodiff run --config-file configs/NeuroDiff-Demo.yaml DATASET.OUTPUT_PATH $(DEMO)

study: $(VENV)/installed
	$(BIN)/neurodiff study studies/demo.yaml

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name it: make demo PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a plain "torch" would fetch gigabytes of CUDA libraries.
$(VENV)/torch: $(BIN)/python constraints.txt
	$(PIP) torch
	touch $@

$(VENV)/installed: $(VENV)/torch setup.py
	$(PIP) -e '.[view]'
	touch $@

$(VENV)/installed-test: $(VENV)/torch setup.py
	$(PIP) -e '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
