"""What is trained for the page of claims, in parts; ``train.py`` does it, ``docs`` says it before the results.

Every contender gets the same activations in the same order, batches of 1,024, k = 32, the same schedule, and the same
number of tries for its learning rate (and, of the auxiliary loss, its window) in a pilot at a tenth of the tokens; the
try of the lowest error goes into the comparison. A try that leaves fewer features alive is not held back: its dead
features are reported beside its error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.claims.records import read
from benchmarks.claims.rivals import RIVALS, rival_cell
from benchmarks.claims.sources import BY_HOOK, BY_HOOK_ASIDE, LONGER, MAIN, MAIN_HOOK, Source, find
from saelens_asi.sweep import Cell, SweepTraining

D_SAE, K = 8192, 32
MAIN_TOKENS, PILOT_TOKENS = MAIN.n_training, 200_000


@dataclass(frozen=True, kw_only=True)
class Item:
    """One SAE to train.

    Attributes:
        part: of the plan; each has a file of results.
        contender: name in ``CONTENDERS``, or a rival's in ``rivals.RIVALS``.
        model: as ``load_model`` names it.
        text: as ``load_documents`` names it.
        hook: full name.
        cell: settings of the SAE.
        tokens: to train on.
        batch: tokens in a step.
        window: silent tokens after which a feature counts as dead for the auxiliary loss.
        save: keep the SAE.
    """

    part: str
    contender: str
    model: str
    text: str
    hook: str
    cell: Cell
    tokens: int
    batch: int = 1024
    window: int = 1_024_000
    save: bool = False

    @property
    def training(self) -> SweepTraining:
        return SweepTraining(training_tokens=self.tokens, batch_size=self.batch, dead_after_tokens=self.window)

    @property
    def source(self) -> Source:
        return find(self.model, self.text, self.hook, self.tokens)

    def key(self) -> dict[str, Any]:
        """What tells it from all others, as plain values."""
        own = {name: value for name, value in asdict(self).items() if name not in ("cell", "save")}
        return {**own, **self.cell.to_dict()}


# The factorial: three ways of training x two centres x two sets of directions. SAELens's own settings are norm 0.1,
# a coefficient of 1 and a window of 1,000 steps; the rest has the norm of the lowest initial error.
TRAINED: dict[str, dict[str, Any]] = {
    "TopK": {"optimizer": "adam"},
    "AuxK": {"optimizer": "adam", "aux_loss_coefficient": 1 / 32},
    "SAELens": {"optimizer": "adam", "aux_loss_coefficient": 1.0, "norm": "decoder_init_norm"},
    "SparseAdam": {"optimizer": "sparse_adam"},
}
STARTS: dict[str, dict[str, Any]] = {
    f"{centre}, {directions}": {
        "center": centre,
        "subspace": {"all of d": "full", "active": "active"}[directions],
    }
    for centre in ("zeros", "mean")
    for directions in ("all of d", "active")
}
CONTENDERS: dict[str, dict[str, Any]] = {
    f"{trained}, {start}": {**how, **where} for trained, how in TRAINED.items() for start, where in STARTS.items()
}

# What the flag does by default, from its own start alone.
DECAYING = "SparseAdam (moments decay)"
OURS = f"{DECAYING}, mean, active"
CONTENDERS[OURS] = {**CONTENDERS["SparseAdam, mean, active"], "silent_moments": "decay"}

# What revived features are compared with.
BASELINE = "TopK, zeros, all of d"

RATES = (0.0005, 0.001, 0.002, 0.004)
# As many tries as the others have: the two rates in the middle, with a window of 50 and of 100 steps.
AUXK_TRIES = tuple({"lr": lr, "window": window} for lr in (0.001, 0.002) for window in (51_200, 102_400))


def tries(contender: str) -> list[dict[str, Any]]:
    return list(AUXK_TRIES) if contender.startswith("AuxK") else [{"lr": lr} for lr in RATES]


def _item(part: str, contender: str, model: str, text: str, tokens: int, **changes: Any) -> Item:
    # Moments of silent features stay unless a part says otherwise: the default when most of it was trained.
    settings = {"d_sae": D_SAE, "k": K, "silent_moments": "keep", **CONTENDERS.get(contender, {})}
    own = {name: changes.pop(name) for name in list(changes) if name in Item.__dataclass_fields__}
    cell = Cell(**{**settings, **changes})
    return Item(
        part=part,
        contender=contender,
        model=model,
        text=text,
        cell=rival_cell(contender, cell) if contender in RIVALS else cell,
        tokens=tokens,
        **{"hook": MAIN_HOOK[model], **own},
    )


def pilot() -> Iterator[Item]:
    for contender in CONTENDERS:
        for settings in tries(contender):
            yield _item("pilot", contender, "smollm2", "linux-doc", PILOT_TOKENS, **settings)


def pilot_rivals() -> Iterator[Item]:
    for rival in RIVALS:
        for settings in tries(rival):
            yield _item("pilot_rivals", rival, "smollm2", "linux-doc", PILOT_TOKENS, **settings)


# Dimensions of the subspace that are tried at every hook, as shares of the width; then all of it with the mean as
# centre, and the paper's baseline.
D_INIT_SHARES = (0.0625, 0.125, 0.25, 0.375)
D_INIT_TOKENS = 200_000
# That of the default at 8,192 features, for which `d_init="auto"` asks too.
OWN_SHARE = 0.125


def d_init(sources: Iterable[Source] = BY_HOOK, part: str = "d_init") -> Iterator[Item]:
    for kind in ("hook_attn_out", "hook_z", "hook_mlp_out", "hook_resid_post"):
        for source in sources:
            for hook in source.hooks:
                if hook.endswith(kind):
                    for share in D_INIT_SHARES:
                        yield _item(
                            part, "SparseAdam, mean, active", source.model, source.text, D_INIT_TOKENS,
                            hook=hook, d_init=share,
                        )  # fmt: skip
                    for contender in ("SparseAdam, mean, all of d", "TopK, zeros, all of d"):
                        yield _item(part, contender, source.model, source.text, D_INIT_TOKENS, hook=hook)
                    yield _item(part, OURS, source.model, source.text, D_INIT_TOKENS, hook=hook, d_init=OWN_SHARE)


def d_init_aside() -> Iterator[Item]:
    yield from d_init(BY_HOOK_ASIDE, "d_init_aside")


# Does the dimension depend on how many features there are? At the main hooks, with the rate that suits each size.
D_INIT_SIZES = {2048: 0.001, 32_768: 0.0005, 65_536: 0.0005}


def d_init_sizes() -> Iterator[Item]:
    for d_sae, lr in D_INIT_SIZES.items():
        for source in BY_HOOK:
            for share in D_INIT_SHARES:
                yield _item(
                    "d_init_sizes", "SparseAdam, mean, active", source.model, source.text, D_INIT_TOKENS,
                    hook=MAIN_HOOK[source.model], d_init=share, d_sae=d_sae, lr=lr,
                )  # fmt: skip


# The main comparison: three seeds on the main source; one on the second model, and on the second text.
SEEDS = (0, 1, 2)
ELSEWHERE = (("gemma3-270m", "linux-doc"), ("smollm2", "python"))
ELSEWHERE_TOKENS = 500_000


def chosen(contender: str) -> dict[str, Any] | None:
    """The try of a contender with the lowest error in the pilot; None before all are done."""
    rows = [row for row in read("pilot_rivals" if contender in RIVALS else "pilot") if row["contender"] == contender]
    if len(rows) < len(tries(contender)):
        return None
    best = min(rows, key=lambda row: row["nmse"])
    return {name: best[name] for name in ("lr", "window")}


def factorial() -> Iterator[Item]:
    for seed in SEEDS:
        for contender in CONTENDERS:
            settings = chosen(contender)
            # A second one of the baseline says what another seed alone makes new (worth.py).
            is_kept = seed == 0 or (seed == 1 and contender == BASELINE)
            if settings:
                yield _item(
                    "factorial", contender, "smollm2", "linux-doc", MAIN_TOKENS, seed=seed, save=is_kept, **settings
                )


# What the pilot's short runs choose, 0.002 and more, kills features in longer ones; this rate does so less.
SLOWER = 0.001


def slower() -> Iterator[Item]:
    ours = (OURS, "SparseAdam, mean, active", "SparseAdam, mean, all of d")
    for contender in (*ours, "TopK, mean, active", BASELINE, "authors_sparse_adam"):
        yield _item("slower", contender, "smollm2", "linux-doc", MAIN_TOKENS, lr=SLOWER)


# Twice the tokens, at the pilot's rate and at the lower one: do errors and deaths still move?
TRAINED_LONGER = (OURS, BASELINE, "TopK, mean, active", "AuxK, mean, all of d")


def longer() -> Iterator[Item]:
    for slow in (False, True):
        for contender in TRAINED_LONGER:
            settings = chosen(contender)
            if settings:
                own = {**settings, **({"lr": SLOWER} if slow else {})}
                yield _item("longer", contender, "smollm2", "linux-doc", LONGER.n_training, **own)


# What silence does to the moments of SparseAdam, at rates of which each may suit one of the two: at the main size, with
# more features, on the second model.
MOMENTS = ("keep", "decay")
MOMENTS_AT = (
    ("smollm2", D_SAE, MAIN_TOKENS, (0.0005, 0.001, 0.0014, 0.002), (0,)),
    ("gemma3-270m", D_SAE, 300_000, (0.001, 0.002), (0,)),
    ("smollm2", 32_768, 800_000, (0.0005, 0.001), (0,)),
    ("smollm2", D_SAE, MAIN_TOKENS, (0.001,), (1, 2)),
    ("smollm2", 131_072, 800_000, (0.0005, 0.001), (0,)),
)


def moments() -> Iterator[Item]:
    for model, d_sae, tokens, rates, seeds in MOMENTS_AT:
        for lr, seed, silent_moments in itertools.product(rates, seeds, MOMENTS):
            settings = {"d_sae": d_sae, "lr": lr, "seed": seed, "silent_moments": silent_moments}
            yield _item("moments", "SparseAdam, mean, active", model, "linux-doc", tokens, **settings)


# Differs from ours in the moments of silent rows and in where eps is added, and is compared with it seed by seed.
REPEATED = "authors_sparse_adam"


def rivals() -> Iterator[Item]:
    for rival in RIVALS:
        settings = chosen(rival)
        if settings:
            for seed in SEEDS if rival == REPEATED else SEEDS[:1]:
                yield _item("rivals", rival, "smollm2", "linux-doc", MAIN_TOKENS, seed=seed, save=seed == 0, **settings)


def elsewhere() -> Iterator[Item]:
    for model, text in ELSEWHERE:
        for contender in CONTENDERS:
            settings = chosen(contender)
            if settings:
                yield _item("elsewhere", contender, model, text, ELSEWHERE_TOKENS, **settings)


# What SAEs keep of the predictions of a model, seed by seed (predictions.py): the paper's two baselines, TopK with the
# mean as centre, and ours.
PREDICTING = (BASELINE, "AuxK, zeros, all of d", "TopK, mean, all of d", OURS)
PREDICTING_TOKENS = 500_000


def predictions() -> Iterator[Item]:
    for seed in SEEDS:
        for contender in PREDICTING:
            settings = chosen(contender)
            if settings:
                own = {"seed": seed, "save": True, **settings}
                yield _item("predictions", contender, "smollm2", "linux-doc", PREDICTING_TOKENS, **own)


# Parts whose settings are known when the pilot is done, and how many SAEs they hold.
AFTER_THE_PILOT = {
    "factorial": len(SEEDS) * len(CONTENDERS),
    "elsewhere": len(ELSEWHERE) * len(CONTENDERS),
    "longer": 2 * len(TRAINED_LONGER),
    "rivals": len(RIVALS) + len(SEEDS) - 1,
    "predictions": len(SEEDS) * len(PREDICTING),
}

PARTS = {
    "pilot": pilot,
    "pilot_rivals": pilot_rivals,
    "factorial": factorial,
    "slower": slower,
    "longer": longer,
    "moments": moments,
    "rivals": rivals,
    "elsewhere": elsewhere,
    "predictions": predictions,
    "d_init": d_init,
    "d_init_aside": d_init_aside,
    "d_init_sizes": d_init_sizes,
}


def items(parts: Iterable[str]) -> list[Item]:
    return [item for part in parts for item in PARTS[part]()]
