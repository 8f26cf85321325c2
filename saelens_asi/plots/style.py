"""What all figures share. Every function of this room returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


class _Box(NamedTuple):
    """A rectangle on the canvas, pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def shared_with(self, other: _Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


# Where a label may stand beside its point: to the right of it first; then the same farther off.
_DIRECTIONS = ((1, 0.3), (1, -1), (-1, 0.3), (-1, -1), (0, 1), (0, -1.4), (1, 1), (-1, 1))
_DISTANCES = (1.0, 1.9, 2.8)


def label_points(
    axis: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str], size: float = 7, mark: float = 7
) -> None:
    """Write a short label beside each point, where it covers neither points nor other labels as far as there is room.

    What is drawn has to have its place already (limits, scales, ``figure.draw_without_rendering()``).

    Args:
        axis: that the points are drawn in.
        points: in its units.
        labels: one a point.
        size: of the letters, in points of 1/72 inch, like the next.
        mark: width of the marker.
    """
    pixel = axis.figure.dpi / 72
    half = mark * pixel / 2
    places = [tuple(axis.transData.transform(point)) for point in points]
    taken = [_Box(x - half, y - half, x + half, y + half) for x, y in places]
    frame = axis.get_window_extent()
    for point, (x, y), label in zip(points, places, labels, strict=True):
        width, height = 0.62 * size * len(label) * pixel, 0.8 * size * pixel
        best: tuple[float, float, float, _Box] | None = None
        for distance in _DISTANCES:
            for right, up in _DIRECTIONS:
                gap = distance * (half + pixel)
                left = x + (gap if right > 0 else -gap - width if right < 0 else -width / 2)
                bottom = y + (up * gap if up > 0 else up * height - (distance - 1) * gap)
                box = _Box(left, bottom, left + width, bottom + height)
                outside = width * height - box.shared_with(_Box(frame.x0, frame.y0, frame.x1, frame.y1))
                covered = sum(box.shared_with(other) for other in taken) + outside
                if best is None or covered < best[0] - 1e-6:
                    best = covered, left, bottom, box
        if best is not None:
            offset = ((best[1] - x) / pixel, (best[2] - y) / pixel)
            axis.annotate(label, point, xytext=offset, textcoords="offset points", fontsize=size, alpha=0.8)
            taken.append(best[3])
