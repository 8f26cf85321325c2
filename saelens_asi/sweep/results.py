"""What the rows of a sweep say: the best rates, power laws, a table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from saelens_asi.sweep.cells import TITLES, Cell

Row = Mapping[str, Any]

# What tells cells apart that are not repetitions of one another.
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
    design = np.stack([np.ones(len(x)), np.log(x)], axis=1)
    (intercept, exponent), *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    residual = float(np.sqrt(np.mean((design @ [intercept, exponent] - np.log(y)) ** 2)))
    return PowerLaw(math.exp(intercept), float(exponent), residual)


def best_rates(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ in learning rate and seed alone, those with the rate of the lowest mean error."""
    best: list[Row] = []
    for group in _grouped(rows, lambda row: tuple(row[name] for name in _SETTINGS)).values():
        rates = _grouped(group, lambda row: row["lr"]).values()
        lowest: list[Row] = min(rates, key=_mean_error)
        best += lowest
    return best


def _mean_error(rows: Sequence[Row]) -> float:
    return _mean(rows, "nmse")


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


_COLUMNS = ("hook_name", "architecture", "method", "d_sae", "k", "subspace", "norm", "center", "d_init", "optimizer",
            "aux_loss_coefficient", "lr")  # fmt: skip


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
