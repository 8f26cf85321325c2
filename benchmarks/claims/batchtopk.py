"""BatchTopK: how many features die with each start, at which error and L0, and where they are when they do not fire.

    OMP_NUM_THREADS=1 python -m benchmarks.claims.batchtopk

Each finished SAE is one line of benchmarks/results/claims/batchtopk.jsonl at once; the same command goes on where it
stopped. The SAE that is saved has one threshold, which SAELens learns from 0 by a moving average of 1 % a step: after
300 steps it is still too low, more features fire than were asked for, and fewer seem dead. So everything is measured at
this threshold, and at the one with which L0 is k.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.training import sae_trainer
from torch import Tensor

from benchmarks.claims.plan import D_SAE, K
from benchmarks.claims.records import is_among, keep, read, taken
from benchmarks.claims.sections import spread
from benchmarks.claims.sources import MAIN, MAIN_HOOK, MODEL_TITLES, activations, find
from benchmarks.claims.train import processor
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.sparse_adam import SparseAdam
from saelens_asi.sweep import Cell, SweepTraining
from saelens_asi.sweep.results import grouped
from saelens_asi.sweep.run import train_cell

PART = "batchtopk"
TRAINED_ON = 300_000
# Of the main source's training activations, from documents behind all that is trained on here.
HELD_OUT = slice(310_000, 370_000)
_BATCH = 1_000
# A feature is on the edge where its best score on the held-out tokens is at most this share below the threshold.
EDGE = 0.2
# A feature is rare that fires on less than so many of the tokens.
RARE = 1e-4

TEXT = """
The attention output of each main source as far as it is trained, steps of 1,024 activations, d_init 0.25, learning rate
0.002 unless a name says otherwise; 60,000 tokens of other documents. *At k*: at the threshold with which L0 is k.
The saved SAE's own is a moving average that SAELens starts at 0: after n steps it is too low by a share of 0.99^n,
more features fire, and fewer seem dead. *Rare* features fire on under one token in 10,000; *silent* ones on none of
the last 40 % of training; *at the edge* are those that do not fire at k, and whose best score comes within a fifth of
the threshold.
"""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One SAE to train.

    Attributes:
        contender: name in ``CONTENDERS``.
        model: as ``load_model`` names it; of its main hook.
        cell: settings of the SAE.
        bias_correction: of SparseAdam.
        steps: of 1,024 tokens.
        rise: of biases in silence, as a share of the threshold; None for none.
    """

    contender: str
    model: str
    cell: Cell
    bias_correction: str = "global"
    steps: int = 292
    rise: float | None = None

    @property
    def training(self) -> SweepTraining:
        return SweepTraining(training_tokens=self.steps * 1024, batch_size=1024)

    def key(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name != "cell"}
        return {**own, **self.cell.to_dict()}

    def prepare(self, trainer: SAETrainer) -> None:
        if isinstance(trainer.optimizer, SparseAdam):
            for group in trainer.optimizer.param_groups:
                group["bias_correction"] = self.bias_correction
        if self.rise is not None:
            share = self.rise
            trainer.optimizer.register_step_post_hook(lambda *_: raise_silent_(trainer, share, self.steps))


# Of biases that rise: how many steps of silence it takes, how often they do, and in which share of a run.
SILENT_STEPS, RISEN_EVERY, RISEN_UNTIL = 10, 5, 0.9


@torch.no_grad()
def raise_silent_(trainer: SAETrainer, share: float, steps: int) -> None:
    """Raise the biases of features that have been silent by ``share`` of the threshold.

    As routers of experts are balanced without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664): the bias of what
    is never chosen rises until it is.
    """
    done = trainer.n_training_steps + 1
    if done % RISEN_EVERY == 0 and done <= RISEN_UNTIL * steps:
        silent = trainer.n_forward_passes_since_fired >= SILENT_STEPS
        trainer.sae.b_enc += silent * share * trainer.sae.topk_threshold


# What is tried against the deaths, and the two baselines. A quarter of d is the subspace unless a name says otherwise.
_START = {"architecture": "batchtopk", "d_init": 0.25, "lr": 0.002, "k": K, "silent_moments": "keep"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "BatchTopK": _START,
    "BatchTopK, revive": {**_START, "revive": "auto"},
    "BatchTopK, bias correction by row": {**_START, "bias_correction": "per_row"},
    "BatchTopK, moments that decay": {**_START, "silent_moments": "decay"},
    "BatchTopK, moments that decay, lr 0.001": {**_START, "silent_moments": "decay", "lr": 0.001},
    "BatchTopK, moments that decay, biases rise by 0.02": {**_START, "silent_moments": "decay", "rise": 0.02},
    "BatchTopK, lr 0.001": {**_START, "lr": 0.001},
    "BatchTopK, lr 0.0005": {**_START, "lr": 0.0005},
    "BatchTopK, all of d": {**_START, "d_init": None, "subspace": "full"},
    "TopK": {**_START, "architecture": "topk"},
    "BatchTopK, SAELens's own start and auxiliary loss": {
        "architecture": "batchtopk", "initializer": "default", "optimizer": "adam", "aux_loss_coefficient": 1.0,
        "lr": 0.002, "k": K,
    },
}  # fmt: skip


# Features of a BatchTopK die slowly: what a start, and biases that rise, do in longer runs, moments decaying.
LONGER = {"smollm2": 976, "gemma3-270m": 488}
_LONG = {**_START, "silent_moments": "decay", "lr": 0.001}
CONTENDERS_OF_LONGER: dict[str, dict[str, Any]] = {
    "BatchTopK, d_init 0.125": {**_LONG, "d_init": 0.125},
    "BatchTopK": _LONG,
    "BatchTopK, d_init 0.375": {**_LONG, "d_init": 0.375},
    "BatchTopK, all of d": {**_LONG, "d_init": None, "subspace": "full"},
    "BatchTopK, biases rise by 0.02": {**_LONG, "rise": 0.02},
    "BatchTopK, all of d, biases rise by 0.02": {**_LONG, "d_init": None, "subspace": "full", "rise": 0.02},
    "BatchTopK, norm 0.8": {**_LONG, "norm": 0.8},
    "TopK": {**_LONG, "architecture": "topk"},
    "BatchTopK, d_init 0.125, lr 0.002": {**_LONG, "d_init": 0.125, "lr": 0.002},
    "BatchTopK, lr 0.002": {**_LONG, "lr": 0.002},
    "BatchTopK, biases rise by 0.02, lr 0.002": {**_LONG, "rise": 0.02, "lr": 0.002},
}  # fmt: skip


def items() -> Iterator[Item]:
    """All that is trained, what matters most first."""
    for name in CONTENDERS:
        yield _item(name, "smollm2")
    for name in ("BatchTopK", "BatchTopK, revive", "TopK"):
        yield _item(name, "gemma3-270m")
    for seed in (1, 2):
        for name in ("BatchTopK", "BatchTopK, revive"):
            yield _item(name, "smollm2", seed=seed)
    for name in ("BatchTopK", "BatchTopK, revive"):
        yield _item(name, "smollm2", d_sae=2 * D_SAE)
    for model, steps in LONGER.items():
        for name, settings in CONTENDERS_OF_LONGER.items():
            yield _item(name, model, {**settings, "steps": steps})


def _item(contender: str, model: str, of: Mapping[str, Any] | None = None, **changes: Any) -> Item:
    settings = {"d_sae": D_SAE, **(of or CONTENDERS[contender]), **changes}
    own = {name: settings.pop(name) for name in ("bias_correction", "rise", "steps") if name in settings}
    return Item(contender=contender, model=model, cell=Cell(**settings), **own)


def data(item: Item) -> tuple[Tensor, Tensor]:
    """Activations to train on and, of other documents, to measure on."""
    hook, n_tokens = MAIN_HOOK[item.model], item.training.training_tokens
    source = MAIN if item.model == MAIN.model else find(item.model, MAIN.text, hook, n_tokens)
    training, held_out = activations(source, hook)
    if item.model == MAIN.model and n_tokens <= TRAINED_ON:
        held_out = training[HELD_OUT]
    n_held_out = HELD_OUT.stop - HELD_OUT.start
    return training[: max(TRAINED_ON, n_tokens)], held_out[:n_held_out].float()


@torch.no_grad()
def scores(sae: TrainingSAE, x: Tensor) -> Tensor:
    """(n, d_sae) what a batch selects by: pre-activations times the norms of the decoder rows."""
    return ((sae.process_sae_in(x) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)).relu_()


@torch.no_grad()
def threshold_of(sae: TrainingSAE, x: Tensor, k: float) -> float:
    """The score above which k features a token lie, over every eighth token."""
    some = x[::8]
    # Of one token more than sixteen times its share are not counted: the whole matrix would be too large to sort.
    most = min(16 * K, len(sae.W_dec))
    best = [scores(sae, part).topk(most, dim=1).values.flatten() for part in some.split(_BATCH)]
    return float(torch.cat(best).topk(int(k * len(some))).values[-1])


@torch.no_grad()
def measured(sae: TrainingSAE, x: Tensor) -> dict[str, float]:
    """Error, dead features and L0 at each threshold, and how near to it the best scores of features come."""
    own = getattr(sae, "topk_threshold", None)
    at_k = threshold_of(sae, x, sae.cfg.k)
    tallies = {"": _Tally(sae, None if own is None else float(own)), "_at_k": _Tally(sae, at_k)}
    best = torch.zeros(len(sae.W_dec))
    for part in x.split(_BATCH):
        of_part = scores(sae, part)
        best = torch.maximum(best, of_part.max(dim=0).values)
        for name, tally in tallies.items():
            if own is not None or not name:
                tally.add(part, of_part)
    variance = float((x - x.mean(dim=0)).square().sum())
    found = {
        key: value for name, tally in tallies.items() for key, value in tally.found(len(x), variance, name).items()
    }
    edge = (best <= at_k) & (best > (1 - EDGE) * at_k)
    return {**found, "edge_fraction": float(edge.double().mean())}


class _Tally:
    """Sums over tokens of what fires above a threshold, or by the SAE's own selection where there is none."""

    def __init__(self, sae: TrainingSAE, threshold: float | None) -> None:
        self._sae, self._threshold = sae, threshold
        self._error, self._firings = 0.0, torch.zeros(len(sae.W_dec))

    def add(self, x: Tensor, scores_of_x: Tensor) -> None:
        sae, threshold = self._sae, self._threshold
        acts = sae.activation_fn(scores_of_x) if threshold is None else scores_of_x * (scores_of_x > threshold)
        left = x - (acts / sae.W_dec.norm(dim=1)).to_sparse() @ sae.W_dec - sae.b_dec
        self._error += float(left.square().sum())
        self._firings += (acts > 0).sum(dim=0)

    def found(self, n_tokens: int, variance: float, end: str) -> dict[str, float]:
        """By name with ``end`` behind; nothing where there were no tokens."""
        firings, values = self._firings, {}
        if firings.any():
            values = {
                "nmse": self._error / variance,
                "dead_fraction": float((firings == 0).double().mean()),
                "rare_fraction": float((firings < RARE * n_tokens).double().mean()),
                "l0": float(firings.sum()) / n_tokens,
                "half_share": _share_of_half(firings),
                **({} if self._threshold is None else {"threshold": self._threshold}),
            }
        return {f"{name}{end}": value for name, value in values.items()}


def _share_of_half(firings: Tensor) -> float:
    """The share of the features, the most frequent ones, that take half of all firings."""
    taken_by = firings.sort(descending=True).values.double().cumsum(dim=0)
    return float((taken_by < taken_by[-1] / 2).double().mean())


def section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the page, Markdown; none without results."""
    where = itemgetter("model", "steps", "d_sae")
    groups = grouped(sorted(rows, key=where), lambda row: (*where(row), row["contender"]))
    table = [
        (MODEL_TITLES[model], f"{steps:,}", f"{d_sae:,}", name, *_cells(own))
        for (model, steps, d_sae, name), own in groups.items()
    ]
    header = ["model", "steps", "features", "trained", "seeds", "NMSE", "L0", "dead", "NMSE at k", "dead at k"]
    header += ["at the edge", "rare at k", "silent"]
    end = markdown_table(header, table, align="lrrlrrrrrrrrr")
    return ["## BatchTopK", "", TEXT.strip(), "", end, ""] if rows else []


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    def of(name: str, form: str) -> str:
        return spread([row.get(f"{name}_at_k", row[name]) for row in rows], form)

    return (
        str(len(rows)),
        spread([row["nmse"] for row in rows], "{:.4f}"),
        f"{sum(row['l0'] for row in rows) / len(rows):.1f}",
        spread([row["dead_fraction"] for row in rows], "{:.1%}"),
        of("nmse", "{:.4f}"),
        of("dead_fraction", "{:.1%}"),
        spread([row["edge_fraction"] for row in rows], "{:.1%}"),
        of("rare_fraction", "{:.1%}"),
        spread([row["silent_in_training"] for row in rows], "{:.1%}"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    sae_trainer.Adam = functools.partial(torch.optim.Adam, fused=True)
    for item in items():
        with taken(item.key()) as mine:
            if not mine or is_among(read(PART), item.key()):
                continue
            training, held_out = data(item)
            trainer, record = train_cell(item.cell, item.training, training, prepare=item.prepare)
            last = round(0.4 * item.steps)
            silent = float((trainer.n_forward_passes_since_fired >= last).double().mean())
            found = {**measured(trainer.sae, held_out), "silent_in_training": silent, "n_tokens": len(held_out)}
            keep(PART, {**item.key(), **found, **record, "processor": processor()})
            print(item.contender, item.model, item.cell.d_sae, item.cell.seed, found, flush=True)


if __name__ == "__main__":
    main()
