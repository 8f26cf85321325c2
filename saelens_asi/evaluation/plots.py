"""Figures and tables of evaluations. Every function takes records by name; figures touch no global state."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.results import evaluation_rows, rank_correlation
from saelens_asi.plots import axes as make_axes
from saelens_asi.spectrum_plots import kind_color

_MARKERS = ("o", "^", "s", "D", "v")
_AXES = ("effective_rank_percent", "dead_percent")


def dead_against_rank(results: Mapping[str, SAEEvaluation], groups: Mapping[str, str] | None = None) -> Figure:
    """Dead features of SAEs against the effective rank of what they read (arXiv 2508.16929).

    A point is an SAE, its number the layer, its colour the kind of hook. Evaluations without ranks are left out.

    Args:
        results: evaluations by name.
        groups: from a name to the group it belongs to, such as how it was trained: a marker for each, and a rank
            correlation of its own. One group unless told.
    """
    rows = [row for row in evaluation_rows(results) if row["effective_rank_percent"] is not None]
    figure, (axis,) = make_axes(6.6, 4.4)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    named = {row["name"]: groups[row["name"]] if groups else "" for row in rows}
    found = []
    for marker, group in zip(cycle(_MARKERS), dict.fromkeys(named.values())):
        members = [row for row in rows if named[row["name"]] == group]
        colors = [kind_color(row["kind"], kinds) for row in members]
        x, y = ([row[key] for row in members] for key in _AXES)
        axis.scatter(x, y, s=34, color=colors, marker=marker)
        correlation = rank_correlation(x, y)
        said = "" if correlation is None else f"rank correlation {correlation:+.2f} over {len(members)} SAEs"
        found.append(f"{group}: {said}" if group and said else said)
        if group:
            axis.scatter([], [], s=34, color="grey", marker=marker, label=group)
    for kind in kinds:
        axis.scatter([], [], s=34, color=kind_color(kind, kinds), label=kind or "activations")
    for row in rows:
        if row["layer"] >= 0:
            place = (row[_AXES[0]], row[_AXES[1]])
            axis.annotate(str(row["layer"]), place, xytext=(4, 3), textcoords="offset points", fontsize=7, alpha=0.8)
    axis.set_title("\n".join(["Dead features and effective rank", *filter(None, found)]), fontsize=10)
    axis.set_xlabel("effective rank / width of the activations")
    tokens = sorted({row["n_tokens"] for row in rows})
    counted = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}" if tokens else "0"
    axis.set_ylabel(f"features dead on {counted} tokens")
    axis.margins(0.08)
    top = max([row["dead_percent"] for row in rows], default=0)
    axis.xaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(100, decimals=0 if top >= 5 else None))
    axis.set_ylim(-0.03 * max(top, 1), 1.1 * max(top, 1))
    if kinds:
        axis.legend(frameon=False, fontsize=8)
    return figure


def firing_rate_map(results: Mapping[str, SAEEvaluation]) -> Figure:
    """How often features fire, one line an SAE, for more of them than histograms can be told apart."""
    histograms = [result.to_dict()["firing_rates"] for result in results.values()]
    shares = np.array([one["features"] for one in histograms], dtype=float)
    edges = histograms[0]["log10_from"]
    first = min(int(shares.any(axis=0).argmax()), len(edges) - 1)
    first = next(i for i in range(first, -1, -1) if edges[i] == int(edges[i]))  # a whole decade
    edges, shares = edges[first:], shares[:, first:]
    dead = np.array([[result.dead_fraction] for result in results.values()])
    shares /= np.array([[result.d_sae] for result in results.values()])
    figure = Figure(figsize=(8, 1.6 + 0.2 * len(results)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 14), sharey=True)
    left.imshow(dead, aspect="auto", cmap="Reds", vmin=0, vmax=1)
    for i, share in enumerate(dead[:, 0]):
        left.text(0, i, f"{share:.0%}", ha="center", va="center", fontsize=7, color="white" if share > 0.6 else "black")
    left.set_xticks([0], ["never"])
    left.set_yticks(range(len(results)), list(results), fontsize=7)
    image = right.imshow(shares, aspect="auto", cmap="Blues", extent=(edges[0], 0, len(results) - 0.5, -0.5))
    ticks = range(int(edges[0]), 1)
    right.set_xticks(list(ticks), [f"$10^{{{tick}}}$" for tick in ticks])
    right.set_xlabel("share of tokens on which a feature fires")
    figure.colorbar(image, ax=right, label="share of features", format=PercentFormatter(1.0, decimals=0))
    figure.suptitle("Dead and live features", fontsize=11)
    return figure
