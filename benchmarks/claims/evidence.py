"""The results that the claims rest on: files of benchmarks/results as tables, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.claims.records import lines
from benchmarks.claims.statistics import Pair, seed_deviation
from saelens_asi.sweep import read_sweep
from saelens_asi.sweep.cells import SweepRow
from saelens_asi.sweep.results import Measure, best_rates, grouped, mean_of, settings_but_rate

RESULTS = Path(__file__).parent.parent / "results"

ALIVE = 0.05
# Shares of dead features below this are compared by what seeds do there.
FEW_DEAD = 0.1

# A line of a results file that is no sweep's: names to numbers and words.
Record = dict[str, Any]


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


class ResultFiles:
    """The result files, as tables."""

    def __init__(self, results: Path = RESULTS) -> None:
        # Without round_trip pandas reads some floats with another last digit.
        spectra = pd.read_csv(results / "spectra.csv", float_precision="round_trip")
        self.spectra: list[Record] = spectra.to_dict("records")
        self.losses = json.loads((results / "spectra_losses.json").read_text())
        self.lorsa = lines(results / "lorsa.jsonl")
        self.factors = lines(results / "factors.jsonl")
        self.bias = lines(results / "bias.jsonl")
        self.sweeps = {path.parent.name: read_sweep(path.parent) for path in results.glob("claims/*/cells.jsonl")}
        # What all cells of a sweep share, by sweep.
        self.shared = {path.parent.name: json.loads(path.read_text()) for path in results.glob("claims/*/sweep.json")}
        # The frontier's middle was trained for the sizes.
        methods = {row["method"] for row in self.sweeps["frontier"]}
        middle = [row for row in self.sweeps["d_sae"] if row["d_sae"] == 8192]
        self.sweeps["frontier"] += [row for row in middle if row["method"] in methods]
        # Parts of the plan (plan.py).
        self.parts = {path.stem: lines(path) for path in sorted(results.glob("claims/*.jsonl"))}
        self.steps = json.loads((results / "claims" / "steps.json").read_text())
        self.evaluations = json.loads((results / "claims" / "evaluations.json").read_text())

    def cells(self, sweep: str, **settings: object) -> list[SweepRow]:
        """Rows of a sweep with these settings, each at its chosen learning rate."""
        rows = [row for row in self.sweeps[sweep] if all(row.get(name) == value for name, value in settings.items())]
        if not rows:
            raise ValueError(f"results/claims/{sweep} holds no cell with {settings}: run make claims")
        return chosen_rates(rows)

    @cached_property
    def _repeated(self) -> list[list[SweepRow]]:
        """Cells that have several seeds. What the cells of a sweep share is no column: each sweep by itself."""
        cells = []
        known: set[int] = set()  # the frontier has rows of the sizes
        for rows in self.sweeps.values():
            own = [row for row in rows if id(row) not in known]
            known |= set(map(id, own))
            cells += grouped(own, lambda row: (*settings_but_rate(row), row["lr"], row["n_tokens"])).values()
        return [cell for cell in cells if len(cell) > 1]

    def deviation(self, measure: Measure, *means: float) -> float:
        """Of one seed, pooled over cells that have several: of the error relative to it, of dead shares as they are.

        Dead shares near none differ less between seeds than those in the middle. Where those that are compared have
        these ``means``, and all are small, cells with small ones are pooled.
        """
        cells = self._repeated
        if measure != "nmse" and max(means, default=1.0) < FEW_DEAD:
            cells = [cell for cell in cells if mean_of(cell, measure) < FEW_DEAD]
        rows = [(i, row) for i, cell in enumerate(cells) for row in cell]
        return seed_deviation([{"cell": i, **row} for i, row in rows], measure, itemgetter("cell"), measure == "nmse")

    def pair(self, ours: Sequence[SweepRow], theirs: Sequence[SweepRow], measure: Measure = "nmse") -> Pair:
        """Two contenders, by seed; the claim is that ours is lower."""
        values = [{row["seed"]: row[measure] for row in rows} for rows in (ours, theirs)]
        means = [sum(found.values()) / len(found) for found in values]
        scale = means[1] if measure == "nmse" else 1.0
        return Pair(values[0], values[1], scale * self.deviation(measure, *means))

    def by_layer(self, kind: str, column: str) -> dict[int, float]:
        return {row["layer"]: row[column] for row in self.spectra if row["kind"] == kind}

    def spectrum_mean(self, kind: str, column: str) -> float:
        values = [row[column] for row in self.spectra if row["kind"] == kind]
        return sum(values) / len(values)


def chosen_rates(rows: Iterable[SweepRow]) -> list[SweepRow]:
    """Of rows that differ in rate and seed alone, those with the rate of the lowest error.

    Of ASI's, rates that leave under 5 % of the features dead go first, if there are any: a high rate can buy a lower
    error with the lives of features. The baselines, which have few features to lose, are not held back.
    """
    rows = list(rows)
    alive = best_rates(row for row in rows if row["method"].startswith("asi") and row["dead_fraction"] < ALIVE)
    chosen = {settings_but_rate(row) for row in alive}
    return alive + best_rates(row for row in rows if settings_but_rate(row) not in chosen)
