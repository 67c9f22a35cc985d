# `make demo` and `make test` each set everything up from nothing but Python 3.11+ and do their work.
.DEFAULT_GOAL := test
.PHONY: gpu-kit demo test test-all test-plain-cpu lint docs clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
EXTRAS := dev,sentence-transformers,tensorboard,bm25,minhash
# A file's tests stay together: they share started processes. One worker more than there are cores, because tests wait
# for processes and deadlines, too. `make test PYTEST_FLAGS=` runs one after the other.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(8, 1 + os.cpu_count()))')
PYTEST_FLAGS ?= --numprocesses $(WORKERS) --dist loadfile
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

test-all: lint test-plain-cpu  ## the slow tests, another processor's arithmetic and the container image, too
	$(BIN)/python -m pytest $(PYTEST_FLAGS)
	@if command -v docker >/dev/null || command -v buildah >/dev/null; then bash docker/test-image.sh; \
	else echo "neither docker nor buildah is here: the image is not tested"; fi

# Another processor rounds otherwise: a test that rests on the last bit of a product passes here and fails there.
NUMERIC_TESTS := $(addprefix tests/test_,attention_kernels.py backbone.py evaluate.py eval_command.py export_parity.py \
	geometry.py objective.py objective_texts.py padded_baseline.py retrieval.py stage2_examples.py vector_search.py)
test-plain-cpu: $(INSTALLED)  ## the numeric tests without the vector instructions of this processor
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem \
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS) $(NUMERIC_TESTS)

lint: $(INSTALLED)
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu-kit: $(INSTALLED)  ## what benchmarks/gpu needs on a host with a card and without a network
	$(BIN)/python benchmarks/gpu/kit.py gpu-kit

docs: $(INSTALLED)  ## the pages that are generated from the code
	$(BIN)/python -m anchor_cli.spec.docs
	$(BIN)/python -m anchor_cli.cli_docs
	$(BIN)/python docs/rooms.py

# DeepSpeed is published as source only: its build wants setuptools and wheel, sees no torch, and so compiles nothing now.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) $(TORCH_INDEX) --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
