# `make demo` and `make test` each set everything up from nothing but Python 3.11+ and do their work.
.DEFAULT_GOAL := test
.PHONY: demo test test-all lint docs clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
EXTRAS := dev,sentence-transformers,tensorboard,bm25,minhash
# A file's tests stay together: they share started processes. `make test PYTEST_FLAGS=` runs one after the other.
PYTEST_FLAGS ?= --numprocesses logical --maxprocesses 8 --dist loadfile
INSTALLED := $(VENV)/.installed

# Without an NVIDIA driver torch comes from PyTorch's index of CPU builds (200 MB, not 3 GB), where that can be reached.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX = $(shell command -v nvidia-smi > /dev/null || \
	{ $(PYTHON) -c 'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=10)' 2> /dev/null && \
	echo --extra-index-url $(CPU_INDEX); })

test: lint  ## lint, types and tests: what continuous integration runs
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

demo: $(INSTALLED)  ## the whole path on a laptop CPU
	$(BIN)/anchor demo

test-all: lint  ## the slow tests and the container image, too
	$(BIN)/python -m pytest $(PYTEST_FLAGS)
	@if command -v docker >/dev/null || command -v buildah >/dev/null; then bash docker/test-image.sh; \
	else echo "neither docker nor buildah is here: the image is not tested"; fi

lint: $(INSTALLED)
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## the pages that are generated from the code
	$(BIN)/python -m anchor_cli.spec.docs
	$(BIN)/python -m anchor_cli.commands.cli_docs

# DeepSpeed is published as source only: its build wants setuptools and wheel, sees no torch, and so compiles nothing now.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) $(TORCH_INDEX) --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
