"""What a sweep trains: cells, the methods that they belong to, grids of them, and the file that keeps them."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, cast

from torch import Tensor

from saelens_asi.activations.fingerprint import check_fingerprints, data_fingerprint, sealed, unsealed
from saelens_asi.initialization import ActiveSubspaceInit
from saelens_asi.resume import differences, write_json, written_whole

logger = logging.getLogger(__name__)

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


# Settings that a row names where they are none of these: rows from before they were settings have none.
LEFT_OUT: dict[str, tuple[str | None, ...]] = {"revive": ("off",), "silent_moments": ("keep", None)}


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
        revive: ``"auto"``: features that die start again; ``"off"``.
        silent_moments: ``"decay"`` or ``"keep"``; Adam has none.
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
    revive: str = "off"
    silent_moments: str | None = "decay"

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
        if self.revive not in ("off", "auto"):
            raise ValueError(f"revive={self.revive!r} must be 'off' or 'auto'")
        if self.optimizer != "sparse_adam":
            object.__setattr__(self, "silent_moments", None)
        elif self.silent_moments not in ("keep", "decay"):
            raise ValueError(f"silent_moments={self.silent_moments!r} must be 'keep' or 'decay'")
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
        """Name in ``METHODS``, whatever sizes, rate, moments and the weight of the auxiliary loss; else ``"other"``."""
        for name, changes in METHODS.items():
            stock = Cell(**{**changes, "k": self.k, "d_sae": self.d_sae})
            if stock._method_settings() == self._method_settings():
                return name
        return "other"

    def _method_settings(self) -> tuple[object, ...]:
        initialization = (self.initializer, *(getattr(self, name) for name in _INITIALIZATION))
        return *initialization, self.optimizer, self.aux_loss_coefficient > 0, self.revive

    def to_dict(self) -> dict[str, float | str | None]:
        """Plain values, for JSON; those of ``LEFT_OUT`` where they are others."""
        values = asdict(self)
        return {name: value for name, value in values.items() if value not in LEFT_OUT.get(name, ())}


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell of a finished row; what the row leaves out is as ``LEFT_OUT`` has it."""
    left_out = {name: values[0] for name, values in LEFT_OUT.items()}
    return Cell(**{**left_out, **{one.name: row[one.name] for one in fields(Cell) if one.name in row}})


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
    """A finished cell: settings, those of ``LEFT_OUT`` where they are others; what was measured; and of the start."""

    revive: str
    silent_moments: str
    d_init_used: int
    initial_norm: float
    initial_nmse: float


# Of ``sweep.json``: what the cells of each hook were trained and evaluated on.
_MADE_OF = "fingerprints"

# What a line has at least.
_NEEDED = {"hook_name", *Cell().to_dict()} - LEFT_OUT.keys()


class SweepStore:
    """The finished cells in ``folder/cells.jsonl``, and what all of them share: settings and activations.

    Raises:
        ValueError: for a folder whose cells were made with other settings, or a file of it that is damaged.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shared_path = self.folder / "sweep.json"
        saved = _read_shared(self._shared_path)
        self._fingerprints: dict[str, dict[str, str | None]] | None = {} if saved is None else saved.pop(_MADE_OF, None)
        changed = "" if saved is None else differences(saved, settings)
        if changed:
            raise ValueError(f"{self.folder} holds a sweep with other settings ({changed}): use another folder")
        self.path = self.folder / "cells.jsonl"
        self.rows, whole = _read_lines(self.path)
        self._settings = dict(settings)
        if saved is None:
            self._write_shared()
        if not whole:
            self._drop_torn_line()

    def check(self, activations: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Compare activations to train and to evaluate on, by hook, with those of earlier cells, and note them.

        A folder of an earlier version, which did not note them, goes on with a warning.

        Raises:
            ValueError: for other activations, with both sides.
        """
        known = dict(self._fingerprints or {})
        for hook_name, (training, held_out) in activations.items():
            now = {"training": data_fingerprint(training), "held_out": data_fingerprint(held_out)}
            # A folder that notes them lacks those of a hook that is new to it.
            noted = self._fingerprints is not None or all(row["hook_name"] != hook_name for row in self.rows)
            saved = known.get(hook_name, {} if noted else None)
            where = f"{self.folder}, hook {hook_name}"
            known[hook_name] = check_fingerprints(saved, now, where, "give those activations, or another folder")
        if known != self._fingerprints:
            self._fingerprints = known
            self._write_shared()

    def find(self, cell: Cell, hook_name: str) -> SweepRow | None:
        """The finished row of a cell on a hook."""
        own = {"hook_name": hook_name, **dict.fromkeys(LEFT_OUT), **cell.to_dict()}
        return next((row for row in self.rows if all(row.get(name) == value for name, value in own.items())), None)

    def add(self, cell: Cell, measured: Mapping[str, str | float]) -> SweepRow:
        """Keep a finished cell: its line is on the disk when this returns, or nothing of it is after an error.

        Raises:
            OSError: where it cannot be written, as on a full disk.
        """
        row = cast(SweepRow, {**cell.to_dict(), "method": cell.method, **measured})
        line = json.dumps(sealed(row)).encode() + b"\n"
        # Unbuffered: what a buffer holds would be written after all when the file is closed.
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)
                raise OSError(
                    error.errno, f"{self.path} cannot be written ({error.strerror or error}): what it holds stays"
                ) from error
        self.rows.append(row)
        return row

    def _write_shared(self) -> None:
        made_of = {} if self._fingerprints is None else {_MADE_OF: self._fingerprints}
        write_json(self._shared_path, sealed({**self._settings, **made_of}), indent=1)

    def _drop_torn_line(self) -> None:
        """A line that a crash cut short would run into the next one."""
        lines = self.path.read_bytes().split(b"\n")
        end = lines.pop()
        if _row(end) is not None:  # only its line break is missing
            lines.append(end)
        else:
            logger.warning("%s: its last line was cut short: the cell is trained again", self.path)
        with written_whole(self.path) as unfinished:
            unfinished.write_bytes(b"".join(line + b"\n" for line in lines))


def _read_shared(path: Path) -> dict[str, Any] | None:
    """What ``sweep.json`` holds; None where it is not there."""
    if not path.exists():
        return None
    try:
        shared = unsealed(json.loads(path.read_bytes()))
        made_of = shared.get(_MADE_OF, {})
        if not isinstance(made_of, dict) or not all(isinstance(one, dict) for one in made_of.values()):
            raise ValueError(f"{_MADE_OF} is of another type")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it if this call has the settings and activations of the sweep, or "
            "use another folder"
        ) from None
    return shared


def read_sweep(folder: str | Path) -> list[SweepRow]:
    """The finished cells of a sweep: settings, ``method``, and what was measured. Empty where there are none yet.

    A last line that was cut short, as a crash leaves it, is no finished cell.

    Raises:
        ValueError: for any other line that is damaged, with its number.
    """
    return _read_lines(Path(folder) / "cells.jsonl")[0]


def _read_lines(path: Path) -> tuple[list[SweepRow], bool]:
    """The rows of a file, and whether its last line ends with a line break."""
    if not path.exists():
        return [], True
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not the cells of a sweep: delete it, or use another folder")
    *lines, end = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            raise ValueError(
                f"{path}, line {number} is damaged: delete that line, and the same sweep trains its cell again"
            )
    last = _row(end)
    return rows if last is None else [*rows, last], not end


def _row(line: bytes) -> SweepRow | None:
    """The row that a line holds, with or without a checksum; None for a damaged line."""
    try:
        row = unsealed(json.loads(line))
    except (ValueError, RecursionError):
        return None
    whole = _NEEDED <= row.keys() <= _NEEDED | SweepRow.__annotations__.keys()
    return cast(SweepRow, row) if whole else None
