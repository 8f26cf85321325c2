"""When a difference counts: paired differences over seeds, their intervals, and the verdict that follows from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

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

    def written(self, form: str) -> str:
        """The mean with its interval in brackets, each as ``form`` has it."""
        return f"{form.format(self.mean)} ({form.format(self.low)} to {form.format(self.high)})"


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
    """Rank correlation of x and y with that of both with ``given`` taken out.

    Raises:
        ValueError: for fewer than three points, or where one of the three does not vary.
    """
    found = rank_correlations(np.array([x, y, given], dtype=float))
    if len(x) < 3 or not np.isfinite(found).all():
        raise ValueError("ranks of fewer than three points, or of one value alone, have no correlation")
    return float(_partial(found, 0, 1, 2))


def rank_correlations(columns: np.ndarray) -> np.ndarray:
    """(..., m, m) of m columns (..., m, n), ties at their mean rank; nan for a column that does not vary."""
    ranks = rankdata(columns, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    products = ranks @ ranks.swapaxes(-1, -2)
    lengths = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / (lengths[..., None, :] * lengths[..., :, None])


def _partial(correlations: np.ndarray, x: int, y: int, given: int) -> np.ndarray:
    ab, ac, bc = correlations[..., x, y], correlations[..., x, given], correlations[..., y, given]
    return (ab - ac * bc) / np.sqrt(np.maximum((1 - ac**2) * (1 - bc**2), 1e-12))


@dataclass(frozen=True)
class Explained:
    """What two causes say of one effect, as rank correlations with their 95 % intervals.

    Attributes:
        alone: of each cause with the effect, by the cause's name.
        beside: likewise, with the other cause taken out.
        lead: by how much the first of ``beside`` is larger than the second, signs left out.
    """

    alone: Mapping[str, Interval]
    beside: Mapping[str, Interval]
    lead: Interval


def explained(causes: Mapping[str, Sequence[float]], effect: Sequence[float], draws: int = 4000) -> Explained:
    """How each of two causes goes with an effect, alone and with the other taken out.

    Intervals are percentiles over samples of the points with replacement (Efron 1979); samples in which something does
    not vary are left out. With a dozen points they are rough.
    """
    points = np.array([*causes.values(), effect], dtype=float)

    def statistics(sample: np.ndarray) -> np.ndarray:
        found = rank_correlations(sample)
        partial = _partial(found, 0, 2, 1), _partial(found, 1, 2, 0)
        return np.stack([found[..., 0, 2], found[..., 1, 2], *partial, abs(partial[0]) - abs(partial[1])], axis=-1)

    chosen = np.random.default_rng(0).integers(points.shape[1], size=(draws, points.shape[1]))
    drawn = statistics(points[:, chosen].swapaxes(0, 1))
    low, high = np.quantile(drawn[np.isfinite(drawn).all(axis=1)], (0.025, 0.975), axis=0)
    whole = [Interval(*map(float, values)) for values in zip(statistics(points), low, high, strict=True)]
    names = list(causes)
    return Explained(dict(zip(names, whole[:2], strict=True)), dict(zip(names, whole[2:4], strict=True)), whole[4])
