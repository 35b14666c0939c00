# Every target does its own set-up: Python >= 3.11 and a package index are all a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-all
STAMP_DEV := $(VENV)/.installed-dev

RUNS ?= 1000000

.PHONY: demo test lint interop bench bench-engines bench-transport bench-simulation fuzz schemas clean

demo: $(STAMP)
	@$(BIN)/swarmpy demo $(ARGS)

test: $(STAMP_DEV) lint
	@$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP_DEV)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy -p swarmpy -p swarmpy_cli
	@$(BIN)/lint-imports

# js-libp2p, go-libp2p and py-libp2p, each where it is installed: all dial and are dialled.
interop: $(STAMP_DEV)
	@$(BIN)/python -m pytest tests/interop $(ARGS)

bench: $(STAMP_DEV)
	@$(BIN)/python benchmarks/bench_pipeline.py $(ARGS)

bench-engines: $(STAMP_DEV)
	@$(BIN)/python benchmarks/bench_engines.py $(ARGS)

bench-transport: $(STAMP_DEV)
	@$(BIN)/python benchmarks/bench_transport.py $(ARGS)

bench-simulation: $(STAMP_DEV)
	@$(BIN)/python benchmarks/bench_simulation.py $(ARGS)

# Arbitrary bytes into every decoder: `make fuzz RUNS=10000 TARGET=yamux`. See fuzz/README.md.
fuzz: $(STAMP_DEV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary atheris --editable '.[fuzz]' \
	|| echo "atheris has no wheel for this Python and machine"
	@$(BIN)/python -m fuzz --runs $(RUNS) $(if $(TARGET),--target $(TARGET))

schemas: $(STAMP_DEV)
	@$(BIN)/python tests/proto/schemas.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("swarmpy needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "installing swarmpy and what it needs (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	@touch $@

$(STAMP_DEV): pyproject.toml tests/js/package.json | $(VENV)/bin/python
	@echo "installing swarmpy, its tests' tools and the peers they talk with (once)"
	@if echo '#include <gmp.h>' | cc -E -x c - >/dev/null 2>&1; then extras=all,dev,libp2p; \
	else extras=all,dev; echo "cc or gmp.h is missing: the tests with py-libp2p will be skipped"; fi; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$$extras]"
# py-libp2p brings types of an old trio along, and mypy would believe them rather than trio's own.
	@rm -rf $(VENV)/lib/python3*/site-packages/trio-stubs
	@if command -v npm >/dev/null; then npm install --prefix tests/js --no-fund --no-audit --loglevel=error --no-package-lock; \
	else echo "npm is not installed: the interop tests with js-libp2p will be skipped"; fi
	@touch $@ $(STAMP)

clean:
	rm -rf $(VENV) tests/js/node_modules tests/interop/go/build .mypy_cache .ruff_cache .pytest_cache .hypothesis
