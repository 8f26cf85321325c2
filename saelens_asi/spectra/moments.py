"""Mean and covariance of a stream of vectors, in float64 and O(d^2) memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Rows centred and multiplied at a time: large enough for the matrix product, small enough to stay in the cache.
_CHUNK = 512

# The scatter matrix is symmetric: of this many column panels, each is multiplied with itself and those after it only.
_MAX_PANELS = 4
_MIN_PANEL = 96


@dataclass
class RunningMoments:
    """Count, mean and scatter matrix of the vectors seen so far.

    Vectors are centred on the mean of those before them when they are squared, and what the mean moves by is taken
    off: a mean far from zero costs no precision, and neither the batch size nor the order changes the result beyond
    rounding in float64.

    Cost of n vectors: 5/8 of the 2 n d^2 operations of a float64 matrix product, from d = 384 on.

    Attributes:
        n_tokens: number of vectors seen.
        mean: (d,) float64.
        scatter: (d, d) float64, the sum of (x - mean)(x - mean)^T, activation units squared.
    """

    n_tokens: int
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]

    @classmethod
    def zeros(cls, d: int, device: torch.device | str = "cpu") -> RunningMoments:
        """Empty moments for vectors of width ``d``."""
        return cls(0, torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)).to(device)

    @property
    def d(self) -> int:
        return self.mean.shape[0]

    def to(self, device: torch.device | str) -> RunningMoments:
        """The same moments on a device; on the CPU where the device has no float64 (mps)."""
        device = "cpu" if torch.device(device).type == "mps" else device
        return RunningMoments(self.n_tokens, self.mean.to(device), self.scatter.to(device))

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
        for chunk in torch.split(x, _CHUNK):
            values = torch.sub(chunk, center, out=buffer[: len(chunk)])
            total += values.sum(dim=0)
            for start, stop in _panels(self.d):
                self.scatter[start:stop, start:].addmm_(values[:, start:stop].T, values[:, start:])
        for start, stop in _panels(self.d):
            self.scatter[stop:, start:stop] = self.scatter[start:stop, stop:].T
        # From the old centre to the new mean: total / n_tokens away, for all vectors.
        self.n_tokens += x.shape[0]
        self.scatter.addr_(total, total, alpha=-1 / self.n_tokens)
        self.mean = center + total / self.n_tokens
        return self

    def merge_(self, other: RunningMoments) -> RunningMoments:
        """Add the vectors that ``other`` has seen, as if they had been seen here (Chan, Golub and LeVeque 1979)."""
        if other.d != self.d:
            raise ValueError(f"cannot merge moments of width {other.d} into moments of width {self.d}")
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
        return self.scatter / (self.n_tokens - 1)


def _panels(d: int) -> list[tuple[int, int]]:
    """Column ranges that cover ``d``."""
    n = max(1, min(_MAX_PANELS, d // _MIN_PANEL))
    edges = [i * d // n for i in range(n + 1)]
    return list(pairwise(edges))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
