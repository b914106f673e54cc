# Everything sets up .venv by itself, from nothing but Python >= 3.11 and make.
STUDY   ?= quick
PROFILE ?= profiles/local
PYTHON  ?= python3

BIN := .venv/bin
RUN := $(BIN)/snakemake --profile $(PROFILE) --config study=$(STUDY)

.PHONY: study test lab lint bench clean
.DEFAULT_GOAL := study

study: .venv/ready ## run params/$(STUDY).yaml: every experiment, then the summary
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(RUN) && cat results/$(STUDY)/table.md && \
	  printf '\nFigures and tables: results/%s/summary.html\n' $(STUDY)

test: .venv/ready
	@$(BIN)/python -m pytest

lint: .venv/ready
	@$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/nbstripout --verify notebooks/*.ipynb

lab: .venv/ready
	@$(BIN)/jupyter lab notebooks

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qreg needs Python >= 3.11; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@
