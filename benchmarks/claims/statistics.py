"""When a difference counts: paired differences over seeds, their intervals, and the verdict that follows from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saelens_asi.evaluation.results import rank_correlation

HOLDS, PARTLY, FAILS, UNJUDGED = "holds", "partly", "does not hold here", "not judged: one seed"

# Of Student's distribution, two-sided 95 %, by degrees of freedom; beyond the last the normal one's.
_T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 29: 2.045}
_NORMAL95 = 1.96


def t95(freedom: int) -> float:
    """The quantile of the degrees of freedom, or of the next fewer in the table: never too narrow."""
    return _T95[max(n for n in _T95 if n <= freedom)]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """-1 where all of it lies below zero, 1 above, 0 where zero is inside."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of at least two values (Student). Raises ValueError for fewer."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no interval: two at least are needed")
    mean = float(np.mean(values))
    half = t95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Pair:
    """Two contenders on one measure.

    Attributes:
        ours: values by seed (or layer, or whatever both share).
        theirs: likewise.
        deviation: of one seed's value, for pairs that share fewer than two: pooled over cells that have several.
        higher: whether ours is claimed to be the higher one.
    """

    ours: Mapping[Any, float]
    theirs: Mapping[Any, float]
    deviation: float | None = None
    higher: bool = False

    @property
    def difference(self) -> Interval:
        """Ours less theirs. Raises ValueError where too few are shared and no deviation is known."""
        shared = sorted(set(self.ours) & set(self.theirs), key=str)
        if len(shared) > 1:
            return interval([self.ours[key] - self.theirs[key] for key in shared])
        if self.deviation is None or not self.ours or not self.theirs:
            raise ValueError("a pair with fewer than two seeds needs the deviation of a seed")
        mean = float(np.mean(list(self.ours.values())) - np.mean(list(self.theirs.values())))
        half = _NORMAL95 * self.deviation * math.sqrt(1 / len(self.ours) + 1 / len(self.theirs))
        return Interval(mean, mean - half, mean + half)

    @property
    def holds(self) -> bool:
        return self.difference.side == (1 if self.higher else -1)


def verdict(conditions: Iterable[Pair | bool]) -> str:
    """Holds: in every pair the interval lies on the claimed side; partly: in some; does not: in none.

    A condition that no chance enters into, as a count over layers, stands as it is.
    """
    met = [one.holds if isinstance(one, Pair) else one for one in conditions]
    if not met:
        raise ValueError("a verdict needs at least one condition")
    return HOLDS if all(met) else PARTLY if any(met) else FAILS


def seed_deviation(
    rows: Iterable[Mapping[str, Any]], measure: str, settings: Callable[[Mapping[str, Any]], Any], relative: bool = True
) -> float:
    """Standard deviation over seeds of cells that are equal but for it, pooled; relative to their mean, or as it is.

    Raises:
        ValueError: where no cell has two seeds.
    """
    groups: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        groups[settings(row)].append(row[measure])
    several = [values for values in groups.values() if len(values) > 1]
    if not several:
        raise ValueError(f"no cell has two seeds: the deviation of {measure} is unknown")
    squares = [float(np.var(values, ddof=1)) / (float(np.mean(values)) ** 2 if relative else 1.0) for values in several]
    weights = [len(values) - 1 for values in several]
    return math.sqrt(float(np.average(squares, weights=weights)))


def partial_correlation(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float:
    """Rank correlation of x and y with that of both with ``given`` taken out."""
    ab, ac, bc = (rank_correlation(*pair) for pair in ((x, y), (x, given), (y, given)))
    if ab is None or ac is None or bc is None:
        raise ValueError("ranks of fewer than three points, or of one value alone, have no correlation")
    return (ab - ac * bc) / math.sqrt(max((1 - ac**2) * (1 - bc**2), 1e-12))
