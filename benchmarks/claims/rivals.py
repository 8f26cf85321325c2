"""Rivals that papers and users name, trained on the data of a sweep and measured as its cells are.

    sae, seconds = train_rival("k_annealing", Cell(center="zeros"), SweepTraining(), activations)

Every rival sees the batches of ``train_cell`` in its order, in float32. Batch size, warm-up, decay and clipping are
those of a cell too, but for sparsify's, which is free of a schedule. The weights are seeded alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sae_lens import TrainingSAE
from torch import Tensor

from benchmarks.claims.rival_sparsify import train_sparsify
from benchmarks.claims.rival_trainers import (
    Aligned,
    AuthorsSparseAdam,
    KAnnealing,
    Resampling,
    Run,
    Whitening,
    train_with,
)
from saelens_asi.sweep.cells import Cell
from saelens_asi.sweep.run import SweepTraining, Watch

Trained = tuple[TrainingSAE[Any], dict[str, float]]


@dataclass(frozen=True)
class Rival:
    """A way to train an SAE.

    Attributes:
        title: for tables.
        source: paper or repository.
        train: makes and trains it.
        changes: what it sets in a cell; the rest is the cell's: sizes, rate, seed, and the centre unless named here.
        knob: what its setting is, if it has one.
        tries: values of the setting, the default first.
    """

    title: str
    source: str
    train: Callable[[Run, Watch | None], Trained]
    changes: Mapping[str, Any] = field(default_factory=dict)
    knob: str | None = None
    tries: tuple[float, ...] = ()


# The start of TopK as the paper's baselines have it, with the centre of the cell.
_TOPK = {"initializer": "active_subspace", "subspace": "full", "norm": "least_squares", "optimizer": "adam"}
_ASI = {**_TOPK, "subspace": "active"}
_DICTIONARY_LEARNING = "https://github.com/saprmarks/dictionary_learning"
_LLAMASCOPIUM = "https://github.com/OpenMOSS/Language-Model-SAEs"

RIVALS: dict[str, Rival] = {
    "whitening": Rival(
        "whitened activations", "arXiv 2511.13981, in SAELens", partial(train_with, Whitening), changes=_TOPK
    ),
    "whitening_asi": Rival(
        "whitened activations, ASI", "arXiv 2511.13981, in SAELens", partial(train_with, Whitening), changes=_ASI
    ),
    "aligned": Rival(
        "Aligned Training", "arXiv 2605.18629", partial(train_with, Aligned), changes={**_TOPK, "norm": 1.0}
    ),
    "signum_multi_topk": Rival(
        "sparsify: Signum, Multi-TopK", "https://github.com/EleutherAI/sparsify 1.3.3", train_sparsify
    ),
    "k_annealing": Rival(
        "k annealing",
        _DICTIONARY_LEARNING,
        partial(train_with, KAnnealing),
        changes=_TOPK,
        knob="share of the steps in which k falls",
        tries=(0.2, 0.5),
    ),
    "authors_sparse_adam": Rival(
        "authors' SparseAdam, the cell's start",
        _LLAMASCOPIUM,
        partial(train_with, AuthorsSparseAdam),
        changes={"optimizer": "sparse_adam"},
    ),
    "authors_sparse_adam_paper": Rival(
        "authors' SparseAdam, the paper's ASI",
        _LLAMASCOPIUM,
        partial(train_with, AuthorsSparseAdam),
        changes={**_ASI, "optimizer": "sparse_adam", "d_init": 0.1875, "center": "zeros"},
    ),
    "resampling": Rival(
        "resampling",
        "Bricken et al. 2023, Towards Monosemanticity",
        partial(train_with, Resampling),
        changes=_TOPK,
        knob="norm of a new encoder row, in mean norms of the live ones",
        tries=(0.2, 0.5),
    ),
}


def rival_cell(name: str, cell: Cell) -> Cell:
    """The cell with what the rival sets in it. Raises ValueError for a rival that does not exist."""
    if name not in RIVALS:
        raise ValueError(f"rival {name!r} must be one of {list(RIVALS)}")
    return replace(cell, **RIVALS[name].changes)


def train_rival(
    name: str,
    cell: Cell,
    training: SweepTraining,
    activations: Tensor,
    watch: Watch | None = None,
    *,
    setting: float | None = None,
) -> Trained:
    """The counterpart of ``train_cell``: the SAE of raw activations, with its seconds and what initialized it.

    Args:
        name: of ``RIVALS``.
        cell: whose sizes, rate, seed and, where the rival leaves them, other settings it takes.
        training: what all cells share.
        activations: (n, d_in), to train on.
        watch: called between steps with the tokens so far and an SAE of raw activations; its time is not counted.
        setting: of the rival's knob; None for its default.

    Raises:
        ValueError: for a rival that does not exist, or a setting for one that has no knob.
        ImportError: for sparsify's where it is not installed, with the command that installs it.
    """
    own, rival = rival_cell(name, cell), RIVALS[name]
    if setting is not None and rival.knob is None:
        raise ValueError(f"rival {name!r} has no setting: leave setting={setting} out")
    default = rival.tries[0] if rival.tries else 0.0
    return rival.train(Run(own, training, activations, default if setting is None else setting), watch)
