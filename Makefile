# Everything a developer types. `make demo` needs Python and make alone.
PYTHON ?= python3
PRESET ?= sd15
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test test-all test-gpu lint bench bench-peers bench-serving bench-gpu pictures clean
.DEFAULT_GOAL := help

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.core ## set up a virtual environment and draw a picture
	$(BIN)/latentrt generate "a red apple" --seed 7 --output out/a-red-apple.png
	@echo "Look at out/a-red-apple.png"

test: $(VENV)/.dev ## what CI runs, save the linters
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow and not gpu"

test-all: $(VENV)/.ray ## with the tests that take minutes, those of two replicas of Ray too
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not gpu"

test-gpu: $(VENV)/.dev ## what needs an NVIDIA GPU: parity, bits, memory; fails where no network runs on one
	$(BIN)/python -m tests.gpu

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## every benchmark that needs no GPU, side by side with diffusers; refreshes benchmarks/results
	$(BIN)/python -m benchmarks all

bench-peers: $(VENV)/.dev ## beside other engines on a CPU; makes an environment of 1 GB for each the first time
	$(BIN)/python -m benchmarks peers

bench-serving: $(VENV)/.dev ## batching by step against its alternatives, over arrivals in real time; six minutes
	$(BIN)/python -m benchmarks.serving

bench-gpu: $(VENV)/.dev ## full-size models on an NVIDIA GPU; PRESET=sd15, sd21 or sdxl
	$(BIN)/python -m benchmarks gpu --preset $(PRESET)

pictures: $(VENV)/.core ## the README's pictures
	$(BIN)/python docs/pictures.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the core of latentrt (no torch) into $(VENV) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing what tests need (torch, diffusers, ...) into $(VENV); this takes minutes ..."
	$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/.core

$(VENV)/.ray: $(VENV)/.dev
	@echo "Installing Ray into $(VENV) (280 MiB) ..."
	$(PIP) --editable ".[dev,ray]"
	@touch $@

clean: ## remove everything that was made
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
