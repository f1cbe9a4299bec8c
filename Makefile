# Two commands for a machine with Python 3.11, git and make: `make demo` and `make test`.
# While you work on one file, run its own tests: `make test-of FILE=lightning_interp/similarity/cka.py`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
TORCH := torch==2.13.0

# One worker per core, up to four: each holds about 1 GB. A worker that runs dry takes tests from the others.
WORKERS ?= auto
PARALLEL := --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal

# The tests mirror the package: those of room/part.py are tests/room/test_part.py, else all of tests/room, else all.
FILE = $(error test-of: say which file, as in make test-of FILE=lightning_interp/similarity/cka.py)
MIRRORED = $(patsubst lightning_interp/%,tests/%,$(patsubst callbacks_demo/%,tests/callbacks_demo/%,$(FILE)))
ROOM = $(dir $(MIRRORED))
TESTS_OF_FILE = $(or $(wildcard $(ROOM)test_$(notdir $(MIRRORED))),$(wildcard $(ROOM)test_*.py),tests)

.PHONY: demo test test-of lint format build clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.installed  ## train the MNIST demo with all three callbacks
	$(RUN) -m callbacks_demo

test: $(VENV)/dev.installed  ## all tests and doctests
	$(RUN) -m pytest --quiet $(PARALLEL)

test-of: $(VENV)/dev.installed  ## the tests and doctests of one file of the package
	$(RUN) -m pytest --quiet $(FILE) $(TESTS_OF_FILE)

lint: $(VENV)/dev.installed  ## formatting, lint and types
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m mypy

format: $(VENV)/dev.installed
	$(RUN) -m ruff format
	$(RUN) -m ruff check --fix

build: $(VENV)/dev.installed  ## sdist and wheel into dist/
	$(RUN) -m build

# The CPU build of torch goes in first, so that nothing pulls the CUDA packages: from the places pip
# already knows, else from PyTorch's own index, else the default build (on macOS that is the CPU one).
$(VENV)/torch.installed:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) "$(TORCH)" --index-url https://download.pytorch.org/whl/cpu \
	  || $(PIP) "$(TORCH)"
	touch $@

$(VENV)/%.installed: pyproject.toml constraints.txt $(VENV)/torch.installed
	$(PIP) --editable ".[$*]" --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) dist lightning_logs
