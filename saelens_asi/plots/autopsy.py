"""The figure of an autopsy. It returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from saelens_asi.dead_features.record import VERDICT_TITLES, VERDICTS, Autopsy
from saelens_asi.plots.style import make_axes

LIVE = "#2e9e6b"
VERDICT_COLORS = {
    "broken": "#111111",
    "duplicate": "#8a6d1d",
    "starved": "#9ccfb5",
    "momentum": "#a04fb5",
    "undecided": "#9aa7c7",
    "outside": "#1f6feb",
    "mean": "#d9822b",
    "norm": "#c2405a",
    "bias": "#e0b100",
    "several": "#5b6b7b",
    "unexplained": "#c8c8c8",
}

# Points drawn for each verdict: more would only cover one another.
_MOST_POINTS = 1500


def autopsy_figure(record: Autopsy, title: str = "Why features are dead") -> Figure:
    """Verdicts, and each feature by how far it must fluctuate to fire and how much of its row lies outside.

    On the right, the height is (mean bar less mean score) / deviation: how many of its own standard deviations a
    feature's score must rise above its mean to pass the mean bar. A live feature needs few.
    """
    figure, (left, right) = make_axes(12, 4.6, columns=2)
    _draw_verdicts(left, record)
    _draw_features(right, record)
    figure.suptitle(title)
    return figure


def _draw_verdicts(axis: Axes, record: Autopsy) -> None:
    """One bar a verdict, the most frequent on top."""
    counts = {verdict: record.counts[verdict] for verdict in VERDICTS if verdict in record.counts}
    ordered = sorted(counts, key=lambda verdict: counts[verdict])
    bars = axis.barh(
        [VERDICT_TITLES[verdict] for verdict in ordered],
        [counts[verdict] for verdict in ordered],
        color=[VERDICT_COLORS[verdict] for verdict in ordered],
        height=0.66,
    )
    labels = [f" {counts[verdict]:,}  ({counts[verdict] / len(record.dead):.1%})" for verdict in ordered]
    axis.bar_label(bars, labels, fontsize=9)
    axis.set_xlim(0, 1.32 * max(counts.values(), default=1))
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("dead features")
    axis.set_title(f"{len(record.dead):,} of {record.d_sae:,} fire on none of {record.n_tokens:,} tokens", fontsize=10)


def _draw_features(axis: Axes, record: Autopsy) -> None:
    """One point a feature, in the colour of its verdict."""
    table = record.features
    live = (table.fires > 0).nonzero().squeeze(1)
    need = (record.mean_bar - table.mean_score) / table.deviation.clamp(min=1e-30)
    verdicts = [verdict for verdict in VERDICTS if verdict in record.counts]
    groups = [(live, LIVE), *((record.having(verdict), VERDICT_COLORS[verdict]) for verdict in verdicts)]
    drawn = torch.cat([members for members, _ in groups])
    drawn = drawn[need[drawn].isfinite() & (table.deviation[drawn] > 0)]
    low, high = _limits(need[drawn])
    generator = torch.Generator().manual_seed(0)
    # The largest group first, so that its points do not cover the others.
    for members, color in sorted(groups, key=lambda group: -len(group[0])):
        shown = members[torch.randperm(len(members), generator=generator)[:_MOST_POINTS]]
        heights = need[shown].clamp(low, high)
        size, top = (16, 3) if color == LIVE else (7, 2)
        axis.scatter(
            table.outside[shown].numpy(), heights.numpy(), s=size, color=color, alpha=0.55, linewidths=0, zorder=top,
        )  # fmt: skip
    axis.set_yscale("symlog", linthresh=1, linscale=0.5)
    axis.set_ylim(low * 1.3 if low < 0 else low - 0.3, high * 1.3)
    axis.set_xlim(-0.02, max(0.2, min(1.02, 1.1 * float(table.outside[drawn].max()) if len(drawn) else 1.0)))
    axis.axhline(0, color="black", linewidth=0.6, alpha=0.5)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("share of the encoder row outside the active subspace")
    axis.set_ylabel("deviations from its mean score to the bar")
    axis.set_title(
        f"active subspace {record.d_active} of {record.d_in} dimensions, gamma {record.gamma_seen:.2f}", fontsize=10
    )
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for height, label, color in ((0.94, f"live: {len(live):,}", LIVE), (0.88, "dead: as on the left", "grey")):
        axis.annotate(label, (0.03, height), xycoords="axes fraction", fontsize=9, color=color)


def _limits(need: torch.Tensor) -> tuple[float, float]:
    if not len(need):
        return -1.0, 1.0
    low, high = need.double().quantile(torch.tensor([0.001, 0.999], dtype=torch.float64)).tolist()
    return min(low, 0.0), max(high, 1.0)
