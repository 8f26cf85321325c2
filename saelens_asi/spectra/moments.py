"""Mean and covariance of a stream of vectors, in float64 and O(d^2) memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saelens_asi.sparse.shards import ALONE, Group

# Rows centred and multiplied at a time: large enough for the matrix product, small enough to stay in the cache.
_CHUNK = 512

# The scatter matrix is symmetric: of this many column panels, each is multiplied with itself and those after it only.
# Processes share them: how many there are must not depend on how many processes, or bits would.
_MAX_PANELS = 8
_MIN_PANEL = 96


@dataclass
class RunningMoments:
    """Count, mean and scatter matrix of the vectors seen so far.

    Vectors are centred on the mean of those before them when they are squared, and what the mean moves by is taken
    off: a mean far from zero costs no precision, and neither the batch size nor the order changes the result beyond
    rounding in float64.

    Processes that see the same vectors share the work: each keeps some panels of the scatter matrix, and ``together_``
    puts them together, to the bits of one process. Those that see other vectors are ``merged``.

    Cost of n vectors: 9/16 of the 2 n d^2 operations of a float64 matrix product, from d = 768 on. Of four processes
    that share it each does a quarter, of eight none more than two ninths.

    Attributes:
        n_tokens: number of vectors seen.
        mean: (d,) float64.
        scatter: (d, d) float64, the sum of (x - mean)(x - mean)^T, activation units squared. Where it is shared, zero
            outside of this process's panels and of the rows that mirror them.
        group: the processes that share it; one that is alone for a whole one.
    """

    n_tokens: int
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]
    group: Group = ALONE

    @classmethod
    def zeros(cls, d: int, device: torch.device | str = "cpu", group: Group = ALONE) -> RunningMoments:
        """Empty moments for vectors of width ``d``, which all processes of ``group`` see in the same batches."""
        scatter = torch.zeros(d, d, dtype=torch.float64)
        return cls(0, torch.zeros(d, dtype=torch.float64), scatter, group).to(device)

    @property
    def d(self) -> int:
        return self.mean.shape[0]

    def to(self, device: torch.device | str) -> RunningMoments:
        """The same moments on a device; on the CPU where the device has no float64 (mps)."""
        device = "cpu" if torch.device(device).type == "mps" else device
        return RunningMoments(self.n_tokens, self.mean.to(device), self.scatter.to(device), self.group)

    def update_(self, x: Float[Tensor, "... width"]) -> RunningMoments:
        """Add a batch of shape (..., d). Raises ValueError on another width or on values that are not finite."""
        if x.shape[-1] != self.d:
            raise ValueError(f"activations have width {x.shape[-1]}, but these moments were made for width {self.d}")
        x = x.detach().reshape(-1, self.d).to(self.mean.device)
        if x.shape[0] == 0:
            return self
        # A finite sum needs finite terms, and costs a quarter of looking at each; the sum itself can overflow.
        if not x.sum(dim=0, dtype=_at_least_float32(x.dtype)).isfinite().all() and not x.isfinite().all():
            raise ValueError(
                f"activations {self.n_tokens} to {self.n_tokens + x.shape[0]} of the stream contain NaN or infinity: "
                "run the model in a wider dtype (bfloat16 or float32), or leave those positions out"
            )
        # Centred on a mean that is near: that of all vectors before, or of the first chunk.
        center = self.mean if self.n_tokens else x[:_CHUNK].mean(dim=0, dtype=torch.float64)
        buffer = torch.empty(min(len(x), _CHUNK), self.d, dtype=torch.float64, device=x.device)
        total = torch.zeros_like(self.mean)
        panels = _panels_of(self.d, self.group)
        for chunk in torch.split(x, _CHUNK):
            values = torch.sub(chunk, center, out=buffer[: len(chunk)])
            total += values.sum(dim=0)
            for start, stop in panels:
                self.scatter[start:stop, start:].addmm_(values[:, start:stop].T, values[:, start:])
        # From the old centre to the new mean: total / n_tokens away, for all vectors.
        self.n_tokens += x.shape[0]
        for start, stop in panels:
            panel = self.scatter[start:stop, start:]
            panel.addr_(total[start:stop], total[start:], alpha=-1 / self.n_tokens)
            self.scatter[stop:, start:stop] = self.scatter[start:stop, stop:].T
        self.mean = center + total / self.n_tokens
        return self

    def together_(self) -> RunningMoments:
        """Put the panels of all processes together: each has the whole then, to the bit what one alone would have.

        They all call it, and one sum of d^2 numbers travels. It is exact: what is not a process's own is zero there.
        """
        self.group.sum_(self.scatter)
        self.group = ALONE
        return self

    def merged(self, group: Group) -> RunningMoments:
        """The moments of what all processes of ``group`` have seen, each other vectors or none; the same in each.

        They all call it: three sums travel, of the counts, d and d^2 numbers. As ``merge_`` of all, up to rounding.
        """
        self._check_whole("merged")
        n_tokens = int(group.sum_(torch.tensor(self.n_tokens, device=self.mean.device)))
        mean = group.sum_(self.mean * (self.n_tokens / max(1, n_tokens)))
        delta = self.mean - mean
        scatter = group.sum_(torch.addr(self.scatter, delta, delta, alpha=self.n_tokens))
        return RunningMoments(n_tokens, mean, scatter)

    def merge_(self, other: RunningMoments) -> RunningMoments:
        """Add the vectors that ``other`` has seen, as if they had been seen here (Chan, Golub and LeVeque 1979)."""
        if other.d != self.d:
            raise ValueError(f"cannot merge moments of width {other.d} into moments of width {self.d}")
        self._check_whole("merged")
        other._check_whole("merged")
        if other.n_tokens:
            delta, n_tokens = other.mean.to(self.mean) - self.mean, self.n_tokens + other.n_tokens
            self.scatter += other.scatter.to(self.scatter)
            self.scatter.addr_(delta, delta, alpha=self.n_tokens * other.n_tokens / n_tokens)
            self.mean += delta * (other.n_tokens / n_tokens)
            self.n_tokens = n_tokens
        return self

    def covariance(self) -> Float64[Tensor, "d d"]:
        """Bessel-corrected covariance, (d, d) float64, activation units squared."""
        if self.n_tokens < 2:
            raise ValueError(f"a covariance needs at least 2 tokens, got {self.n_tokens}")
        self._check_whole("read")
        return self.scatter / (self.n_tokens - 1)

    def _check_whole(self, what: str) -> None:
        if self.group.size > 1:
            raise ValueError(
                f"these moments cannot be {what}: {self.group.size} processes share them, and this one holds a part. "
                "Have all call together_() first"
            )


def _panels(d: int) -> list[tuple[int, int]]:
    """Column ranges that cover ``d``."""
    n = max(1, min(_MAX_PANELS, d // _MIN_PANEL))
    edges = [i * d // n for i in range(n + 1)]
    return list(pairwise(edges))


def _panels_of(d: int, group: Group) -> list[tuple[int, int]]:
    """Those that this process accumulates: each goes, the widest first, to the process with the least work so far."""
    own, work = [], [0] * group.size
    for start, stop in _panels(d):
        owner = work.index(min(work))
        work[owner] += (stop - start) * (d - start)
        if owner == group.rank:
            own.append((start, stop))
    return own


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
