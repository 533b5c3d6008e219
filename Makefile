# make quickstart: train and compare on real text.  make test: every test.  Both set up all they need.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
# The first of these that runs and is a version that setup.py allows.
PYTHON := $(shell for p in python3.11 python3.12 python3.10 python3.9 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
READY := $(VENV)/ready

.PHONY: quickstart test coverage test-matrix lint benchmark gpu experiments results clean

quickstart: $(READY)
	@$(VENV)/bin/python examples/quickstart/run.py $(if $(PAIRS),--pairs "$(PAIRS)")

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

# Which lines the tests run, also in the commands that they start; docs/reliability.md has what came of it.
coverage: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered

# Every combination of Python and torch that noxfile.py lists; hours and gigabytes. SESSION names one.
test-matrix: $(READY)
	$(VENV)/bin/nox $(if $(SESSION),-s "$(SESSION)")

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	git ls-files '*.sh' .ci/run | xargs $(VENV)/bin/shellcheck

# Wants the machine for itself.
benchmark: $(READY)
	$(VENV)/bin/python -m benchmarks

# On a machine with a GPU, also without network: WHEELS=folder holds what its Python lacks.
gpu:
	@benchmarks/gpu.sh $(if $(OUT),--out "$(OUT)") $(if $(WHEELS),--wheels "$(WHEELS)")

# Hours, in the background if you like: it goes on where it was interrupted. JOBS=2: two runs side by side.
experiments: $(READY)
	$(VENV)/bin/python -m experiments $(if $(JOBS),--jobs "$(JOBS)")

# Its name up to version 0.1.
results: experiments

# torch alone and first, so that no other package chooses its version.
$(READY): setup.py constraints.txt
	@echo "Setting up $(VENV) with $(PYTHON) (once; a few minutes)"
	@test -n "$(PYTHON)" || { echo "No Python from 3.9 to 3.12 was found (fairseq has no build for 3.13); PYTHON=... names one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))' || $(VENV)/bin/python -m pip install --quiet --progress-bar off 'pip<24.1'
	$(VENV)/bin/python -m pip install --quiet --progress-bar off -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
