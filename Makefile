# Two commands for a fresh machine: make quickstart, make test. Both install into $(VENV) first, once.
# TORCH_INDEX=<index> takes torch, torchvision and torchaudio from there: PyTorch's CPU index makes it 1 GB instead of 5.5.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# A folder of wheels (make gpu-wheels) stands for every index.
WHEELS ?= build/wheels
OFFLINE := $(if $(wildcard $(WHEELS)/torch-*.whl),--no-index --find-links "$(abspath $(WHEELS))")
PYTEST_FLAGS ?=
# Their slow tests start several processes each: they run one after the other.
STARTS_PROCESSES := tests/test_quickstart.py tests/trainer tests/docs tests/data tests/own_data tests/launch

.PHONY: help quickstart test test-slow mutants fuzz gpu gpu-wheels lint docs clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   install, then train and evaluate an any-to-any model (4 to 6 minutes on 2 CPU cores)"
	@echo "make test         install, then the test suite (about 6 minutes on 2 CPU cores)"
	@echo "make test-slow    the long tests: the quickstart at reduced steps, several processes, the wheel"
	@echo "make mutants      one-line bugs that no test would notice; hours, goes on where it was"
	@echo "make fuzz         100,000 damaged files through every reader; goes on where it was"
	@echo "make gpu          what only a GPU can say, in nine minutes; goes on where it was; without one: what it would run"
	@echo "make gpu-wheels   wheels of all that make gpu needs, in build/wheels, for a machine without a network"
	@echo "make lint         ruff (rules and format) and pyright"
	@echo "make docs         the site, in build/site/index.html"

quickstart: $(VENV)/.installed
	$(BIN)/mm quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(STARTS_PROCESSES) $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -m slow -n logical --maxprocesses 8 --dist worksteal $(STARTS_PROCESSES:%=--ignore %) $(PYTEST_FLAGS)

mutants: $(VENV)/.installed-dev
	$(BIN)/python tests/mutation/run.py $(MUTANTS_FLAGS)

fuzz: $(VENV)/.installed-dev
	$(BIN)/python tests/fuzz/run.py $(FUZZ_FLAGS)

gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py $(GPU_FLAGS)

gpu-wheels: | $(BIN)/python
	$(BIN)/python benchmarks/gpu_wheels.py --get "$(WHEELS)"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module: apt-get install -y python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
ifneq ($(OFFLINE),)
	@echo "Installing into $(VENV) from the wheels in $(WHEELS), without a network."
else ifdef TORCH_INDEX
	@echo "Installing into $(VENV): torch from $(TORCH_INDEX), then the rest from the default index (about 1 GB with a CPU build)."
	$(PIP) --index-url "$(TORCH_INDEX)" $$($(BIN)/python -c "import tomllib; \
	  print(*(d.replace(' ', '') for d in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'] \
	  if d.split('>')[0].split('=')[0] in ('torch', 'torchvision', 'torchaudio')))")
else
	@echo "Installing into $(VENV): about 5.5 GB (the CUDA build of torch, which runs on a CPU too), one to two minutes on a fast line."
	@echo "Smaller, about 1 GB: make $(or $(MAKECMDGOALS),quickstart) TORCH_INDEX=<address of PyTorch's CPU index>"
endif
	@if [ "$(MAKECMDGOALS)" = quickstart ]; then echo "Then the quickstart runs for 4 to 6 minutes on 2 CPU cores."; fi
	$(PIP) $(OFFLINE) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e ".[docs]"
	@touch $@
