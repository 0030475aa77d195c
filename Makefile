# Everything runs in .venv, made once. PYTHON picks the interpreter (3.11 to 3.13); TORCH_INDEX names another wheel index
# for torch, for example a CPU-only one on a machine without a GPU.
PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RECIPE ?= recipes/stdlib.toml

.PHONY: setup setup-test demo check test test-all drills bench bench-planner clean

setup: .venv/installed
setup-test: .venv/installed-test

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "$(PYTHON) is not Python 3.11 to 3.13; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) -e '.[test]'
	@touch $@

.venv/installed-harness: .venv/installed-test
	$(INSTALL) -e '.[lm-eval]'
	@touch $@

demo: setup
	.venv/bin/athanor run $(RECIPE)

check: setup-test
	.venv/bin/ruff check .
	.venv/bin/mypy --strict athanor/foundation athanor/ledger athanor/laws athanor/cost athanor/planner athanor/data
	.venv/bin/mypy athanor
	.venv/bin/python -m pytest -q tests/house

test: setup-test
	.venv/bin/python -m pytest -q -m "not slow and not drill" --durations=15

test-all: .venv/installed-harness
	.venv/bin/python -m pytest -q -m "not drill" --durations=25

# Long ones first; then five times what injects faults, whose moments are drawn anew each time.
FAULTS = tests/jobs tests/slurm $(addprefix tests/train/test_train_,saver.py disks.py guards.py elastic.py resume.py watch.py)
drills: setup-test
	.venv/bin/python -m pytest -q -m drill --durations=25
	@for round in 1 2 3 4 5; do echo "== faults, round $$round of 5"; \
	  .venv/bin/python -m pytest -q -m "not drill" $(FAULTS) || exit 1; done

bench: setup-test
	@for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; .venv/bin/python $$script || exit 1; done

bench-planner: setup-test
	.venv/bin/python benchmarks/planner.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
