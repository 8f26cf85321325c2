"""What the covariance of activations says about their dimension."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from saelens_asi.moments import RunningMoments

FILE_FORMAT = "saelens_asi.spectrum.v1"

# Directions whose singular value is below this share of the largest are rounding noise of float32 activations.
_RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Principal components of mean-centred activations (arXiv 2508.16929 v1, section 4.1; v3, definition 4.1).

    Attributes:
        mean: (d,) float64, activation units.
        covariance: (d, d) float64, Bessel-corrected, activation units squared.
        n_tokens: number of activation vectors behind it.
    """

    mean: Tensor
    covariance: Tensor
    n_tokens: int

    @classmethod
    def from_moments(cls, moments: RunningMoments) -> Spectrum:
        return cls(moments.mean.clone(), moments.covariance(), moments.n_tokens)

    @property
    def d(self) -> int:
        return self.mean.shape[0]

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        eigenvalues, eigenvectors = torch.linalg.eigh(self.covariance)
        return eigenvalues.flip(0).clamp(min=0), eigenvectors.flip(1)

    @property
    def variances(self) -> Tensor:
        """(d,) variances along the principal directions, largest first."""
        return self._eigh[0]

    @property
    def singular_values(self) -> Tensor:
        """(d,) singular values of the centred n_tokens x d activation matrix, largest first."""
        return (self.variances * (self.n_tokens - 1)).sqrt()

    @property
    def total_variance(self) -> float:
        """E|x - E x|^2."""
        return float(self.covariance.trace())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values scaled to sum 1 (Roy and Vetterli 2007; at most d)."""
        s = self.variances.sqrt()
        p = s / s.sum()
        return float(torch.exp(-torch.special.xlogy(p, p).sum()))

    @property
    def rank(self) -> int:
        """Number of singular values above 1e-6 of the largest: what the sample can tell apart from rounding."""
        s = self.variances.sqrt()
        return min(int((s > _RANK_TOLERANCE * s[0]).sum()), self.n_tokens - 1)

    def variance_explained(self, k: int) -> float:
        """Share of the total variance inside the top ``k`` principal directions."""
        return float(self.variances[:k].sum() / self.variances.sum())

    def intrinsic_dimension(self, tau: float = 0.99) -> int:
        """Smallest k whose top-k directions hold a share ``tau`` of the variance."""
        if not 0 < tau <= 1:
            raise ValueError(f"tau={tau} must lie in (0, 1]")
        share = self.variances.cumsum(0) / self.variances.sum()
        return min(int((share < tau).sum()) + 1, self.d)

    def principal_directions(self, k: int) -> Tensor:
        """(d, k) orthonormal columns: the top ``k`` right singular vectors of the centred activations."""
        if not 1 <= k <= self.d:
            raise ValueError(f"k={k} must lie between 1 and d={self.d}")
        return self._eigh[1][:, :k]

    def to(self, device: torch.device | str) -> Spectrum:
        return Spectrum(self.mean.to(device), self.covariance.to(device), self.n_tokens)

    def scaled(self, factor: float) -> Spectrum:
        """The spectrum of the activations times ``factor``."""
        return Spectrum(self.mean * factor, self.covariance * factor**2, self.n_tokens)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with mean, covariance and token count; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean.cpu().contiguous(), "covariance": self.covariance.cpu().contiguous()}
        save_file(tensors, path, metadata={"format": FILE_FORMAT, "spectrum": json.dumps({"n_tokens": self.n_tokens})})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Spectrum:
        """Read a file that ``save`` wrote. Raises ValueError when the file holds something else."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FILE_FORMAT:
                raise ValueError(
                    f"{path} is not a spectrum file: format {metadata.get('format')!r}, expected {FILE_FORMAT!r}"
                )
            n_tokens = int(json.loads(metadata["spectrum"])["n_tokens"])
            return cls(file.get_tensor("mean"), file.get_tensor("covariance"), n_tokens)
