# make serve | test | setup | demo | pd-demo | check | sanitize | bench | docs | clean     (README.md tells the first ten minutes)
#   PORT=8001          where `make serve` listens       MODEL=DIR   what it serves
#   TORCH_INDEX=URL    a package index for torch        PYTHON=...  which Python .venv is made with
#   CXX=...            the compiler of the kernels      PYTEST=...  for pytest: make test PYTEST="tests/core -x"
#   JOBS=2             files of tests at a time (0: in one process, for a debugger)
SHELL := /bin/bash
.DEFAULT_GOAL := help
PORT ?= 8000
MODEL ?= penstock-tiny
PYTEST ?=
JOBS ?= 2
RUN := .venv/bin

.PHONY: help setup serve test check sanitize demo pd-demo bench docs clean

help:
	@head -5 Makefile | cut -c3-

setup:
	@TORCH_INDEX="$(TORCH_INDEX)" PYTHON="$(PYTHON)" scripts/setup.sh

serve: setup
	@$(RUN)/penstock serve $(MODEL) --port $(PORT); code=$$?; [ $$code -eq 130 ] || exit $$code

test: check
	$(RUN)/python -m pytest -q -n $(JOBS) --dist loadfile $(PYTEST)

check: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/python -m pytest -q tests/test_floors.py

sanitize: setup
	@scripts/sanitize.sh $(PYTEST)

demo: setup
	@$(RUN)/penstock demo

pd-demo: setup
	@$(RUN)/python scripts/pd_demo.py

bench: setup
	$(RUN)/penstock bench startup
	$(RUN)/penstock bench latency
	$(RUN)/penstock bench throughput

docs: setup
	$(RUN)/python scripts/docs.py

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
