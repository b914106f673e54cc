# Everything sets up .venv by itself, from nothing but Python >= 3.11 and make.
STUDY   ?= quick
PROFILE ?= profiles/local
PER_GPU ?= 1
PYTHON  ?= python3

BIN := .venv/bin
RUN := $(BIN)/snakemake --profile $(PROFILE) --config study=$(STUDY) per_gpu=$(PER_GPU)

.PHONY: study verify voc walkthroughs test test-slurm test-faults lint lab bench bench-corruptions bench-training bench-detection
.NOTPARALLEL:
.DEFAULT_GOAL := study

# When some experiments fail (status 1), the others are summarised all the same; the summary lists what is missing.
study: .venv/ready
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; $(RUN); status=$$?; summary=$$status; \
	if [ $$status -eq 1 ] && ls results/$(STUDY)/*/.done >/dev/null 2>&1; then \
	  $(RUN) finished_only=true; summary=$$?; fi; \
	if [ $$summary -eq 0 ]; then cat results/$(STUDY)/table.md; \
	  printf '\nFigures and tables: results/%s/summary.html\n' $(STUDY); fi; \
	exit $$status

# One experiment of the committed results again (by chance; EXPERIMENT names one), and the README's tables
verify: .venv/ready
	@$(BIN)/python -m qreg_utils.verify $(STUDY) $(if $(EXPERIMENT),--experiment $(EXPERIMENT))

# 2.8 GB, from the address that ultralytics gives, into the data folder
voc: .venv/ready
	@$(BIN)/python -m qreg_utils.detection.download

test: .venv/ready
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# A toy study through sbatch, where a SLURM is running; a single node will do
test-slurm: .venv/ready
	@QREG_SLURM=1 $(BIN)/python -m pytest -v tests/test_slurm.py

# More of it than the test suite has
test-faults: .venv/ready
	@QREG_KILLS=20 $(BIN)/python -m pytest -v tests/test_faults.py

lint: .venv/ready
	@$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

lab: .venv/ready
	@$(BIN)/jupyter lab notebooks

walkthroughs: .venv/ready
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	out=results/walkthroughs; mkdir -p $$out; \
	for notebook in notebooks/[0-9]_*.ipynb; do \
	  papermill --engine qreg --no-progress-bar $$notebook $$out/unfinished.ipynb && \
	  mv $$out/unfinished.ipynb $$out/$$(basename $$notebook) || exit 1; \
	done

# imagecorruptions needs setuptools < 81 for its pkg_resources; constraints.txt has one.
bench: bench-corruptions bench-training bench-detection
bench-corruptions: export OMP_NUM_THREADS = 1
bench-corruptions bench-training bench-detection: .venv/ready
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,detection,bench]'
	@$(BIN)/python benchmarks/$(@:bench-%=%).py

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qreg needs Python >= 3.11; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,detection]'
	@touch $@
