"""Figures. Every function returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from torch import Tensor

from saelens_asi.spectra.spectrum import Spectrum

COLORS = ("#8c8c8c", "#1f6feb", "#d9822b", "#2e9e6b", "#a04fb5")


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, bbox_inches="tight")
    return path


def axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches with plain axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    row = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in row:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, row


def firing_rates(rates: Mapping[str, Tensor], n_tokens: int) -> Figure:
    """How often features fire on tokens, one histogram a run; features that never fire stand apart.

    Args:
        rates: from a run's name to (d_sae,) shares of tokens on which each feature fires.
        n_tokens: tokens behind the shares.
    """
    figure, (axis,) = axes(7.2, 3.8)
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


def subspace_energy(spectrum: Spectrum, decoders: Mapping[str, Tensor], d_init: int) -> Figure:
    """The activations' singular values, and how much of each decoder lies along each principal direction.

    Args:
        spectrum: of the activations.
        decoders: from a run's name to its W_dec (d_sae, d_in).
        d_init: dimension of the subspace that decoder rows started in.
    """
    figure, (left, right) = axes(10.5, 3.8, columns=2)
    s = spectrum.singular_values
    index = range(1, spectrum.d + 1)
    left.semilogy(index, (s / s[0]).numpy(), color="black")
    left.axhline(0.05, color="black", linestyle=":", linewidth=0.8)
    left.annotate("5 %", (spectrum.d, 0.05), ha="right", va="bottom", fontsize=8)
    left.set_ylabel("singular value / largest")
    left.set_title(f"Effective rank {spectrum.effective_rank:.0f} of {spectrum.d}")
    basis = spectrum.principal_directions(spectrum.d).float()
    for i, (name, decoder) in enumerate(decoders.items()):
        rows = decoder.detach().float()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        energy = (rows @ basis).square().mean(dim=0)
        right.plot(index, energy.cumsum(0).numpy(), color=COLORS[i % len(COLORS)], label=name)
    variance = spectrum.variances.cumsum(0) / spectrum.variances.sum()
    right.plot(index, variance.numpy(), color="black", linestyle="--", linewidth=1, label="activations")
    right.set_ylabel("share of squared norm")
    right.set_title("What lies inside the top directions")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_ylim(0, 1.02)
    for axis in (left, right):
        axis.axvspan(0, d_init, color=COLORS[1], alpha=0.08, linewidth=0)
        axis.set_xlabel("principal directions of the activations")
        axis.set_xlim(0, spectrum.d)
    right.legend(frameon=False, loc="lower right")
    return figure


def training_history(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Error, dead features and L0 over the tokens of one or more runs.

    Dead are those silent for SAELens's ``dead_feature_window``; dashed, those that have not fired since the run began.

    Args:
        histories: from a run's name to its records, as ``saelens_asi.read_history`` gives them.
    """
    panels = {"nmse": "normalized MSE of the batch", "dead_fraction": "dead features (dashed: never fired)", "l0": "L0"}
    figure, row = axes(11, 3.4, columns=len(panels))
    for i, (name, records) in enumerate(histories.items()):
        color = COLORS[(i + 1) % len(COLORS)]
        for axis, key in zip(row, panels, strict=True):
            points = [(record["n_tokens"], record[key]) for record in records if record.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, linewidth=1.4, label=name)
        never = [(one["n_tokens"], one["never_fired"] / one["d_sae"]) for one in records if "never_fired" in one]
        if never:
            row[1].plot(*zip(*never, strict=True), "--", color=color, linewidth=1)
    for axis, title in zip(row, panels.values(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens trained on")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    row[0].set_yscale("log")
    row[1].set_ylim(-0.02, 1.02)
    row[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    row[2].set_ylim(bottom=0)
    row[0].legend(frameon=False, fontsize=8)
    return figure


def comparison_bars(rows: Mapping[str, Mapping[str, float]], panels: Mapping[str, str]) -> Figure:
    """One small bar chart a measure.

    Args:
        rows: from a run's name to its measures.
        panels: from a measure to its title.
    """
    figure, row = axes(2.7 * len(panels), 3.0, columns=len(panels))
    for axis, (key, title) in zip(row, panels.items(), strict=True):
        values = [row[key] for row in rows.values()]
        bars = axis.bar(list(rows), values, color=COLORS[: len(rows)], width=0.6)
        axis.bar_label(bars, fmt="%.3g", fontsize=9, padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
        axis.grid(visible=False)
    return figure
