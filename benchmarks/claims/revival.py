"""What brings dead features back in training: nothing, the auxiliary loss, resampling, ``revive="auto"``.

    OMP_NUM_THREADS=1 python -m benchmarks.claims.revival          # go on; in as many shells as there are cores
    python -m benchmarks.claims.revival --table

From three starts: SAELens's own, the paper's, and that of the flag. All with SparseAdam, the same batches and
schedule. Each finished SAE is one line of benchmarks/results/claims/revival.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from torch import Tensor

from benchmarks.claims.features import nearest_others
from benchmarks.claims.of_revival import PART, table
from benchmarks.claims.records import is_among, keep, read, taken
from benchmarks.claims.rival_trainers import Resampling, Run, train_with
from benchmarks.claims.sources import BY_HOOK, MAIN, MAIN_HOOK, Source
from benchmarks.claims.train import on_device, processor
from saelens_asi.evaluation.run import evaluate
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.planning.recipe import learning_rate
from saelens_asi.sweep import Cell, SweepTraining
from saelens_asi.sweep.run import MEASURED, measured, silent_features, train_cell

STARTS: dict[str, dict[str, Any]] = {
    "SAELens's own": {"initializer": "default"},
    "the paper's": {"center": "zeros", "d_init": 0.1875},
    "the flag's": {},
}
# The auxiliary loss has the weight of Gao et al. and, in tokens, the window that did best in the pilot.
AUX_WINDOW = 102_400
CURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "auxiliary loss": {"aux_loss_coefficient": 1 / 32},
    "resampling": {},
    "revive": {"revive": "auto"},
}
# Models, architectures and tokens, of which each is trained from all starts with all cures.
SETS = (
    ("smollm2", "topk", 800_000),
    ("gemma3-270m", "topk", 300_000),
    ("smollm2", "batchtopk", 400_000),
    ("gemma3-270m", "batchtopk", 300_000),
)
# Decoder rows with a cosine above this are duplicates.
DUPLICATE = 0.9
# SAEs with so many features are measured on fewer held-out tokens.
MANY, FEWER = 131_072, 40_000
# So many tokens after a revival one looks whether the feature is alive.
LATER = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One SAE.

    Attributes:
        start: in ``STARTS``.
        cure: in ``CURES``.
        model: as ``load_model`` names it.
        cell: settings.
        tokens: to train on.
    """

    start: str
    cure: str
    model: str
    cell: Cell
    tokens: int

    def key(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name != "cell"}
        return {"part": PART, **own, **self.cell.to_dict()}

    @property
    def source(self) -> Source:
        return MAIN if self.model == "smollm2" else next(one for one in BY_HOOK if one.model == self.model)


def trials() -> Iterator[Trial]:
    for d_sae in (8192, 32_768, MANY):
        for model, architecture, tokens in SETS:
            for start, cure in itertools.product(STARTS, CURES):
                settings = {"architecture": architecture, "d_sae": d_sae, "lr": learning_rate(d_sae)}
                yield _trial(start, cure, model, tokens, **settings)
    for seed in (1, 2):
        # What starts anew is drawn with a seed of its own, and ends as the same SAE each time.
        for cure in ("nothing", "revive"):
            yield _trial("the flag's", cure, "smollm2", 800_000, seed=seed)
    for start in ("SAELens's own", "the paper's"):
        for cure in ("nothing", "revive"):
            yield _trial(start, cure, "smollm2", 2_000_000)
    # As a run of today has it: moments that decay.
    for model, architecture, tokens in (*SETS, ("smollm2", "topk", 2_000_000)):
        for cure in ("revive", "nothing"):
            settings = {"architecture": architecture, "silent_moments": "decay"}
            yield _trial("SAELens's own", cure, model, tokens, **settings)
    for d_sae, sets in ((32_768, SETS), (MANY, SETS[:2])):
        for model, architecture, tokens in sets:
            for start, cure in (("SAELens's own", "revive"), ("the flag's", "nothing")):
                settings = {"architecture": architecture, "d_sae": d_sae, "lr": learning_rate(d_sae)}
                yield _trial(start, cure, model, tokens, silent_moments="decay", **settings)
    # Where features die in mid-run even from our start: a long run, at the default rate and at twice that.
    for lr in (0.001, 0.002):
        for cure in ("nothing", "revive"):
            for silent_moments in ("keep", "decay"):
                yield _trial("the flag's", cure, "smollm2", 2_000_000, lr=lr, silent_moments=silent_moments)


def _trial(start: str, cure: str, model: str, tokens: int, **settings: Any) -> Trial:
    cell = Cell(**{"d_sae": 8192, "k": 32, "silent_moments": "keep", **STARTS[start], **CURES[cure], **settings})
    return Trial(start=start, cure=cure, model=model, cell=cell, tokens=tokens)


def train(trial: Trial, device: str = "cpu") -> dict[str, Any]:
    """Train and measure one SAE."""
    training_set, held_out = on_device(trial.source, MAIN_HOOK[trial.model], device)
    training = SweepTraining(training_tokens=trial.tokens, dead_after_tokens=AUX_WINDOW, device=device)
    trainer: SAETrainer | None = None
    if trial.cure == "resampling":
        sae, record = train_with(Resampling, Run(trial.cell, training, training_set, 0.2), None)
    else:
        trainer, record = train_cell(trial.cell, training, training_set)
        sae = trainer.sae
    n_held_out = len(held_out) if trial.cell.d_sae < MANY else FEWER
    found = evaluate(sae, activations=held_out[:n_held_out].float(), ranks=False, progress=False)
    # Resampling hands on the SAE alone, which does not say when its features fired last.
    own = {name: getattr(found, name) for name in MEASURED} if trainer is None else measured(found, trainer, training)
    if trainer is not None and trial.cure == "revive":
        own |= lived_on(trainer.revival.state()["born"], ~silent_features(found, trainer, training), training)
    metadata = sae.cfg.metadata
    of_revival = {
        "n_revived": metadata.get("n_revived_features"),
        "started_anew_after_steps": (metadata.get(METADATA_KEY) or {}).get("started_anew_after_steps"),
    }
    place = {"text": trial.source.text, "hook": MAIN_HOOK[trial.model], "d_in": sae.cfg.d_in}
    return {**place, **own, **record, **of_revival, **duplicates(sae, found.firing_counts > 0)}


def lived_on(born: Tensor, alive: Tensor, training: SweepTraining) -> dict[str, float]:
    """How many features were revived long before the end, and the share of them that are alive there.

    Args:
        born: (d_sae,) the step after which each was revived last, or 0.
        alive: (d_sae,) flags.
        training: of the run.
    """
    long_ago = (born > 0) & ((training.steps - born) * training.batch_size >= LATER)
    n = int(long_ago.sum())
    return {"n_revived_long_ago": n, **({"lived_on": float(alive[long_ago.cpu()].double().mean())} if n else {})}


@torch.no_grad()
def duplicates(sae: TrainingSAE, fires: Tensor) -> dict[str, float]:
    """Of the features that fire, (d_sae,), how many have a decoder row much like another's."""
    rows = sae.W_dec.detach()[fires].float()
    if len(rows) < 2:
        return {"duplicate_fraction": 0.0, "median_largest_cosine": 0.0}
    largest = nearest_others(rows)
    return {
        "duplicate_fraction": float((largest > DUPLICATE).double().mean()),
        "median_largest_cosine": float(largest.median()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what is trained, and train nothing")
    parser.add_argument("--list", action="store_true", help="name what is missing, and train nothing")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.table:
        print(table(read(PART)))
        return
    torch.set_num_threads(1)
    for trial in trials():
        with taken(trial.key()) as mine:
            if not mine or is_among(read(PART), trial.key()):
                continue
            print(trial, flush=True)
            if args.list:
                continue
            row = {**trial.key(), **train(trial, args.device), "processor": processor(args.device)}
            keep(PART, row)
            print(f"    NMSE {row['nmse']:.4f}, dead {row['dead_fraction']:.2%}, {row['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
