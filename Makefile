# Every target sets up what it needs; the second time that costs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, with one thread each.
JOBS ?= 2

# Models and data come from disk: without this, a missing file would mean half a minute of network retries.
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test lint bench docs figures clean

help:
	@echo "make setup   the environment in $(VENV)"
	@echo "make demo    profile the demo model; tables, figures and a summary in runs/demo"
	@echo "make test    lint, types, tests, notebooks"
	@echo "make lint    ruff and mypy"
	@echo "make bench   measure speed and memory"
	@echo "make figures draw figures/ anew from the tables in figures/data; with RUNS=FOLDER, from the demo models' runs there"
	@echo "make docs    the documentation in site/, with the notebooks executed"
	@echo "make clean   remove what make made, except the environment and runs/"

setup: $(VENV)/.dev

# Shared by the extras below: $(call install,extras)
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "capa_probe needs Python 3.11 or newer; name one with make PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "python3 -m venv failed; on Debian, install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(1)]"
endef

$(VENV)/.dev: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes and about 7 GB, once)"
	$(call install,dev)
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(call install,dev$(comma)docs)
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(call install,dev$(comma)bench)
	@touch $@

demo: $(VENV)/.dev
	$(BIN)/capa-probe demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=120 --numprocesses=$(JOBS) --dist=loadfile tests $(wildcard notebooks/*.ipynb)

bench: $(VENV)/.bench
	@set -e; found=; for script in benchmarks/[a-z]*.py; do \
		test -e "$$script" || continue; found=1; echo "$$script"; $(BIN)/python "$$script"; \
	done; test -n "$$found" || { echo "benchmarks/ holds no scripts" >&2; exit 1; }

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

# RUNS: what scripts/compare_families.py makes, as in make figures RUNS=runs/families; see docs/figures.md.
figures: $(VENV)/.dev
	$(BIN)/python scripts/figures.py $(if $(RUNS),--runs $(RUNS))

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

comma := ,
