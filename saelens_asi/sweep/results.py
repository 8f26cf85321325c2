"""What the rows of a sweep say: the best rates, power laws, a table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Literal, TypeVar

import numpy as np

from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.sweep.cells import METHOD_TITLES, Cell, SweepRow

Key = TypeVar("Key", bound=Hashable)
Measure = Literal["nmse", "dead_fraction", "silent_fraction", "l0", "seconds", "cpu_seconds"]

_SETTINGS = ("hook_name", *(field.name for field in fields(Cell) if field.name not in ("lr", "seed")))


@dataclass(frozen=True)
class PowerLaw:
    """y = scale * x ** exponent, fitted by least squares on the logarithms.

    Attributes:
        scale: y at x = 1.
        exponent: slope in the log-log plane.
        residual: root mean square of log(y) around the fit.
    """

    scale: float
    exponent: float
    residual: float


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Raises ValueError for fewer than two different values of x, or values that are not positive."""
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError("a power law needs two different positive x at least, and positive y")
    line = np.polyfit(np.log(x), np.log(y), deg=1)
    residual = float(np.sqrt(np.mean((np.polyval(line, np.log(x)) - np.log(y)) ** 2)))
    return PowerLaw(math.exp(line[1]), float(line[0]), residual)


def settings_but_rate(row: SweepRow) -> tuple[object, ...]:
    """All settings but learning rate and seed: equal for rows among which a rate is chosen."""
    return tuple(row.get(name) for name in _SETTINGS)


def best_rates(rows: Iterable[SweepRow]) -> list[SweepRow]:
    """Of rows that differ in learning rate and seed alone, those with the rate of the lowest mean error."""
    best: list[SweepRow] = []
    for group in grouped(rows, settings_but_rate).values():
        by_rate = list(grouped(group, itemgetter("lr")).values())
        errors = [mean_of(repetitions, "nmse") for repetitions in by_rate]
        best += by_rate[errors.index(min(errors))]
    return best


def mean_of(rows: Sequence[SweepRow], measure: Measure) -> float:
    return sum(row[measure] for row in rows) / len(rows)


def grouped(rows: Iterable[SweepRow], key: Callable[[SweepRow], Key]) -> dict[Key, list[SweepRow]]:
    """Rows by their key; keys, and the rows of each, in the order in which they come."""
    groups: dict[Key, list[SweepRow]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


_COLUMNS = ("hook_name", "architecture", "method", "d_sae", "k", "subspace", "norm", "center", "d_init", "optimizer",
            "silent_moments", "aux_loss_coefficient", "revive", "lr")  # fmt: skip


def sweep_table(rows: Iterable[SweepRow]) -> str:
    """A Markdown table: cells that differ in the seed alone are one line, with mean and range."""
    groups = grouped(rows, lambda row: tuple(row.get(name) for name in _COLUMNS))
    constant = [i for i in range(len(_COLUMNS)) if len({key[i] for key in groups}) == 1 and len(groups) > 1]
    shown = [i for i in range(len(_COLUMNS)) if i not in constant]
    columns = [*(_COLUMNS[i] for i in shown), "normalized MSE", "dead", "L0", "seeds", "s", "CPU s"]
    cells = [[*(_setting(key[i]) for i in shown), *_measures(group)] for key, group in groups.items()]
    table = markdown_table(columns, cells, align="l" * len(shown) + "rrrrrr")
    if not constant:
        return table
    return ", ".join(f"{_COLUMNS[i]} = {_setting(next(iter(groups))[i])}" for i in constant) + f"\n\n{table}"


def _measures(rows: Sequence[SweepRow]) -> list[str]:
    return [
        spread(rows, "nmse", "{:.4f}"),
        spread(rows, "dead_fraction", "{:.2%}"),
        spread(rows, "l0", "{:.1f}"),
        str(len(rows)),
        spread(rows, "seconds", "{:.0f}"),
        spread(rows, "cpu_seconds", "{:.0f}"),
    ]


def _setting(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, int | float):
        return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
    return METHOD_TITLES.get(str(value), str(value))


def spread(rows: Sequence[SweepRow], measure: Measure, form: str) -> str:
    """Mean, and the range over seeds where they differ in what is shown."""
    values = [row[measure] for row in rows]
    mean = form.format(sum(values) / len(values))
    low, high = form.format(min(values)), form.format(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"
