# `make demo` and `make test` each set everything up from nothing but Python 3.11+ and do their work.
.DEFAULT_GOAL := check
.PHONY: check demo test test-all lint types docs clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := dev,sentence-transformers,tensorboard,bm25,minhash
PYTEST_FLAGS ?=
# Builds of torch without CUDA come from PyTorch's own index. TORCH_INDEX= (empty) takes what PyPI has.
HAS_NVIDIA := $(shell command -v nvidia-smi 2>/dev/null)
TORCH_INDEX ?= $(if $(HAS_NVIDIA),,https://download.pytorch.org/whl/cpu)

STAMP := $(VENV)/.installed

check: test

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PYTHON=$(BIN)/python EXTRAS=$(EXTRAS) TORCH_INDEX=$(TORCH_INDEX) bash tools/install.sh
	touch $@

demo: $(STAMP)
	$(BIN)/anchor demo

test: lint
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

test-all: lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m anchor_cli.words.spec_docs

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
