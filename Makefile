# Everything a fresh clone needs is Python 3.11-3.13, git and make. `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST := .venv-oldest

# The tests are small: one thread each, on two processes, beats two threads in one process.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
FAST     := not gpu and not hub and not slow and not browser
JOBS     ?= 2

# Many tests start processes, and each would compile torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help quickstart test check test-all test-oldest app clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

# The tested versions: constraints.txt binds what is installed, and installs nothing by itself.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; ok = (3, 11) <= v < (3, 14); \
	  sys.exit(0 if ok else f"MMLM needs Python 3.11, 3.12 or 3.13; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

quickstart: $(STAMP)  ## train a small real assistant on this machine, score it, show it, offer a chat
	$(BIN)/mmlm quickstart $(ARGS)

test: $(STAMP)  ## the fast tests, on CPU, offline, in under ten minutes
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "$(FAST)" $(ARGS)

check: $(STAMP)  ## static checks: ruff, pyright, import-linter, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/codespell

test-all: $(STAMP)  ## every test that this machine can run
	OMP_NUM_THREADS=$(JOBS) TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -rs $(ARGS)

test-oldest: $(STAMP)  ## the fast tests on the lowest versions that pyproject.toml allows
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -q -n $(JOBS) --dist worksteal -m "$(FAST)" $(ARGS)

app: $(STAMP)  ## open the web page on what the quickstart trained
	$(BIN)/mmlm app runs/quickstart $(ARGS)

clean:  ## remove environments, caches and builds; runs/ stays
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
