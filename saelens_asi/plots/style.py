"""What all figures share. Every function of this room returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#8c8c8c", "#1f6feb", "#d9822b", "#2e9e6b", "#a04fb5")


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, bbox_inches="tight")
    return path


def make_axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches with plain axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    row = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in row:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, row
