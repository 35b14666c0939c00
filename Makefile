# Every target does its own set-up: Python >= 3.11 and a package index are all a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-all
STAMP_DEV := $(VENV)/.installed-dev

.PHONY: demo test lint bench clean

demo: $(STAMP)
	@$(BIN)/swarmpy demo $(ARGS)

test: $(STAMP_DEV) lint
	@$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP_DEV)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy -p swarmpy -p swarmpy_cli
	@$(BIN)/lint-imports

bench: $(STAMP_DEV)
	@$(BIN)/python benchmarks/bench_pipeline.py $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("swarmpy needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "installing swarmpy and what it needs (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	@touch $@

$(STAMP_DEV): pyproject.toml tests/js/package.json | $(VENV)/bin/python
	@echo "installing swarmpy, its tests' tools and the js-libp2p peer (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all,dev]'
	@if command -v npm >/dev/null; then npm install --prefix tests/js --no-fund --no-audit --loglevel=error --no-package-lock; \
	else echo "npm is not installed: the interop tests with js-libp2p will be skipped"; fi
	@touch $@ $(STAMP)

clean:
	rm -rf $(VENV) tests/js/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
