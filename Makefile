# Every target does its own set-up: a virtual environment with the exact versions of constraints.txt. pip reads its own
# PIP_* variables, so PIP_FIND_LINKS or PIP_INDEX_URL decide where a build of torch comes from.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed
STAMP_MIN = .venv-min/.installed

.PHONY: help quickstart test test-min fuzz table memory benchmark results results-run figures clean

help:
	@echo "make quickstart   train a tiny model on source code, save, reload, generate: about 5 minutes"
	@echo "make test         linter and tests"
	@echo "make test-min     cache and reference tests on the oldest supported transformers"
	@echo "make fuzz         two thousand random cache histories"
	@echo "make table        parameters and FLOPs of the published models beside the paper's"
	@echo "make memory       bytes that a cache holds, per level, with a bar chart"
	@echo "make benchmark    time and memory beside GPT-NeoX of the same width, with a picture: about 25 minutes"
	@echo "make results      tables and pictures of the experiments, from the lines of their finished runs"
	@echo "make results-run  DATA_DIR=folder: the experiments themselves, from where they stopped: about 7 hours in all"
	@echo "make figures      draw the figures of the docs"
	@echo "make clean        remove environments and runs"

$(STAMP): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt torch
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[train,eval,dev]"
	@touch $(STAMP)

# torch first here as well; the rest without constraints.txt, whose transformers is the newest supported.
$(STAMP_MIN): setup.py constraints.txt
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-min/bin/python -m pip install --quiet transformers==5.17.0 pytest pytest-xdist hypothesis
	@touch $(STAMP_MIN)

quickstart: $(STAMP)
	$(RUN) scripts/quickstart.py

test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest -n 2 --dist loadfile

test-min: export OMP_NUM_THREADS = 1
test-min: $(STAMP_MIN)
	.venv-min/bin/python -m pytest -n 2 tests/test_reference.py tests/test_cache.py tests/test_static_cache.py tests/test_mutations.py \
		tests/test_generation.py tests/test_modeling.py -k "not compile"

fuzz: export OMP_NUM_THREADS = 1
fuzz: $(STAMP)
	$(RUN) -m pytest tests/test_cache.py -k TestCache --hypothesis-profile=fuzz

table: $(STAMP)
	$(RUN) scripts/model_table.py

memory: $(STAMP)
	$(RUN) scripts/cache_memory.py --config configuration/spiralformer-b-mesh-160m

benchmark: $(STAMP)
	$(RUN) scripts/benchmark.py
	$(RUN) scripts/plot_benchmark.py

results: $(STAMP)
	$(RUN) scripts/report.py

# In the order in which their runs start. Two runs at a time, one core each, use a small machine better than one on both.
EXPERIMENTS = main_small ablations recurrence_ratio main_large main_small_long
WORKERS ?= 2

results-run: $(STAMP)
	@test -n "$(DATA_DIR)" || { echo "DATA_DIR must name the folder of the texts: make results-run DATA_DIR=..."; exit 2; }
	$(RUN) scripts/experiment.py --experiments $(EXPERIMENTS:%=scripts/experiments/%.yaml) --data_dir "$(DATA_DIR)" \
		--workers $(WORKERS)
	$(RUN) scripts/report.py

figures: $(STAMP)
	$(RUN) scripts/draw_figures.py

clean:
	rm -rf .venv .venv-min runs
