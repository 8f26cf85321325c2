"""The figure of an autopsy. It returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from saelens_asi.dead_features.record import TITLES, VERDICTS, Autopsy
from saelens_asi.plots.style import axes as make_axes

LIVE = "#2e9e6b"
VERDICT_COLORS = {
    "broken": "#111111",
    "duplicate": "#8a6d1d",
    "starved": "#9ccfb5",
    "momentum": "#a04fb5",
    "outside": "#1f6feb",
    "mean": "#d9822b",
    "norm": "#c2405a",
    "bias": "#e0b100",
    "several": "#5b6b7b",
    "unexplained": "#c8c8c8",
}

# Points drawn for each verdict: more would only cover one another.
_MOST_POINTS = 1500


def autopsy_figure(found: Autopsy, title: str = "Why features are dead") -> Figure:
    """Verdicts, and each feature by how far it must fluctuate to fire and how much of its row lies outside.

    On the right, the height is (mean bar less mean score) / deviation: how many of its own standard deviations a
    feature's score must rise above its mean to pass the mean bar. A live feature needs few.
    """
    figure, (left, right) = make_axes(12, 4.6, columns=2)
    counts = {verdict: found.counts[verdict] for verdict in VERDICTS if verdict in found.counts}
    ordered = sorted(counts, key=lambda verdict: counts[verdict])
    bars = left.barh(
        [TITLES[verdict] for verdict in ordered],
        [counts[verdict] for verdict in ordered],
        color=[VERDICT_COLORS[verdict] for verdict in ordered],
        height=0.66,
    )
    labels = [f" {counts[verdict]:,}  ({counts[verdict] / len(found.dead):.1%})" for verdict in ordered]
    left.bar_label(bars, labels, fontsize=9)
    left.set_xlim(0, 1.32 * max(counts.values(), default=1))
    left.grid(visible=False, axis="y")
    left.tick_params(axis="y", length=0)
    left.set_xlabel("dead features")
    left.set_title(f"{len(found.dead):,} of {found.d_sae:,} fire on none of {found.n_tokens:,} tokens", fontsize=10)

    table = found.features
    live = (table.fires > 0).nonzero().squeeze(1)
    need = (found.mean_bar - table.mean_score) / table.deviation.clamp(min=1e-30)
    groups = [(live, LIVE), *((found.having(verdict), VERDICT_COLORS[verdict]) for verdict in counts)]
    drawn = torch.cat([members for members, _ in groups])
    drawn = drawn[need[drawn].isfinite() & (table.deviation[drawn] > 0)]
    low, high = _limits(need[drawn])
    generator = torch.Generator().manual_seed(0)
    for members, color in sorted(groups, key=lambda group: -len(group[0])):
        shown = members[torch.randperm(len(members), generator=generator)[:_MOST_POINTS]]
        heights = need[shown].clamp(low, high)
        size, top = (16, 3) if color == LIVE else (7, 2)
        right.scatter(
            table.outside[shown].numpy(), heights.numpy(), s=size, color=color, alpha=0.55, linewidths=0, zorder=top,
        )  # fmt: skip
    right.set_yscale("symlog", linthresh=1, linscale=0.5)
    right.set_ylim(low * 1.3 if low < 0 else low - 0.3, high * 1.3)
    right.set_xlim(-0.02, max(0.2, min(1.02, 1.1 * float(table.outside[drawn].max()) if len(drawn) else 1.0)))
    right.axhline(0, color="black", linewidth=0.6, alpha=0.5)
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_xlabel("share of the encoder row outside the active subspace")
    right.set_ylabel("deviations from its mean score to the bar")
    right.set_title(
        f"active subspace {found.d_active} of {found.d_in} dimensions, gamma {found.gamma_seen:.2f}", fontsize=10
    )
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for height, label, color in ((0.94, f"live: {len(live):,}", LIVE), (0.88, "dead: as on the left", "grey")):
        right.annotate(label, (0.03, height), xycoords="axes fraction", fontsize=9, color=color)
    figure.suptitle(title)
    return figure


def _limits(need: torch.Tensor) -> tuple[float, float]:
    if not len(need):
        return -1.0, 1.0
    low, high = need.double().quantile(torch.tensor([0.001, 0.999], dtype=torch.float64)).tolist()
    return min(low, 0.0), max(high, 1.0)
