"""Figures of evaluations and of training histories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from torch import Tensor

from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.results import evaluation_rows, rank_correlation
from saelens_asi.history import Record
from saelens_asi.plots.spectra import kind_color
from saelens_asi.plots.style import COLORS, label_points, make_axes

_MARKERS = ("o", "^", "s", "D", "v")


def dead_against_rank(results: Mapping[str, SAEEvaluation], groups: Mapping[str, str] | None = None) -> Figure:
    """Dead features of SAEs against the effective rank of what they read (arXiv 2508.16929).

    A point is an SAE, its number the layer, its colour the kind of hook. Evaluations without ranks are left out.

    Args:
        results: evaluations by name.
        groups: from a name to the group it belongs to, such as how it was trained: a marker for each, and a rank
            correlation of its own. One group unless told.
    """
    rows = evaluation_rows(results)
    ranks = {row["name"]: rank for row in rows if (rank := row["effective_rank_percent"]) is not None}
    rows = [row for row in rows if row["name"] in ranks]
    figure, (axis,) = make_axes(6.6, 4.4)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    group_of = {row["name"]: groups[row["name"]] if groups else "" for row in rows}
    correlations = []
    for marker, group in zip(cycle(_MARKERS), dict.fromkeys(group_of.values())):
        members = [row for row in rows if group_of[row["name"]] == group]
        colors = [kind_color(row["kind"], kinds) for row in members]
        x, y = [ranks[row["name"]] for row in members], [row["dead_percent"] for row in members]
        axis.scatter(x, y, s=34, color=colors, marker=marker)
        correlation = rank_correlation(x, y)
        if correlation is not None:
            sentence = f"rank correlation {correlation:+.2f} over {len(members)} SAEs"
            correlations.append(f"{group}: {sentence}" if group else sentence)
        if group:
            axis.scatter([], [], s=34, color="grey", marker=marker, label=group)
    for kind in kinds:
        axis.scatter([], [], s=34, color=kind_color(kind, kinds), label=kind or "activations")
    axis.set_title("\n".join(["Dead features and effective rank", *correlations]), fontsize=10)
    axis.set_xlabel("effective rank / width of the activations")
    tokens = sorted({row["n_tokens"] for row in rows})
    counted = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}" if tokens else "0"
    axis.set_ylabel(f"features dead on {counted} tokens")
    axis.set_xlim(0, 100)
    top = max([row["dead_percent"] for row in rows], default=0)
    axis.xaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(100, decimals=0 if top >= 5 else None))
    axis.set_ylim(-0.03 * max(top, 1), 1.1 * max(top, 1))
    if kinds:
        axis.legend(frameon=False, fontsize=8)
    named = [row for row in rows if row["layer"] >= 0]
    figure.draw_without_rendering()
    points = [(ranks[row["name"]], row["dead_percent"]) for row in named]
    label_points(axis, points, [str(row["layer"]) for row in named])
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


def firing_rates(rates: Mapping[str, Tensor], n_tokens: int) -> Figure:
    """How often features fire on tokens, one histogram a run; features that never fire stand apart.

    Args:
        rates: from a run's name to (d_sae,) shares of tokens on which each feature fires.
        n_tokens: tokens behind the shares.
    """
    figure, (axis,) = make_axes(7.2, 3.8)
    low = -5.0
    n_bins = 40
    bar = 0.42
    for i, (name, rate) in enumerate(rates.items()):
        color = COLORS[i % len(COLORS)]
        dead = float((rate == 0).float().mean())
        alive = rate[rate > 0].log10().clamp(min=low)
        axis.hist(
            alive.numpy(),
            bins=[low + j * (0 - low) / n_bins for j in range(n_bins + 1)],
            weights=[1 / len(rate)] * len(alive),
            color=color,
            alpha=0.65,
            label=f"{name}: {dead:.1%} dead",
        )
        position = low - 0.48 - (len(rates) - 1 - i) * bar
        axis.bar(position, dead, width=bar, color=color)
        axis.annotate(f"{dead:.1%}", (position, dead), ha="center", va="bottom", fontsize=8, color=color)
    axis.axvline(low - 0.15, color="black", linewidth=0.6, alpha=0.4)
    ticks = list(range(int(low), 1))
    middle = low - 0.48 - (len(rates) - 1) * bar / 2
    axis.set_xticks([middle, *ticks], ["never", *[f"$10^{{{tick}}}$" for tick in ticks]])
    axis.set_xlabel(f"share of {n_tokens:,} tokens on which a feature fires")
    axis.set_ylabel("share of features")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(frameon=False)
    axis.set_title("Dead and live features")
    return figure


def training_history(histories: Mapping[str, Sequence[Record]]) -> Figure:
    """Error, dead features and L0 over the tokens of one or more runs.

    Dead are those silent for SAELens's ``dead_feature_window``; dashed, those that have not fired since the run began.

    Args:
        histories: from a run's name to its records, as ``saelens_asi.read_history`` gives them.
    """
    panels = {"nmse": "normalized MSE of the batch", "dead_fraction": "dead features (dashed: never fired)", "l0": "L0"}
    figure, panel_axes = make_axes(11, 3.4, columns=len(panels))
    for i, (name, records) in enumerate(histories.items()):
        color = COLORS[(i + 1) % len(COLORS)]
        for axis, key in zip(panel_axes, panels, strict=True):
            points = [(record["n_tokens"], record[key]) for record in records if record.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, linewidth=1.4, label=name)
        never = [(one["n_tokens"], one["never_fired"] / one["d_sae"]) for one in records if "never_fired" in one]
        if never:
            panel_axes[1].plot(*zip(*never, strict=True), "--", color=color, linewidth=1)
    for axis, title in zip(panel_axes, panels.values(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens trained on")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel_axes[0].set_yscale("log")
    panel_axes[1].set_ylim(-0.02, 1.02)
    panel_axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel_axes[2].set_ylim(bottom=0)
    panel_axes[0].legend(frameon=False, fontsize=8)
    return figure


def comparison_bars(rows: Mapping[str, Mapping[str, float]], panels: Mapping[str, str]) -> Figure:
    """One small bar chart a measure.

    Args:
        rows: from a run's name to its measures.
        panels: from a measure to its title.
    """
    width = max(2.7, 0.9 * len(rows))  # names of runs stand side by side
    figure, panel_axes = make_axes(width * len(panels), 3.0, columns=len(panels))
    for axis, (key, title) in zip(panel_axes, panels.items(), strict=True):
        values = [row[key] for row in rows.values()]
        bars = axis.bar(list(rows), values, color=COLORS[: len(rows)], width=0.6)
        axis.bar_label(bars, fmt="%.3g", fontsize=9, padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
        axis.grid(visible=False)
    return figure
