# `make demo` and `make test` need Python 3.11 or newer, nothing else: each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A stamp a set of extras, so that nothing is installed twice.
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow lint format clean

help:
	@echo "make demo       draw phantoms, train both phases, evaluate, predict on a real film, report (minutes on 2 cores)"
	@echo "make test       the tests that finish in minutes"
	@echo "make test-slow  the longer ones: the demo's promises, kills and resumes, several processes"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the sources"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dicom]' pydicom-data
	touch $@

$(TEST_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,dicom,dali-cuda13]'
	touch $@ $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m tools.demo

test: $(TEST_STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(TEST_STAMP)
	$(BIN)/python -m pytest -m slow

# mypy finds the mapped packages through links.
build/typing/pspg:
	mkdir -p $@
	ln -sfn ../../../engine $@/engine
	ln -sfn ../../../kernels $@/kernels

lint: $(TEST_STAMP) build/typing/pspg
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy build/typing/pspg benchmarks tools

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info
