"""What each ingredient buys: paired differences within the factorial, and its errors and deaths against tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter

from benchmarks.claims.plan import OURS, STARTS, TRAINED
from benchmarks.claims.sources import MODEL_TITLES, TEXT_TITLES
from benchmarks.claims.statistics import Interval, Pair
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.sweep.results import grouped, mean_of

Rows = Sequence[Mapping[str, Any]]

# From what, to what, with the rest alike: starts of each way of training, then ways of training from each start.
CHANGES = (
    ("the mean as centre", "zeros, all of d", "mean, all of d"),
    ("the mean as centre", "zeros, active", "mean, active"),
    ("active directions", "zeros, all of d", "zeros, active"),
    ("active directions", "mean, all of d", "mean, active"),
)
_COLORS = {"zeros": "#b2182b", "mean": "#2166ac"}
_TICKS = {125_000: "125k", 500_000: "500k", 2_000_000: "2M"}
_DASHES = {"all of d": "--", "active": "-"}
# The default stands beside what it differs from in one setting.
_OF_OURS, _LINE = {"color": "#1b7837", "linestyle": "-", "linewidth": 2.2}, {"linewidth": 1.6}


class Effect(NamedTuple):
    """Of one change.

    Attributes:
        change: what it is.
        where: what stays.
        error: log of the ratio of errors.
        dead: share of the features, after less before.
        silent: likewise, of those silent in the last steps too.
    """

    change: str
    where: str
    error: Interval
    dead: Interval
    silent: Interval


def effects(rows: Rows) -> Iterator[Effect]:
    """All changes for which two seeds at least are there on both sides."""
    pairs = [
        (change, f"{trained}, {_kept(before, after)}", f"{trained}, {before}", f"{trained}, {after}")
        for trained in TRAINED
        for change, before, after in CHANGES
    ]
    pairs += [("SparseAdam for Adam", start, f"TopK, {start}", f"SparseAdam, {start}") for start in STARTS]
    pairs.append(("moments that decay", "mean, active", "SparseAdam, mean, active", OURS))
    for change, where, before, after in pairs:
        if len(_shared(rows, before, after)) > 1:
            yield Effect(
                change,
                where,
                *(_difference(rows, before, after, name) for name in ("nmse", "dead_fraction", "silent_fraction")),
            )


def _kept(before: str, after: str) -> str:
    (centre, directions), (other, _) = before.split(", "), after.split(", ")
    return directions if centre != other else f"{centre} as centre" if centre == "zeros" else "the mean as centre"


def by_seed(rows: Rows, contender: str, measure: str) -> dict[int, float]:
    """What a contender's seeds measured."""
    return {row["seed"]: row[measure] for row in rows if row["contender"] == contender}


def _shared(rows: Rows, before: str, after: str) -> set[int]:
    return set(by_seed(rows, before, "nmse")) & set(by_seed(rows, after, "nmse"))


def _difference(rows: Rows, before: str, after: str, measure: str) -> Interval:
    ours, theirs = (by_seed(rows, name, measure) for name in (after, before))
    if measure == "nmse":
        ours, theirs = ({seed: math.log(value) for seed, value in one.items()} for one in (ours, theirs))
    return Pair(ours, theirs).difference


def table(rows: Rows) -> list[str]:
    """One line for each change; empty without seeds."""
    lines = [
        (
            one.change,
            one.where,
            _percent(*(math.expm1(value) for value in (one.error.mean, one.error.low, one.error.high))),
            _percent(*_ends(one.dead)),
            _percent(*_ends(one.silent)),
        )
        for one in effects(rows)
    ]
    header = ["change", "with", "error", "dead, points", "silent, points"]
    return [markdown_table(header, lines, align="llrrr"), ""] if lines else []


def moments(rows: Sequence[Any]) -> str:
    """Moments that silence leaves alone beside those that it lets decay, at each rate and size; Markdown."""
    lines = []
    for (d_sae, model, lr, tokens), own in sorted(grouped(rows, itemgetter("d_sae", "model", "lr", "tokens")).items()):
        kept, decaying = ([row for row in own if ("silent_moments" in row) == decays] for decays in (False, True))
        sizes = (MODEL_TITLES.get(model, model), f"{d_sae:,}", f"{tokens:,}", f"{lr:g}")
        lines.append((*sizes, _in_the_mean(kept), _in_the_mean(decaying), str(len(decaying))))
    measured = [f"{name}: error, dead, silent" for name in ("kept", "decaying")]
    return markdown_table(["model", "features", "tokens", "lr", *measured, "seeds"], lines, align="lrrrrrr")


def doubled(before: Rows, after: Rows) -> str:
    """Errors and deaths of the same settings after some tokens, and after twice as many; Markdown."""
    lines = []
    for row in sorted(after, key=itemgetter("lr", "nmse")):
        own = [one for one in before if (one["contender"], one["lr"]) == (row["contender"], row["lr"])]
        change = f"{row['nmse'] / mean_of(own, 'nmse') - 1:+.1%}" if own else ""
        lines.append((row["contender"], f"{row['lr']:g}", _in_the_mean(own), _in_the_mean([row]), change))
    measured = [f"{rows[0]['tokens']:,} tokens: error, dead, silent" for rows in (before, after)]
    return markdown_table(["trained, centre, directions", "lr", *measured, "error"], lines, align="lrrrr")


def _in_the_mean(rows: Sequence[Any]) -> str:
    """Over seeds; nothing where none is trained."""
    if not rows:
        return ""
    return f"{mean_of(rows, 'nmse'):.4f}, {mean_of(rows, 'dead_fraction'):.2%}, {mean_of(rows, 'silent_fraction'):.2%}"


def _ends(one: Interval) -> tuple[float, float, float]:
    return one.mean, one.low, one.high


def _percent(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def curves(rows: Rows) -> Figure:
    """Error and dead features against tokens: a column for each way of training, a line for each start."""
    figure = Figure(figsize=(13, 6.7), layout="constrained")
    axes = figure.subplots(2, len(TRAINED), sharex=True, sharey="row")
    for column, trained in enumerate(TRAINED):
        for start in STARTS:
            centre, directions = start.split(", ")
            style = {**_LINE, "color": _COLORS[centre], "linestyle": _DASHES[directions]}
            _draw(axes[:, column], curve([row for row in rows if row["contender"] == f"{trained}, {start}"]), style)
        axes[0, column].set_title(trained, fontsize=10)
        axes[1, column].set_xlabel("tokens")
    _draw(
        axes[:, list(TRAINED).index("SparseAdam")], curve([row for row in rows if row["contender"] == OURS]), _OF_OURS
    )
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_xticks(list(_TICKS), labels=list(_TICKS.values()))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("normalized MSE")
    axes[0, 0].set_ylim(0, None)
    axes[1, 0].set_ylabel("dead on held-out tokens")
    axes[1, 0].set_ylim(0, 1)
    axes[1, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles = [Line2D([], [], color=color, label=f"centre: {name}") for name, color in _COLORS.items()]
    handles += [Line2D([], [], color="black", linestyle=dash, label=name) for name, dash in _DASHES.items()]
    handles.append(Line2D([], [], **_OF_OURS, label=f"{OURS}: the default"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    model, text, hook = itemgetter("model", "text", "hook")(rows[0])
    figure.suptitle(f"{MODEL_TITLES[model]}, {TEXT_TITLES[text]}: {hook}", fontsize=11)
    return figure


def _draw(axes: Any, points: Sequence[tuple[float, float, float]], style: Mapping[str, Any]) -> None:
    """Error into the first of two axes, dead share into the second, against tokens."""
    if points:
        tokens, *measures = zip(*points, strict=True)
        for axis, values in zip(axes, measures, strict=True):
            axis.plot(tokens, values, **style)


def curve(rows: Rows) -> list[tuple[float, float, float]]:
    """Tokens, error and dead share in the mean over seeds; the last point is that of all held-out tokens."""
    of_seeds = [[*row["curve"], (row["tokens"], row["nmse"], row["dead_fraction"])] for row in rows if row.get("curve")]
    if not of_seeds:
        return []
    return [tuple(np.mean(points, axis=0).tolist()) for points in zip(*of_seeds, strict=True)]
