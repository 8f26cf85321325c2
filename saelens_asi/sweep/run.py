"""A sweep: cells of a grid, one after the other, each kept when it is done; table and figures from what is there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi import plots
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum
from saelens_asi.sweep.figures import sweep_figures
from saelens_asi.sweep.grid import TITLES, Cell
from saelens_asi.sweep.store import Row, SweepStore, read_sweep
from saelens_asi.sweep.training import SweepTraining, run_cell

logger = logging.getLogger(__name__)

_COLUMNS = ("hook_name", "architecture", "method", "d_sae", "k", "subspace", "norm", "center", "d_init", "optimizer",
            "aux_loss_coefficient", "lr")  # fmt: skip


def run_sweep(
    cells: Sequence[Cell],
    training: SweepTraining,
    activations: Mapping[str, tuple[Tensor, Tensor]],
    out: str | Path,
    *,
    source: Mapping[str, Any] | None = None,
    save_saes: bool = False,
) -> list[Row]:
    """Train and evaluate each cell on each hook, where ``out`` does not hold it yet; returns the rows asked for.

    Each finished cell is a line of ``out/cells.jsonl`` at once; a sweep that is interrupted, or asked for more cells,
    goes on from there. A cell that fails is named, and the others go on.

    Args:
        cells: of ``grid``.
        training: what all cells share.
        activations: from hook names to (n, d_in) activations to train on, and to evaluate on.
        out: folder.
        source: what the activations come from (model, dataset), kept beside the results.
        save_saes: keep each SAE as a SAELens folder in ``out/saes``; one that is not there is trained again.

    Raises:
        ValueError: for a folder whose cells were made with other settings; after all cells, where some failed.
    """
    store = SweepStore(out, {"training": training.to_dict(), **(source or {})})
    rows, failures = [], []
    with tqdm(total=len(activations) * len(cells), desc="Sweep", unit="cell") as bar:
        for hook_name, (train, held_out) in activations.items():
            spectrum: dict[str, float] = {}
            for cell in cells:
                row, folder = store.find(cell, hook_name), sae_folder(out, cell, hook_name)
                if row is None or (save_saes and not folder.exists()):
                    spectrum = spectrum or _rank(held_out)
                    try:
                        sae, results = run_cell(cell, training, train, held_out)
                    except (ValueError, RuntimeError) as error:
                        failures.append(f"{describe(cell)}: {error}")
                        logger.error("this cell failed, the sweep goes on: %s", failures[-1])
                        continue
                    if save_saes:
                        sae.cfg.metadata.hook_name = hook_name
                        sae.save_inference_model(str(folder))
                    row = row or store.add(cell, {"hook_name": hook_name, **spectrum, **results})
                    tqdm.write(_line(cell, row))
                rows.append(row)
                bar.update()
    if failures:
        raise ValueError("\n".join([f"{len(failures)} cells failed, the others are kept:", *failures]))
    return rows


def sae_folder(out: str | Path, cell: Cell, hook_name: str) -> Path:
    """Where ``save_saes`` keeps the SAE of a cell."""
    return Path(out) / "saes" / hook_name / describe(cell).replace(" ", "_")


def _rank(held_out: Tensor) -> dict[str, float]:
    spectrum = Spectrum.from_moments(RunningMoments.zeros(held_out.shape[1]).update_(held_out))
    return {"d_in": spectrum.d, "effective_rank": spectrum.effective_rank}


def _line(cell: Cell, row: Row) -> str:
    measured = f"dead {row['dead_fraction']:.2%}, NMSE {row['nmse']:.4f}, {row['seconds']} s"
    return f"{row['hook_name']} {describe(cell)}: {measured}"


def describe(cell: Cell) -> str:
    """The settings in which a cell differs from the default one."""
    default, own = Cell().to_dict(), cell.to_dict()
    changed = [f"{name}={value}" for name, value in own.items() if value != default[name] and value is not None]
    return " ".join(changed) or "defaults"


def sweep_table(rows: Iterable[Row]) -> str:
    """A Markdown table: cells that differ in the seed alone are one line, with mean and range."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _COLUMNS), []).append(row)
    constant = [i for i in range(len(_COLUMNS)) if len({key[i] for key in groups}) == 1 and len(groups) > 1]
    shown = [i for i in range(len(_COLUMNS)) if i not in constant]
    names = [_COLUMNS[i] for i in shown]
    measures = ("normalized MSE", "dead", "L0", "seeds", "s", "CPU s")
    lines = [
        ", ".join(f"{_COLUMNS[i]} = {_plain(next(iter(groups))[i])}" for i in constant),
        "",
        f"| {' | '.join((*names, *measures))} |",
        "|" + "---|" * len(names) + "---:|" * len(measures),
    ]
    for key, group in groups.items():
        values = [_plain(key[i]) for i in shown]
        values += [_spread(group, "nmse", "{:.4f}"), _spread(group, "dead_fraction", "{:.2%}")]
        values += [_spread(group, "l0", "{:.1f}"), str(len(group))]
        values += [_spread(group, "seconds", "{:.0f}"), _spread(group, "cpu_seconds", "{:.0f}")]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines if constant else lines[2:])


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return TITLES.get(value, value)
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _spread(rows: Sequence[Row], name: str, form: str) -> str:
    values = [row[name] for row in rows]
    mean = form.format(sum(values) / len(values))
    low, high = form.format(min(values)), form.format(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def write_report(out: str | Path) -> list[Path]:
    """Table and figures of all finished cells in ``out``; returns what was written."""
    out = Path(out)
    rows = read_sweep(out)
    if not rows:
        return []
    figures = [plots.save(figure, out / name) for name, figure in sweep_figures(rows).items()]
    images = "".join(f"\n![{path.stem}]({path.name})\n" for path in figures)
    table = out / "results.md"
    table.write_text(f"{sweep_table(rows)}\n{images}")
    return [out / "cells.jsonl", table, *figures]
