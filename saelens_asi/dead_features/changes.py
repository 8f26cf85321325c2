"""Would a silent feature fire if one thing about it were different? Rows changed one way at a time, tried on tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelens_asi.dead_features.contests import MAX_DENSE_VALUES, Contest, Rows

# As many of a sample's highest margins say how fast their tail falls off.
_TAIL = 30


class Split(NamedTuple):
    """Scores around the mean input: ``(x - mean) @ weight.T + mean_score + bias``.

    Attributes:
        weight: (n, d_in), what makes the score fluctuate.
        mean_score: (n,), what the mean input gives.
        bias: (n,), less a threshold of the feature's own.
        mean: (d_in,), the mean input; 0 where it has been subtracted.
    """

    weight: Tensor
    mean_score: Tensor
    bias: Tensor
    mean: Tensor

    @classmethod
    def of(cls, rows: Rows, mean: Tensor) -> Split:
        return cls(rows.weight, rows.weight @ mean, rows.bias, mean)

    def at(self, features: Tensor) -> Split:
        """Some of them."""
        return Split(self.weight[features], self.mean_score[features], self.bias[features], self.mean)

    def centred(self) -> Rows:
        """The same scores, for inputs less their mean."""
        return Rows(self.weight, self.mean_score + self.bias)


class Typical(NamedTuple):
    """What live features are like, for changes that make a row like them; ``norm`` 0 where nothing lives."""

    norm: float
    bias: float

    @classmethod
    def of(cls, live: Rows) -> Typical:
        if not len(live.bias):
            return cls(0.0, 0.0)
        return cls(float(live.weight.norm(dim=1).median()), float(live.bias.median()))


class ContestSample:
    """At most ``size`` inputs and bars, drawn evenly from all that were added, whatever the size of the batches."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._random = np.random.default_rng(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._drawn: list[Tensor] = []

    def add(self, contest: Contest) -> None:
        keys = torch.from_numpy(self._random.random(len(contest.bars)))
        if len(self._keys) == self.size:
            chosen = (keys < self._keys.max()).nonzero().squeeze(1)
        else:
            chosen = torch.arange(len(keys))
        if not len(chosen):
            return
        new = [
            contest.inputs[chosen.to(contest.inputs.device)].clone(),
            contest.bars[chosen.to(contest.bars.device)].clone(),
        ]
        self._keys = torch.cat([self._keys, keys[chosen]])
        self._drawn = (
            [torch.cat([old, more]) for old, more in zip(self._drawn, new, strict=True)] if self._drawn else new
        )
        if len(self._keys) > self.size:
            lowest = self._keys.topk(self.size, largest=False, sorted=False).indices.sort().values
            self._keys = self._keys[lowest]
            self._drawn = [values[lowest.to(values.device)] for values in self._drawn]

    @property
    def inputs(self) -> Tensor:
        return self._drawn[0]

    @property
    def bars(self) -> Tensor:
        return self._drawn[1]


class Parts(NamedTuple):
    """Rows as sums of orthogonal parts, (n, d_in) each: inside the active subspace, along the mean, and the rest.

    The mean may lie outside the active subspace, which is that of the centred activations. A part along it does
    something to the score, so that it is neither inside nor outside.
    """

    inside: Tensor
    along_mean: Tensor
    outside: Tensor

    @classmethod
    def of(cls, weight: Tensor, basis: Tensor, mean: Tensor) -> Parts:
        """``basis`` (d_in, r) of the active subspace."""
        direction = torch.nn.functional.normalize(mean - basis @ (basis.T @ mean), dim=0)
        within = weight @ basis @ basis.T
        along = (weight @ direction)[:, None] * direction
        return cls(within, along, weight - within - along)


def inside(rows: Split, basis: Tensor) -> Split:
    """What lies outside turned inside, along the row's own part there; a row without one takes the first direction.

    The mean score stays what it was: what changes is only how far the score fluctuates.
    """
    within, along, outside = Parts.of(rows.weight, basis, rows.mean)
    length = within.norm(dim=1, keepdim=True)
    direction = torch.where(length > 0, within / length.clamp(min=1e-30), basis[:, 0])
    return rows._replace(weight=along + direction * torch.hypot(length, outside.norm(dim=1, keepdim=True)))


def without_mean(rows: Split) -> Split:
    """As if the mean were subtracted from the input. A bias that only cancels the mean's score goes with it."""
    p, b = rows.mean_score, rows.bias
    cancelled = torch.where(b.abs() >= p.abs(), b + p, torch.zeros_like(b))
    left = torch.where(p * b >= 0, torch.zeros_like(p), cancelled - b)
    return rows._replace(mean_score=left, mean=torch.zeros_like(rows.mean))


def longer(rows: Split, norm: float) -> Split:
    """Rows shorter than ``norm`` stretched to it."""
    factor = (norm / rows.weight.norm(dim=1).clamp(min=1e-30)).clamp(min=1)
    return rows._replace(weight=rows.weight * factor[:, None], mean_score=rows.mean_score * factor)


def unbiased(rows: Split, bias: float) -> Split:
    """Biases (less a threshold of the feature's own) below ``bias`` raised to it."""
    return rows._replace(bias=rows.bias.clamp(min=bias))


class Change(NamedTuple):
    """One thing made different: rows, and the bars (n,) that they must then pass."""

    apply: Callable[[Split], Split]
    bars: Tensor
    moves_bars: bool = False


def single_changes(basis: Tensor, typical: Typical, bars: Tensor, centred_bars: Tensor | None) -> dict[str, Change]:
    """One change a cause, in the order in which they are made together.

    ``centred_bars`` are the bars that competing features set when the mean is subtracted for all of them; None leaves
    that change out.
    """
    changes: dict[str, Change] = {}
    if centred_bars is not None:
        changes["mean"] = Change(without_mean, centred_bars, moves_bars=True)
    changes["outside"] = Change(lambda rows: inside(rows, basis), bars)
    changes["norm"] = Change(lambda rows: longer(rows, typical.norm), bars)
    changes["bias"] = Change(lambda rows: unbiased(rows, typical.bias), bars)
    return changes


def together(parts: Sequence[Change]) -> Change:
    """Several changes at once; the bars are those of the one that moves them."""

    def apply(rows: Split) -> Split:
        for part in parts:
            rows = part.apply(rows)
        return rows

    moved = [part.bars for part in parts if part.moves_bars]
    return Change(apply, moved[0] if moved else parts[0].bars, bool(moved))


@torch.no_grad()
def firing_counts(
    rows: Rows, inputs: Tensor, bars: Tensor, signed: bool = False, tick: Callable[[int], object] | None = None
) -> Tensor:
    """(n,) contests that each row would win alone, by inputs (n_contests, d_in) and the bars of the other features."""
    counts = torch.zeros(len(rows.bias), dtype=torch.int64, device=rows.bias.device)
    for block in _blocks(len(rows.bias), len(bars)):
        wins = rows.at(block).scores(inputs, signed) > bars[:, None]
        counts[block] = wins.sum(dim=0)
        if tick is not None:
            tick(len(counts[block]))
    return counts


@torch.no_grad()
def highest_expected(rows: Rows, inputs: Tensor, bars: Tensor, n_contests: float, signed: bool = False) -> Tensor:
    """(n,) the margin (score less bar) that each row passes about once in ``n_contests``, from a sample of them.

    Peaks over threshold: near their end most tails fall off exponentially, at the mean excess over a high threshold.
    """
    n = min(len(bars), _TAIL)
    expected = torch.zeros_like(rows.bias)
    for block in _blocks(len(rows.bias), len(bars)):
        highest = rows.at(block).scores(inputs, signed).sub_(bars[:, None]).topk(n, dim=0).values
        excess = highest.mean(dim=0) - highest[-1]
        expected[block] = highest[-1] + excess * math.log(max(1.0, n * n_contests / len(bars)))
    return expected


@torch.no_grad()
def nearest(rows: Rows, others: Rows, signed: bool = False) -> tuple[Tensor, Tensor]:
    """For each row the index among ``others`` of the one with the highest cosine (its size, where signed), and that."""
    best = torch.full_like(rows.bias, -1.0)
    index = torch.zeros(len(best), dtype=torch.int64, device=best.device)
    if not len(others.bias):
        return index, best
    directions = torch.nn.functional.normalize(others.weight, dim=1)
    for block in _blocks(len(best), len(directions)):
        cosines = torch.nn.functional.normalize(rows.weight[block], dim=1) @ directions.T
        best[block], index[block] = (cosines.abs() if signed else cosines).max(dim=1)
    return index, best


@torch.no_grad()
def share_outscored(rows: Rows, by: Rows, inputs: Tensor, signed: bool = False) -> Tensor:
    """(n,) share of the contests with a positive score of a row in which its partner's is higher; 1 for none."""
    shares = torch.ones_like(rows.bias)
    for block in _blocks(len(rows.bias), len(inputs)):
        own, partner = rows.at(block).scores(inputs, signed), by.at(block).scores(inputs, signed)
        enters = own > 0
        higher = (enters & (partner > own)).sum(dim=0)
        shares[block] = torch.where(enters.any(dim=0), higher / enters.sum(dim=0).clamp(min=1), 1.0)
    return shares


def _blocks(n: int, width: int) -> list[slice]:
    """Slices of at most so many rows that a (rows x width) matrix fits."""
    size = max(1, MAX_DENSE_VALUES // max(1, width))
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


def undone(parameters: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters without what was added to them."""
    return {name: value - moved[name].to(value) if name in moved else value for name, value in parameters.items()}
