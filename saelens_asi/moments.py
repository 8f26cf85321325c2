"""Mean and covariance of a stream of vectors, in float64 and O(d^2) memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningMoments:
    """Count, mean and scatter matrix of the vectors seen so far.

    Batches are merged with the pairwise formula of Chan, Golub and LeVeque (1979): each batch is centred on
    its own mean before it is squared, so a mean far from zero costs no precision, and neither the batch
    size nor the order changes the result beyond rounding in float64.

    Attributes:
        n_tokens: number of vectors seen.
        mean: (d,) float64.
        scatter: (d, d) float64, the sum of (x - mean)(x - mean)^T, activation units squared.
    """

    n_tokens: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def zeros(cls, d: int, device: torch.device | str = "cpu") -> RunningMoments:
        """Empty moments for vectors of width ``d``."""
        device = torch.device(device)
        if device.type == "mps":  # has no float64
            device = torch.device("cpu")
        return cls(
            0,
            torch.zeros(d, dtype=torch.float64, device=device),
            torch.zeros(d, d, dtype=torch.float64, device=device),
        )

    @property
    def d(self) -> int:
        return self.mean.shape[0]

    def update_(self, x: Tensor) -> RunningMoments:
        """Add a batch of shape (..., d). Raises ValueError on another width or on values that are not finite."""
        if x.shape[-1] != self.d:
            raise ValueError(f"activations have width {x.shape[-1]}, but these moments were made for width {self.d}")
        x = x.detach().reshape(-1, self.d).to(self.mean.device, torch.float64)
        if x.shape[0] == 0:
            return self
        mean = x.mean(dim=0)
        if not torch.isfinite(mean).all():
            raise ValueError(
                f"activations {self.n_tokens} to {self.n_tokens + x.shape[0]} of the stream contain NaN or infinity: "
                "run the model in a wider dtype (bfloat16 or float32), or leave those positions out"
            )
        x = x - mean
        self._merge_(x.shape[0], mean, x.T @ x)
        return self

    def merge_(self, other: RunningMoments) -> RunningMoments:
        """Add the vectors that ``other`` has seen, as if they had been seen here."""
        if other.d != self.d:
            raise ValueError(f"cannot merge moments of width {other.d} into moments of width {self.d}")
        if other.n_tokens:
            self._merge_(other.n_tokens, other.mean.to(self.mean), other.scatter.to(self.scatter))
        return self

    def _merge_(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.n_tokens + n
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.n_tokens * n / total)
        self.mean += delta * (n / total)
        self.n_tokens = total

    def covariance(self) -> Tensor:
        """Bessel-corrected covariance, (d, d) float64, activation units squared."""
        if self.n_tokens < 2:
            raise ValueError(f"a covariance needs at least 2 tokens, got {self.n_tokens}")
        return self.scatter / (self.n_tokens - 1)
