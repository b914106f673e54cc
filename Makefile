# Everything sets up .venv by itself, from nothing but Python >= 3.11 and make.
STUDY   ?= quick
PROFILE ?= profiles/local
PER_GPU ?= 1
PYTHON  ?= python3

BIN := .venv/bin
# not by --config, which would read a name such as 007 as a number
RUN := QREG_STUDY='$(STUDY)' $(BIN)/snakemake --profile $(PROFILE) --config per_gpu=$(PER_GPU) \
  $(if $(SEEDS_PER_JOB),seeds_per_job='$(SEEDS_PER_JOB)')
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
SHOW := cat results/$(STUDY)/table.md; printf '\nFigures and tables: results/%s/summary.html\n' $(STUDY)

.PHONY: help study extend join summary verify replicate voc walkthroughs book test test-fast test-slurm test-faults lint lab \
  bench bench-corruptions bench-training bench-detection
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

study: ## run what is missing of params/<study>.yaml, then summarise: STUDY=quick, PROFILE=, PER_GPU=, SEEDS_PER_JOB=
extend: ## add seeds to those of STUDY that are there, then summarise: SEEDS=0-15
extend: export QREG_SEEDS = $(or $(SEEDS),$(error name the seeds: make extend STUDY=$(STUDY) SEEDS=0-15))
# When some experiments fail (status 1), the others are summarised all the same; the summary lists what is missing.
study extend: .venv/ready
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; $(RUN); status=$$?; summary=$$status; \
	if [ $$status -eq 1 ] && ls results/$(STUDY)/*/.done >/dev/null 2>&1; then \
	  $(RUN) finished_only=true; summary=$$?; fi; \
	if [ $$summary -eq 0 ]; then $(SHOW); fi; \
	exit $$status

join: .venv/ready ## add the seeds that another folder has of STUDY: FROM=elsewhere/results/quick
	@$(BIN)/python -m qreg_utils.batch.join $(STUDY) '$(FROM)'

summary: .venv/ready ## figures and tables of STUDY again, from the results that are there; trains nothing
	@log=$$(mktemp); $(BIN)/python -m qreg_utils.batch.summarise $(STUDY) 2>$$log; status=$$?; \
	if [ $$status -eq 0 ]; then $(SHOW); else cat $$log >&2; fi; \
	rm -f $$log; exit $$status

verify: .venv/ready ## one committed experiment of STUDY again, at random or EXPERIMENT= and SEEDS=, and its tables
	@$(BIN)/python -m qreg_utils.batch.verify $(STUDY) $(if $(EXPERIMENT),--experiment $(EXPERIMENT)) \
	  $(if $(SEEDS),--seeds '$(SEEDS)')

replicate: .venv/ready ## STUDY again in other floating-point arithmetic, twice: do its verdicts hold?
	@$(BIN)/python -m qreg_utils.batch.replicate $(STUDY)

voc: .venv/ready ## download VOC: 2.8 GB, from the address that ultralytics gives, into the data folder
	@$(BIN)/python -m qreg_utils.detection.download

walkthroughs: .venv/ready ## execute the numbered notebooks into results/walkthroughs/: all, or NUMBERS='1b 4'
	@$(BIN)/python -m qreg_utils.batch.walkthroughs $(NUMBERS)

book: .venv/ready ## the site of pages, executed notebooks and docstrings: build/book/README.html
	@$(BIN)/sphinx-build -q -E -W --keep-going -c docs -b html . build/book && echo 'The book: build/book/README.html'

test: .venv/ready ## all tests, 9 to 10 minutes on two cores when last timed
	@$(PYTEST)

test-fast: .venv/ready ## the tests that are over in a minute
	@$(PYTEST) -m "not slow"

test-slurm: .venv/ready ## a toy study through sbatch, where a SLURM is running; a single node will do
	@QREG_SLURM=1 $(BIN)/python -m pytest -v tests/test_slurm.py

test-faults: .venv/ready ## a batch that is killed 20 times, and full disks: more of it than `make test` has
	@QREG_KILLS=20 $(BIN)/python -m pytest -v tests/test_faults.py

lint: .venv/ready ## ruff, and whether the notebooks are without outputs
	@$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

lab: .venv/ready ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab notebooks

# imagecorruptions needs setuptools < 81 for its pkg_resources; constraints.txt has one.
bench: bench-corruptions bench-training bench-detection ## all benchmarks
bench-corruptions: ## the corruptions beside imagecorruptions
bench-training: ## training steps and whole runs
bench-detection: ## detectors
bench-corruptions: export OMP_NUM_THREADS = 1
# as the batch sets them for its kernels (batch/running.py)
bench-corruptions: export MALLOC_MMAP_THRESHOLD_ = 1073741824
bench-corruptions: export MALLOC_TRIM_THRESHOLD_ = 1073741824
bench-corruptions bench-training bench-detection: .venv/ready
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[study,dev,detection,docs,bench]'
	@$(BIN)/python benchmarks/$(@:bench-%=%).py

# A .venv that was made elsewhere (the folder was renamed or copied) does not work: it is made again.
ifneq ($(shell cat .venv/ready 2>/dev/null),$(CURDIR))
.PHONY: .venv/ready
endif
unexport PIP_USER PIP_TARGET PIP_PREFIX PYTHONHOME

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qreg needs Python >= 3.11; name one: make PYTHON=python3.12")'
	@if [ "$$(cat .venv/ready 2>/dev/null)" != "$(CURDIR)" ]; then rm -rf .venv; fi
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[study,dev,detection,docs]'
	@printf '%s\n' "$(CURDIR)" > $@
