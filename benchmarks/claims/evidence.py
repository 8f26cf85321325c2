"""The results that the claims rest on: files of benchmarks/results as tables, and what is said of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from saelens_asi.sweep import Cell, read_sweep
from saelens_asi.sweep.results import best_rates

RESULTS = Path(__file__).parent.parent / "results"

ALIVE = 0.05

HOLDS, PARTLY, FAILS = "holds", "partly", "does not hold here"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One line of the page.

    Attributes:
        claim: what is said.
        paper: the paper's number, or whose claim it is.
        ours: what was measured.
        verdict: holds, partly, or does not hold here.
        seeds: repetitions behind the number.
        command: what measures it again.
    """

    claim: str
    paper: str
    ours: str
    verdict: str
    seeds: str
    command: str


class Evidence:
    """The result files, as tables."""

    def __init__(self, results: Path = RESULTS) -> None:
        with (results / "spectra.csv").open() as file:
            self.spectra = [
                {name: float(value) if name not in ("hook", "kind") else value for name, value in row.items() if value}
                for row in csv.DictReader(file)
            ]
        self.losses = json.loads((results / "spectra_losses.json").read_text())
        self.lorsa = _lines(results / "lorsa.jsonl")
        self.factors = _lines(results / "factors.jsonl")
        self.bias = _lines(results / "bias.jsonl")
        self.sweeps = {path.parent.name: read_sweep(path.parent) for path in results.glob("claims/*/cells.jsonl")}
        # What all cells of a sweep share, by sweep.
        self.shared = {path.parent.name: json.loads(path.read_text()) for path in results.glob("claims/*/sweep.json")}
        # The frontier's middle was trained for the sizes.
        methods = {row["method"] for row in self.sweeps["frontier"]}
        middle = [row for row in self.sweeps["d_sae"] if row["d_sae"] == 8192]
        self.sweeps["frontier"] += [row for row in middle if row["method"] in methods]
        self.steps = json.loads((results / "claims" / "steps.json").read_text())
        self.evaluations = json.loads((results / "claims" / "evaluations.json").read_text())

    def cells(self, sweep: str, **settings: Any) -> list[Row]:
        """Rows of a sweep with these settings, each at its chosen learning rate."""
        rows = [row for row in self.sweeps[sweep] if all(row[name] == value for name, value in settings.items())]
        if not rows:
            raise ValueError(f"results/claims/{sweep} holds no cell with {settings}: run make claims")
        return chosen_rates(rows)

    def spectrum_mean(self, kind: str, column: str) -> float:
        values = [row[column] for row in self.spectra if row["kind"] == kind]
        return sum(values) / len(values)


def chosen_rates(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ in rate and seed alone, those with the rate of the lowest error.

    Of ASI's, rates that leave under 5 % of the features dead go first, if there are any: a high rate can buy a lower
    error with the lives of features. The baselines, which have few features to lose, are not held back.
    """
    rows = list(rows)
    alive = best_rates(row for row in rows if row["method"].startswith("asi") and row["dead_fraction"] < ALIVE)
    served = {_but_for_the_rate(row) for row in alive}
    return alive + best_rates(row for row in rows if _but_for_the_rate(row) not in served)


def _but_for_the_rate(row: Row) -> tuple[Any, ...]:
    return row["hook_name"], *(row[field.name] for field in fields(Cell) if field.name not in ("lr", "seed"))


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mean(rows: Iterable[Row], name: str) -> float:
    values = [row[name] for row in rows]
    return sum(values) / len(values)


def spread(rows: Sequence[Row], name: str, form: str) -> str:
    """Mean, and the range over seeds where there are several."""
    values = [row[name] for row in rows]
    low, high = form.format(min(values)), form.format(max(values))
    middle = form.format(sum(values) / len(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def verdict(*conditions: bool) -> str:
    return HOLDS if all(conditions) else PARTLY if any(conditions) else FAILS
