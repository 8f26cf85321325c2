"""How a feature of a Lorsa came about, as a figure."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from saelens_asi.lorsa.read import FeatureReading
from saelens_asi.plots.style import COLORS


def plot_reading(reading: FeatureReading, words: Sequence[str], n_shown: int = 40) -> Figure:
    """Three bars for each source position: its contribution, the attention it gets, and its value.

    Args:
        reading: of ``read_feature``.
        words: one string for each source position.
        n_shown: only the last so many positions before the one that is read.
    """
    n_positions = len(reading.contributions)
    if len(words) < n_positions:
        raise ValueError(f"{len(words)} words for {n_positions} source positions: give one for each")
    shown = range(max(0, n_positions - n_shown), n_positions)
    figure = Figure(figsize=(max(6.0, 0.24 * len(shown)), 5.2), layout="constrained")
    panels = {"contribution": reading.contributions, "attention": reading.pattern, "value": reading.values}
    axes = [figure.add_subplot(3, 1, i + 1) for i in range(3)]
    for axis, color, (name, numbers) in zip(axes, COLORS[1:], panels.items(), strict=False):
        axis.bar(list(shown), numbers[shown.start :].numpy(), color=color)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_ylabel(name)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks([])
        axis.set_xlim(shown.start - 0.6, shown.stop - 0.4)
    labels = [words[i].replace("$", r"\$") for i in shown]
    axes[-1].set_xticks(list(shown), labels, rotation=90, fontsize=8)
    context = reading.context
    axes[0].set_title(
        f"Feature {context.feature} (QK head {reading.head}) at {words[n_positions - 1].strip()!r}: "
        f"activation {context.activation:.3g}, pre-activation {reading.pre_activation:.3g}".replace("$", r"\$"),
        fontsize=10,
    )
    return figure
