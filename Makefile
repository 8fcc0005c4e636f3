# `make demo` and `make test` are all a newcomer needs. Everything else is here too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?=
# One more than there are cores: tests wait more than they work.
WORKERS ?= $(shell expr $$(nproc) + 1)

.PHONY: help demo test check lint types bench fuzz chaos conformance requirements clean

export PYTHONDONTWRITEBYTECODE :=

help:
	@echo "make demo    a gateway, two relays and a small service; traffic; a tunnel cut on purpose   (KEEP=1 leaves it up)"
	@echo "make test    all tests; system tests use sshd, nginx and redis-server where installed"
	@echo "make check   ruff, mypy --strict and make test: what CI runs"
	@echo "make bench   side by side with nginx and ssh   (BENCH_ARGS='--quick --only bulk')"
	@echo "make fuzz    a million malformed frames   (FRAMES=1000000); LIVE=100000 sends them to running daemons"
	@echo "make chaos   cuts, kills, stops, storms: everything we promise to survive, with figures   (CHAOS_ARGS='--short --only cuts')"
	@echo "make conformance  TLS scanners that are installed, against a gateway of its own"

$(READY): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python 3.11 or newer is needed (PYTHON=python3.12 make ...)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh .ci/venv-package
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned requirements into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	@$(BIN)/python -m examples.demo

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

# nginx and ssh are the distribution's builds, and so is the Python that is measured, where it is new enough.
BENCH_PYTHON = $(shell /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo /usr/bin/python3 || echo $(PYTHON))
BENCH_VENV := benchmarks/build/venv
bench:
	@$(MAKE) --no-print-directory VENV=$(BENCH_VENV) PYTHON=$(BENCH_PYTHON) $(BENCH_VENV)/.ready
	$(BENCH_VENV)/bin/python -m benchmarks $(BENCH_ARGS)

FRAMES ?= 1000000
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(if $(LIVE),--live $(LIVE),--frames $(FRAMES))

chaos: $(READY)
	@$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

conformance: $(READY)
	@$(BIN)/python -m tests.conformance

requirements: $(READY)
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/pip-compile -q --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --strip-extras \
	    --output-file requirements/run.txt pyproject.toml
	$(BIN)/pip-compile -q --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --strip-extras --allow-unsafe \
	    --extra dev --output-file requirements/dev.txt pyproject.toml
	$(BIN)/pip-compile -q --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --strip-extras --allow-unsafe \
	    --build-deps-for wheel --only-build-deps --constraint requirements/dev.txt --output-file requirements/build.txt pyproject.toml

clean:
	rm -rf $(VENV) benchmarks/build .mypy_cache .ruff_cache .pytest_cache .hypothesis
