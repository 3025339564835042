# `make demo` and `make test` need Python 3.11 or newer, nothing else: each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A stamp a set of extras, so that nothing is installed twice.
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
export PIP_DISABLE_PIP_VERSION_CHECK := 1

OLDEST_TRITON := 3.6.0
OLDEST := build/triton-$(OLDEST_TRITON)
NEWEST := build/triton-newest

.PHONY: help demo test test-slow test-triton test-triton-newest test-lowest constraints check-kernels inspect-kernels sanitize bench bench-gpu gpu-1 gpu-2 gpu-3 lint format clean

help:
	@echo "make demo             draw phantoms, train both phases, evaluate, predict on a real radiograph, report (minutes on 2 cores)"
	@echo "make test             the tests that finish in minutes"
	@echo "make test-slow        the longer ones: the demo's promises, kills and resumes, several processes"
	@echo "make test-triton      the kernels' tests with the oldest triton that is supported, then with the newest where .venv has another"
	@echo "make test-lowest      the tests of make test with the lowest versions that pyproject.toml allows (Python 3.11, several GB)"
	@echo "make constraints      write constraints.txt, the versions in .venv"
	@echo "make check-kernels    compile the kernels for four GPUs (without one), check and list what they use"
	@echo "make inspect-kernels  the same, and write kernels/RESOURCES.md"
	@echo "make sanitize         the kernels' GPU tests under compute-sanitizer"
	@echo "make bench            speed and memory of every operator, then figures and tables (OUT=build/bench; ARGS='--only spcl')"
	@echo "make bench-gpu        the measurements alone, with any PYTHON that has torch; at most BUDGET_S=540 s; run it again to go on"
	@echo "make gpu-1|gpu-2|gpu-3  the first half hour on a GPU: probe and tests, whole steps, profile; build/gpu; ARGS=--rehearse on a CPU"
	@echo "make lint             ruff and mypy"
	@echo "make format           let ruff rewrite the sources"

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

# One worker a core. Tests of a file share fixtures that take seconds, so a worker runs whole files; the slow
# ones in the order that conftest.py gives them, the longest first. A missing package is an error here.
PYTEST := $(BIN)/python -m pytest --complete -n auto --maxprocesses 8 --dist loadfile

test: $(TEST_STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(TEST_STAMP)
	$(PYTEST) --no-loadscope-reorder -m slow

# The oldest triton that pyproject.toml allows (its interpreter needs an older numpy) and the newest, each in a folder that
# comes before .venv's packages: a second environment without a second torch.
$(OLDEST)/.installed: | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==$(OLDEST_TRITON) 'numpy<2.4'
	touch $@

test-triton: $(TEST_STAMP) $(OLDEST)/.installed
	$(call kernel_tests,$(OLDEST),triton.__version__ == "$(OLDEST_TRITON)" and numpy.__file__.startswith(folder))
	@newest=$$($(BIN)/python -m pip index versions triton 2> /dev/null | sed -n '1s/^triton (\(.*\))$$/\1/p'); \
	test -n "$$newest" || { echo "pip does not say which triton is the newest" >&2; exit 1; }; \
	if [ "$$newest" = "$$($(BIN)/python -c 'import triton; print(triton.__version__)')" ]; \
	then echo "triton $$newest, the newest, is in $(VENV): make test runs the kernels' tests with it"; \
	else $(MAKE) test-triton-newest; fi

test-triton-newest: $(TEST_STAMP)
	rm -rf $(NEWEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(NEWEST) triton
	$(call kernel_tests,$(NEWEST),True)

# Tests of what triton runs, with the packages in folder $(1), once they are known to be those imported and $(2) holds.
define kernel_tests
	PYTHONPATH=$(CURDIR)/$(1) $(BIN)/python -c 'import os, sys, numpy, triton; folder = "$(CURDIR)/$(1)/"; \
	  print("triton", triton.__version__, "numpy", numpy.__version__, "from", os.path.dirname(triton.__file__), flush=True); \
	  sys.exit(0 if triton.__file__.startswith(folder) and ($(2)) else "not the packages of $(1)")'
	PYTHONPATH=$(CURDIR)/$(1) $(PYTEST) -m "not slow" tests/kernels/test_*triton.py tests/kernels/test_interpreter.py \
	  tests/kernels/test_launch.py tests/engine/training/test_kernels_in_training.py
endef

# The lowest version of each direct dependency, which pip cannot choose and uv can.
LOWEST := build/lowest
$(LOWEST)/.installed: pyproject.toml
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
	  --editable '.[dev,dicom,hf,dali-cuda13]'
	touch $@

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest --complete -n auto --maxprocesses 8 --dist loadfile -m "not slow"

# Without CUDA's libraries: a torch pins its own.
constraints: $(TEST_STAMP)
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable --exclude pspg-engine > build/constraints
	{ echo "# Versions that the tests last ran with; make constraints writes them."; \
	  grep -vE '^(cuda-|nvidia-[^d]|#)' build/constraints; } > constraints.txt

INSPECT := env -u TRITON_INTERPRET $(BIN)/python -m tools.inspect_kernels --check

check-kernels: $(TEST_STAMP)
	$(INSPECT)

inspect-kernels: $(TEST_STAMP)
	$(INSPECT) --markdown kernels/RESOURCES.md

# Needs a GPU and compute-sanitizer.
sanitize: $(TEST_STAMP)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest -m gpu tests/kernels

# Results, and further arguments of benchmarks.run.
OUT ?= build/bench
ARGS ?=
BUDGET_S ?= 540

# A row that FAILED (status 1) is listed in figures and tables, and still fails.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --output $(OUT) $(ARGS) || status=$$?; \
	test $${status:-0} -le 1 || exit $$status; \
	$(BIN)/python -m benchmarks.report $(OUT) && exit $${status:-0}

# Installs nothing: the links below make pspg importable.
bench-gpu: build/typing/pspg
	PYTHONPATH=$(CURDIR)/build/typing $(PYTHON) -m benchmarks.run --device cuda --budget_s $(BUDGET_S) --output $(OUT) $(ARGS)

# The first half hour on a GPU, with any PYTHON that has torch, triton and pytest; WHEELS=folder of others to install.
gpu-1 gpu-2 gpu-3: build/typing/pspg
	PYTHONPATH=$(CURDIR)/build/typing $(PYTHON) -m benchmarks.gpu $(@:gpu-%=%) --out build/gpu $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

# mypy, and a python without an installation, find the mapped packages through links.
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
