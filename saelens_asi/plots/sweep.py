"""Figures of the paper from the rows of a sweep: each is drawn where the rows vary in what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from saelens_asi.plots.style import make_axes
from saelens_asi.sweep.cells import METHOD_TITLES, METHODS, SweepRow
from saelens_asi.sweep.results import Measure, best_rates, fit_power_law, grouped, mean_of

_COLORS = dict(zip(METHODS, ("#8c8c8c", "#4d4d4d", "#d9822b", "#8db8f5", "#1f6feb", "#93d4b5", "#1b7f4f"), strict=True))
_OTHER = "#a04fb5"

# A line through two points fits them whatever they are: no power law from fewer sizes.
_FEWEST_SIZES = 3

_Axis = Literal["d_init_used", "l0", "d_sae"]


def sweep_figures(rows: Iterable[SweepRow], source: str = "") -> dict[str, Figure]:
    """From file names to figures: ``d_init.png``, ``frontier.png``, ``scaling.png``; those for which there are rows.

    Args:
        rows: of a sweep.
        source: what was read, such as the model and the text: above every figure, with the hook.
    """
    rows = best_rates(rows)
    starts = [row for row in rows if row["subspace"] in ("active", "random") and row["center"] == "mean"]
    methods = [row for row in rows if row["method"] != "other"]
    drawn = {
        "d_init.png": (
            against_d_init,
            _varying(starts, "d_init_used", ("hook_name", "architecture", "d_sae", "k", "optimizer")),
        ),
        "frontier.png": (frontier, _varying(methods, "k", ("hook_name", "architecture", "d_sae"))),
        "scaling.png": (scaling, _varying(methods, "d_sae", ("hook_name", "architecture", "k"))),
    }
    figures = {}
    for name, (draw, chosen) in drawn.items():
        if chosen:
            figures[name] = draw(chosen)
            hook = chosen[0]["hook_name"]
            figures[name].suptitle(f"{source}: {hook}" if source else hook, fontsize=10)
    return figures


def _varying(rows: Sequence[SweepRow], axis: str, fixed: Sequence[str]) -> list[SweepRow]:
    """The largest set of rows equal in ``fixed`` whose values on ``axis`` differ; empty where nothing varies."""
    known = [row for row in rows if row.get(axis) is not None]
    groups = grouped(known, itemgetter(*fixed)).values()
    varied = [group for group in groups if len({row.get(axis) for row in group}) > 1]
    return max(varied, key=len, default=[])


def against_d_init(rows: Sequence[SweepRow]) -> Figure:
    """Error and dead features against the dimension of the subspace, active and random (arXiv 2508.16929, app. E)."""
    figure, (left, right) = make_axes(9.5, 3.6, columns=2)
    colors = {"active": "#1b7f4f", "random": "#8c8c8c"}
    for subspace, group in grouped(rows, itemgetter("subspace")).items():
        label, color = f"{subspace} subspace", colors.get(subspace, _OTHER)
        _curve(left, group, "d_init_used", "nmse", label, color)
        _curve(right, group, "d_init_used", "dead_fraction", label, color)
    _error(left, rows)
    _dead(right)
    for axis in (left, right):
        axis.set_xlabel("d_init")
        _log_ticks(axis, sorted({row["d_init_used"] for row in rows}))
    left.legend(frameon=False)
    return figure


def frontier(rows: Sequence[SweepRow]) -> Figure:
    """Error and dead features against the number of active features (arXiv 2508.16929, sparsity and reconstruction)."""
    figure, (left, right) = make_axes(9.5, 3.8, columns=2)
    for method, group in _by_method(rows).items():
        _curve(left, group, "l0", "nmse", METHOD_TITLES.get(method, method), _COLORS.get(method, _OTHER))
        _curve(right, group, "l0", "dead_fraction", "", _COLORS.get(method, _OTHER))
    _error(left, rows)
    _dead(right)
    for axis in (left, right):
        axis.set_xlabel("active features a token (L0)")
        _log_ticks(axis, sorted({row["k"] for row in rows}))
    left.legend(frameon=False, fontsize=8)
    return figure


def scaling(rows: Sequence[SweepRow]) -> Figure:
    """Error, dead features, and error against live features, by d_sae (arXiv 2508.16929, scaling study)."""
    figure, (left, middle, right) = make_axes(13.5, 4.0, columns=3)
    for method, group in _by_method(rows).items():
        color, title = _COLORS.get(method, _OTHER), METHOD_TITLES.get(method, method)
        sizes, errors = [row["d_sae"] for row in group], [row["nmse"] for row in group]
        if len(set(sizes)) >= _FEWEST_SIZES:
            law = fit_power_law(sizes, errors)
            title = f"{title}: $\\propto$ d_sae$^{{{law.exponent:.3f}}}$"
            ends = np.array([min(sizes), max(sizes)])
            left.plot(ends, law.scale * ends**law.exponent, color=color, linestyle=":", linewidth=1)
        _curve(left, group, "d_sae", "nmse", title, color)
        _curve(middle, group, "d_sae", "dead_fraction", "", color)
        by_size = sorted(grouped(group, itemgetter("d_sae")).items())
        alive = [size * (1 - mean_of(some, "dead_fraction")) for size, some in by_size]
        right.plot(alive, [mean_of(some, "nmse") for _, some in by_size], "o-", color=color, markersize=4)
    _dead(middle)
    sizes = sorted({row["d_sae"] for row in rows})
    for axis, name in ((left, "features (d_sae)"), (middle, "features (d_sae)"), (right, "live features")):
        axis.set_xlabel(name)
    right.set_xscale("log")
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_ylim(*_decades([row["nmse"] for row in rows]))
        axis.set_ylabel("normalized MSE")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")
    for axis in (left, middle):
        _log_ticks(axis, sizes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _curve(axis: Axes, rows: Sequence[SweepRow], x: _Axis, y: Measure, label: str, color: str) -> None:
    """Mean over rows with the same x, and the range over seeds."""
    groups = grouped(rows, lambda row: round(row[x], 1))
    points = sorted((position, [row[y] for row in group]) for position, group in groups.items())
    positions = [position for position, _ in points]
    means = [sum(values) / len(values) for _, values in points]
    axis.plot(positions, means, "o-", color=color, markersize=4, label=label or None)
    if any(len(values) > 1 for _, values in points):
        low, high = [min(values) for _, values in points], [max(values) for _, values in points]
        axis.fill_between(positions, low, high, color=color, alpha=0.2, linewidth=0)


def _error(axis: Axes, rows: Sequence[SweepRow]) -> None:
    """From zero: a difference looks as large as it is."""
    axis.set_ylabel("normalized MSE")
    axis.set_ylim(0, 1.1 * max(row["nmse"] for row in rows))


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The whole decades around them: a slope looks as steep as it is beside the other logarithmic axis."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _dead(axis: Axes) -> None:
    axis.set_ylabel("dead features")
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _log_ticks(axis: Axes, values: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:,.0f}" for value in values], rotation=30 if max(values) > 9999 else 0, fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())


def _by_method(rows: Sequence[SweepRow]) -> dict[str, list[SweepRow]]:
    groups = grouped(rows, itemgetter("method"))
    return {method: groups[method] for method in METHODS if method in groups}
