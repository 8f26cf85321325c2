"""What a sweep trains: cells, the methods that they belong to, grids of them, and the file that keeps them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, cast

from saelens_asi.initialization import ActiveSubspaceInit
from saelens_asi.resume import differences, write_json, written_whole

# Settings of ActiveSubspaceInit that a cell may vary.
_INITIALIZATION = ("subspace", "norm", "center", "d_init")

# Methods by name: changes to the defaults of a cell. "topk" and "auxk" start as the paper's baselines do, with the norm
# of the lowest initial error; "stock" is what SAELens does by itself.
METHODS: dict[str, dict[str, Any]] = {
    "stock": {"initializer": "default", "optimizer": "adam", "aux_loss_coefficient": 1.0},
    "topk": {"subspace": "full", "center": "zeros", "optimizer": "adam"},
    "auxk": {"subspace": "full", "center": "zeros", "optimizer": "adam", "aux_loss_coefficient": 1 / 32},
    "asi_paper": {"d_init": 0.1875, "center": "zeros", "optimizer": "adam"},
    "asi_paper_sparse_adam": {"d_init": 0.1875, "center": "zeros"},
    "asi": {"optimizer": "adam"},
    "asi_sparse_adam": {},
}
METHOD_TITLES = {
    "stock": "SAELens as it is",
    "topk": "TopK",
    "auxk": "AuxK",
    "asi_paper": "ASI (paper)",
    "asi_paper_sparse_adam": "ASI (paper) + SparseAdam",
    "asi": "ASI, mean centre",
    "asi_sparse_adam": "ASI, mean centre + SparseAdam",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One SAE to train; every field can be an axis of a grid. The defaults are those of the flag.

    Attributes:
        architecture: of the TopK family: topk, abstopk, batchtopk or matryoshka_batchtopk.
        d_sae: number of features.
        k: features active on a token.
        initializer: ``"active_subspace"``, or ``"default"`` for SAELens's own; the latter has none of the next four.
        subspace: as in ``ActiveSubspaceInit``, like the next three.
        norm: of the decoder rows.
        center: of the decoder bias.
        d_init: dimension of the subspace.
        optimizer: ``"sparse_adam"`` or ``"adam"``.
        aux_loss_coefficient: weight of SAELens's auxiliary loss on dead features; 0 leaves it out.
        lr: learning rate.
        seed: of the weights. The order of the data is the same for all.
    """

    architecture: str = "topk"
    d_sae: int = 8192
    k: int = 32
    initializer: str = "active_subspace"
    subspace: str | None = "active"
    norm: float | str | None = "least_squares"
    center: str | None = "mean"
    d_init: int | float | str | None = "auto"
    optimizer: str = "sparse_adam"
    aux_loss_coefficient: float = 0.0
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.initializer not in ("default", "active_subspace"):
            raise ValueError(f"initializer={self.initializer!r} must be 'default' or 'active_subspace'")
        if self.optimizer not in ("adam", "sparse_adam"):
            raise ValueError(f"optimizer={self.optimizer!r} must be 'adam' or 'sparse_adam'")
        if self.initializer == "default":
            unused: tuple[str, ...] = _INITIALIZATION
        else:
            unused = ("d_init",) if self.subspace == "full" else ()
        for name in unused:
            object.__setattr__(self, name, None)
        self.initializer_settings()
        if not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k={self.k} must be at least 1 and at most d_sae={self.d_sae}")

    def initializer_settings(self) -> ActiveSubspaceInit | None:
        """For the config's ``initializer``; None for SAELens's own start. Raises ValueError where they clash."""
        if self.initializer == "default":
            return None
        settings = {name: getattr(self, name) for name in _INITIALIZATION if getattr(self, name) is not None}
        return ActiveSubspaceInit(**settings, seed=self.seed)

    @property
    def method(self) -> str:
        """Name in ``METHODS``, whatever the sizes, the rate and the weight of the auxiliary loss; else ``"other"``."""
        for name, changes in METHODS.items():
            stock = Cell(**{**changes, "k": self.k, "d_sae": self.d_sae})
            if stock._method_settings() == self._method_settings():
                return name
        return "other"

    def _method_settings(self) -> tuple[object, ...]:
        initialization = (self.initializer, *(getattr(self, name) for name in _INITIALIZATION))
        return *initialization, self.optimizer, self.aux_loss_coefficient > 0

    def to_dict(self) -> dict[str, float | str | None]:
        return asdict(self)


def grid(axes: Mapping[str, Sequence[Any]], methods: Sequence[str] = ()) -> list[Cell]:
    """Every combination of the values of ``axes``, for each of ``methods``; equal cells once, in the order given.

    What an axis says goes over what the method says.

    Raises:
        ValueError: for an axis or a method that does not exist, or settings that clash.
    """
    names = [field.name for field in fields(Cell)]
    unknown = sorted(set(axes) - set(names))
    if unknown:
        raise ValueError(f"a cell has no setting {unknown}; its settings are {names}")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"method {unknown[0]!r} must be one of {list(METHODS)}")
    empty = [name for name, values in axes.items() if not len(values)]
    if empty:
        raise ValueError(f"the axis {empty[0]!r} has no values: give at least one, or leave it out")
    cells: dict[Cell, None] = {}
    for values in itertools.product(*axes.values()):
        for method in methods or ("asi_sparse_adam",):
            cells[Cell(**{**METHODS[method], **dict(zip(axes, values, strict=True))})] = None
    return list(cells)


class _CellSettings(TypedDict):
    """The fields of a ``Cell``."""

    architecture: str
    d_sae: int
    k: int
    initializer: str
    subspace: str | None
    norm: float | str | None
    center: str | None
    d_init: int | float | str | None
    optimizer: str
    aux_loss_coefficient: float
    lr: float
    seed: int


class _Measures(_CellSettings):
    hook_name: str
    method: str
    d_in: int
    effective_rank: float
    n_tokens: int
    dead_fraction: float
    nmse: float
    l0: float
    silent_fraction: float
    silent_tokens: int
    seconds: float
    cpu_seconds: float


class SweepRow(_Measures, total=False):
    """A finished cell: its settings, and what was measured; the last three where it had an initialization."""

    d_init_used: int
    initial_norm: float
    initial_nmse: float


class SweepStore:
    """The finished cells in ``folder/cells.jsonl``, and the settings that all of them share.

    Raises:
        ValueError: for a folder whose cells were made with other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "sweep.json"
        changed = differences(json.loads(path.read_text()), settings) if path.exists() else ""
        if changed:
            raise ValueError(f"{self.folder} holds a sweep with other settings ({changed}): use another folder")
        write_json(path, dict(settings), indent=1)
        self.path = self.folder / "cells.jsonl"
        self.rows = read_sweep(self.folder)
        self._drop_unfinished_line()

    def find(self, cell: Cell, hook_name: str) -> SweepRow | None:
        """The finished row of a cell on a hook."""
        own = {"hook_name": hook_name, **cell.to_dict()}
        return next((row for row in self.rows if all(row.get(name) == value for name, value in own.items())), None)

    def add(self, cell: Cell, measured: Mapping[str, str | float]) -> SweepRow:
        row = cast(SweepRow, {**cell.to_dict(), "method": cell.method, **measured})
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row

    def _drop_unfinished_line(self) -> None:
        """A line that a crash cut short would run into the next one."""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with written_whole(self.path) as unfinished:
                unfinished.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def read_sweep(folder: str | Path) -> list[SweepRow]:
    """The finished cells of a sweep: settings, ``method``, and what was measured. Empty where there are none yet."""
    path = Path(folder) / "cells.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line, where writing it was interrupted
            continue
    return rows
