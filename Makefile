# Two commands matter: `make demo` (the whole way on synthetic CTs) and `make test`. Both need Python 3.11, git and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Another seed is another folder: a finished demo is never taken for one with other settings.
SEED ?= 0
DEMO ?= runs/demo$(if $(filter-out 0,$(SEED)),-seed$(SEED))
WORKERS ?= 2
# An index that carries CPU wheels of torch, for machines without an NVIDIA driver (empty: your default package index).
TORCH_INDEX ?=

# glibc gives freed tensors back to the kernel and page-faults them in again at every step; keeping them saves about a
# tenth of a training step on a CPU.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 100000000000
export TOKENIZERS_PARALLELISM = false

.PHONY: help install demo demo-long demo-control ablation test test-slow test-floor bench lint clean-demo

help:
	@echo "make demo       synthetic CTs -> processed split -> training -> evaluation -> loaded back (about 13 minutes)"
	@echo "make demo-long  the longer recipe on the same patients (about 40 minutes)"
	@echo "make demo-control  the demo's recipe with captions shuffled between patients, three times: chance"
	@echo "make ablation   contrast size, targets, balance, global branch, LoRA: some two hours, docs/ablation.md"
	@echo "make test       the fast tests (minutes); make test-slow: the rest; make test-floor: lowest versions"
	@echo "make bench      every benchmark, results in runs/bench and benchmarks/RESULTS.md (about an hour; 17 GB of free memory)"
	@echo "make lint       ruff"

# --- environment ------------------------------------------------------------------------------------------------------
# A machine without an NVIDIA driver gets torch 2.13.0 before anything else asks for a newer, CUDA-carrying build.
$(BIN)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
		echo "NVIDIA driver found: installing torch>=2.8"; \
		$(BIN)/python -m pip install --quiet "torch>=2.8"; \
	else \
		echo "no NVIDIA driver: installing torch==2.13.0"; \
		$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "torch==2.13.0"; \
	fi
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

install: $(BIN)/.installed

# --- the demo ---------------------------------------------------------------------------------------------------------
# Each stage writes one file last (.done, manifest.json, README.md, metrics.json): a broken-off demo goes on from there.
# With other numbers of patients name another folder as well: make demo DEMO=runs/small DEMO_PATIENTS=400
DEMO_PATIENTS ?= 2400
DEMO_VALIDATION ?= 300

# Two processes of one thread each: small matrices gain little from a second thread. They contrast the same batch of 8,
# and give the same gradients, as one process would. `accelerate launch --cpu` would start a single process in silence.
TRAIN := ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(BIN)/accelerate launch \
	--config_file hub_configs/accelerate/cpu_two.yaml train_fvlm.py --data $(DEMO)/processed \
	--per_device_train_batch_size 4 --seed $(SEED) --resume_from_checkpoint auto
EVALUATE := $(BIN)/python eval_fvlm.py --data $(DEMO)/processed --split validation --tasks synthetic

$(DEMO)/source/.done: | $(BIN)/.installed
	rm -rf $(DEMO)/source
	$(BIN)/python -m data_builders synthetic --patients $(DEMO_PATIENTS) --validation $(DEMO_VALIDATION) \
		--seed $(SEED) --workers $(WORKERS) --out $(DEMO)/source
	touch $@

$(DEMO)/processed/manifest.json: $(DEMO)/source/.done
	$(BIN)/python -m data_builders ct_rate --source $(DEMO)/source --organs body_24 --spacing 20 4 4 --margin 1 4 4 \
		--workers $(WORKERS) --out $(DEMO)/processed

$(DEMO)/model/README.md: $(DEMO)/processed/manifest.json
	$(TRAIN) --recipe synthetic_demo --output_dir $(DEMO)/model

$(DEMO)/eval/metrics.json: $(DEMO)/model/README.md
	$(EVALUATE) --model $(DEMO)/model --out $(DEMO)/eval

demo: $(DEMO)/eval/metrics.json
	$(BIN)/python -m evaluation_fvlm.tour --run $(DEMO)

# The longer recipe on the demo's patients.
$(DEMO)/long/model/README.md: $(DEMO)/processed/manifest.json
	$(TRAIN) --recipe synthetic --output_dir $(DEMO)/long/model

demo-long: $(DEMO)/long/model/README.md
	$(EVALUATE) --model $(DEMO)/long/model --out $(DEMO)/long/eval

# The demo's recipe with captions shuffled between patients, three times: chance, 0.50. One shuffle says little: signs that
# are easy to see are paired with the wrong sentences one way or the other, and such findings end near 0 or near 1.
CONTROL_SEEDS ?= 0 1 2
CONTROL := $(DEMO)/control-seed

.SECONDARY:
$(CONTROL)%/model/README.md: $(DEMO)/processed/manifest.json
	$(TRAIN) --recipe synthetic_demo --shuffle_captions --seed $* --output_dir $(CONTROL)$*/model

$(CONTROL)%/eval/metrics.json: $(CONTROL)%/model/README.md
	$(EVALUATE) --model $(CONTROL)$*/model --out $(CONTROL)$*/eval

demo-control: $(CONTROL_SEEDS:%=$(CONTROL)%/eval/metrics.json) $(DEMO)/model/README.md
	$(BIN)/python -m training_fvlm.curves $(DEMO)/model --compare $(CONTROL)$(firstword $(CONTROL_SEEDS))/model \
		--out $(DEMO)/control_curves.png
	@$(BIN)/python -c "import json, statistics, sys; \
		aucs = [json.load(open(path))['macro_auc'] for path in sys.argv[1:]]; \
		print('macro AUC, captions shuffled:', *(f'{auc:.3f}' for auc in aucs), f'mean {statistics.mean(aucs):.3f}')" \
		$(filter %/metrics.json,$^)

# What is finished is not run again. ABLATION_FLAGS are options of the command:
# make ablation ABLATION_FLAGS="--rows steps-8"
ABLATION ?= runs/ablation
ABLATION_FLAGS ?=

$(ABLATION)/source/.done: | $(BIN)/.installed
	rm -rf $(ABLATION)/source
	$(BIN)/python -m data_builders synthetic --patients 2400 --validation 300 --seed 0 --workers $(WORKERS) \
		--out $(ABLATION)/source
	touch $@

$(ABLATION)/processed/manifest.json: $(ABLATION)/source/.done
	$(BIN)/python -m data_builders ct_rate --source $(ABLATION)/source --organs body_24 --spacing 20 4 4 --margin 1 4 4 \
		--workers $(WORKERS) --out $(ABLATION)/processed

ablation: $(ABLATION)/processed/manifest.json
	$(BIN)/python -m benchmarks.ablation --data $(ABLATION)/processed --out $(ABLATION) --jobs $(WORKERS) $(ABLATION_FLAGS)

clean-demo:
	rm -rf $(DEMO)

# --- tests ------------------------------------------------------------------------------------------------------------
test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations 15

test-slow: $(BIN)/.installed
	$(BIN)/python -m pytest -q -m "slow and not gpu and not hub"

test-floor:
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --upgrade pip
	$(PYTHON) .ci/lowest_versions.py setup.cfg > .venv-floor/constraints.txt
	.venv-floor/bin/python -m pip install --quiet -c .venv-floor/constraints.txt -e ".[test]"
	OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -q -n $(WORKERS) --dist loadfile

# --- benchmarks -------------------------------------------------------------------------------------------------------
# One after the other, whatever -j says: each wants the whole machine. BENCH_FLAGS are options that all of them have
# (make bench BENCH_FLAGS="--repeats 1"); some only: make bench BENCHMARKS="pooling text".
BENCHMARKS ?= pooling text step memory evaluate scaling prepare input gradient_cache decompose retrieval score_bootstrap
BENCH ?= runs/bench
BENCH_FLAGS ?=
bench_scaling = --plot $(BENCH)/scaling.png

# Memory is measured, and with it time, as a plain `python train_fvlm.py` runs: without the settings at the top.
MEASURE := env -u MALLOC_MMAP_MAX_ -u MALLOC_TRIM_THRESHOLD_ $(BIN)/python -m

bench: $(BIN)/.installed
	@status=0; $(foreach each,$(BENCHMARKS),echo "benchmarks.$(each)"; \
		$(MEASURE) benchmarks.$(each) --json $(BENCH)/$(each).json $(bench_$(each)) $(BENCH_FLAGS) || status=$$?;) \
	$(BIN)/python -m benchmarks.results $(BENCH)/*.json && exit $$status

lint: $(BIN)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
