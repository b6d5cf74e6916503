# `make train` on a fresh machine with Python 3.11: creates .venv, installs what constraints.txt pins, trains.

PYTHON ?= python3
VENV := .venv
RUN ?= sinusoid
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Three processes on two cores: what starts clusters mostly waits.
PYTEST := $(BIN)/python -m pytest -n 3
BENCH_STAMP := $(VENV)/installed-bench

.PHONY: train test check slow chaos convolutions fuzz zoo bench gpu lock clean help

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

train: $(STAMP)  ## the main job: RUN=sinusoid ARGS="--iterations 1000"
	$(BIN)/metafleet train $(RUN) $(ARGS)

test: check  ## what CI runs: style, types, tests, and those of kernels once more held to AVX2 (minutes)
	$(PYTEST) -m "not slow" --durations 20 $(ARGS)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "kernels and not slow" $(ARGS) || test $$? -eq 5  # 5: ARGS chose none of them

check: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(STAMP)  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS)

chaos: $(STAMP)  ## hundreds of faults upon a run, in both modes (about half an hour)
	$(BIN)/python -m tests.chaos --faults 110 --policy synchronous
	$(BIN)/python -m tests.chaos --faults 110 --policy asynchronous

convolutions: $(STAMP)  ## every mix of convolution on every instruction set of this machine (minutes each)
	$(BIN)/python -m tests.convolutions

fuzz: $(STAMP)  ## a million mutated inputs to every reader (minutes)
	$(BIN)/python -m tests.fuzz

zoo: $(STAMP)  ## MAML's gradient through some 140 modules as people write them, as a table (ARGS="--modes loop vmap": a minute)
	$(BIN)/python -m tests.zoo $(ARGS)

gpu: $(BENCH_STAMP)  ## on a machine with CUDA: the whole suite and every benchmark, into RESULTS.md (an hour)
	$(BIN)/python -m tests.gpu $(ARGS)

bench: $(BENCH_STAMP)  ## every benchmark: ratios, side by side (about half an hour)
	for b in tests/bench/bench_*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

lock: $(STAMP)  ## pin what is installed now
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu//' > constraints.txt

clean:
	rm -rf $(VENV)

# torch comes first and by its exact version: asked for by a range, the index's newest would come instead, with
# gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is wanted, this is {sys.version.split()[0]}; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	touch $@
