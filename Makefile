# `make test` and `make demo` do all the set-up they need, in .venv; the second time they start at once.
PYTHON ?= python3
WORKERS ?= 2
# make CONSTRAINTS=/dev/null test takes the newest releases in place of the pinned ones.
CONSTRAINTS ?= constraints.txt
# First and by its exact name: as a dependency of others, pip could choose a build for another machine.
TORCH := $(shell sed -n '/^torch==/p' $(CONSTRAINTS))
VENV := .venv
BIN := $(VENV)/bin
KERNEL := mea_compress/modeling/decode_cpu.c
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help setup test quick lint format kernel docs demo clean

help:
	@echo "make demo    train a small model, compress it, heal it and compare (a few minutes)"
	@echo "make test    linters, types and tests"
	@echo "make quick   the tests that take a minute"
	@echo "make lint    linters and types only"
	@echo "make format  rewrite the sources in the project's format"
	@echo "make kernel  embed decode_cpu.c, once edited, in the Python file of every checkpoint"
	@echo "make docs    the documentation as a site, in site/"
	@echo "make clean   remove .venv, caches and the demo's output"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV), once (PyTorch is large: this takes some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(or $(TORCH),torch)"
	@$(PIP) -e ".[dev,plots,eval]"
	@touch $@

$(DOCS_READY): $(READY)
	@$(PIP) -e ".[docs]"
	@touch $@

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(KERNEL)
	@$(BIN)/python tools/embed_kernel.py --check
	@$(BIN)/python tools/compile_kernel.py

# One thread a worker: two workers with two threads each are slower on two cores.
test: lint
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --nbmake tests notebooks

quick: $(READY)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m "not slow and not process" tests

docs: $(DOCS_READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html"

format: kernel
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

kernel: $(READY)
	@$(BIN)/clang-format -i $(KERNEL)
	@$(BIN)/python tools/embed_kernel.py

demo: $(READY)
	@$(BIN)/mea-compress demo

clean:
	rm -rf $(VENV) demo dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
