# For developers; CI calls the same targets. Needs python3 with pip, and make. `make` lists the targets.

PYTHON ?= python3
# Installed first, as one exact version: for a range pip may choose a newer build with gigabytes of CUDA.
TORCH ?= torch==2.13.0
BIN = .venv/bin

.PHONY: help install dev check pytest test demo docs pictures bench gpu clean
.DEFAULT_GOAL = help

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

install: .venv/installed  ## Make .venv and install bertdist into it

dev: .venv/dev  ## install, and the developers' tools

.venv/installed .venv/dev: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "bertdist needs Python 3.10 or newer; try: make PYTHON=python3.12 install"; exit 1; }
	@# Debian's python3 may lack ensurepip: then make the folder without pip and install pip with python3's own.
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install "$(TORCH)" || { echo "pip could not install $(TORCH): is the package index reachable?"; exit 1; }
	$(BIN)/python -m pip install -e ".$(if $(filter %dev,$@),[dev])" || { echo "pip could not install the requirements of setup.cfg: is the package index reachable?"; exit 1; }
	@touch $@

check: dev  ## ruff, its formatter and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: dev  ## All tests
	$(BIN)/python -m pytest

test: dev  ## check, and all tests, at the same time
	$(MAKE) --no-print-directory --jobs=2 check pytest

demo: install  ## Train a review classifier from the package index alone, on two cores in about ten minutes
	$(BIN)/python launch/demo.py

docs: install  ## Build the docs site into build/site, with warnings as errors
	$(BIN)/python -m pip install -e ".[docs]" || { echo "pip could not install mkdocs-material and mkdocstrings"; exit 1; }
	$(BIN)/python -m mkdocs build --strict

pictures: install  ## Make the pictures of the README and the docs site; needs .[browser] and a Chromium
	$(BIN)/python -m bench.pictures

bench: dev  ## Measure bertdist and its peers on this machine and write docs/benchmarks.md, about an hour on two idle cores
	$(BIN)/python -m pip install -e ".[bench]" || { echo "pip could not install matplotlib, onnx and onnxruntime"; exit 1; }
	$(BIN)/python launch/demo.py --prepare_only
	$(BIN)/python -m bench.peers
	! grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo || $(BIN)/python -m bench.peers --mixed_precision bf16 --contenders a,b,c
	$(BIN)/python -m bench.peers --prediction
	! grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo || $(BIN)/python -m bench.peers --prediction --mixed_precision bf16
	$(BIN)/python -m bench.scaling --train_file demo/data/train.tsv --output docs/benchmarks.md
	$(BIN)/python -m bench.reading --train_file demo/data/train.tsv --output docs/streaming.md

gpu:  ## Test and measure bertdist on a CUDA GPU, in nine minutes (docs/gpu.md); installs nothing
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu

clean:  ## Remove caches, builds and the demo's files; .venv stays
	rm -rf demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find bertdist bench launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
