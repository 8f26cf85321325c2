"""What the covariance of activations says about their dimension."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from saelens_asi.activations.fingerprint import changed_since_written, content_checksum
from saelens_asi.resume import load_tensors, save_tensors, tensor_metadata
from saelens_asi.spectra.moments import RunningMoments

FILE_FORMAT = "saelens_asi.spectrum.v1"

# Directions whose singular value is below this share of the largest are rounding noise of float32 activations.
_RANK_TOLERANCE = 1e-6

# A sample of this many vectors a dimension lowers the effective rank by about 1 %, for steep and flat spectra alike.
ENOUGH_TOKENS_PER_DIMENSION = 16

# A covariance may be rounded below zero, or to one side, by this share of its trace.
_ROUNDING = 1e-8

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Spectrum:
    """Principal components of mean-centred activations (arXiv 2508.16929 v1, section 4.1; v3, definition 4.1).

    Attributes:
        mean: (d,) float64, activation units.
        covariance: (d, d) float64, Bessel-corrected, activation units squared.
        n_tokens: number of activation vectors behind it.
    """

    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]
    n_tokens: int

    @classmethod
    def from_moments(cls, moments: RunningMoments) -> Spectrum:
        return cls(moments.mean.clone(), moments.covariance(), moments.n_tokens)

    @property
    def d(self) -> int:
        return self.mean.shape[0]

    @cached_property
    def _eigh(self) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
        eigenvalues, eigenvectors = torch.linalg.eigh(self.covariance)
        return eigenvalues.flip(0).clamp(min=0), eigenvectors.flip(1)

    @property
    def variances(self) -> Float64[Tensor, " d"]:
        """(d,) variances along the principal directions, largest first."""
        return self._eigh[0]

    @property
    def singular_values(self) -> Float64[Tensor, " d"]:
        """(d,) singular values of the centred n_tokens x d activation matrix, largest first."""
        return (self.variances * (self.n_tokens - 1)).sqrt()

    @property
    def relative_singular_values(self) -> Float64[Tensor, " d"]:
        """(d,) singular values over the largest (arXiv 2508.16929 v1, section 4.2)."""
        return (self.variances / self.variances[0].clamp(min=_TINY)).sqrt()

    def components_above(self, share: float = 0.05) -> int:
        """Number of singular values above ``share`` of the largest; the paper quotes 5 %."""
        if not 0 <= share < 1:
            raise ValueError(f"share={share} of the largest singular value must lie in [0, 1)")
        return int((self.relative_singular_values > share).sum())

    @property
    def total_variance(self) -> float:
        """E|x - E x|^2."""
        return float(self.covariance.trace())

    @property
    def gamma(self) -> float:
        """Length of the mean over the deviation, |E x| / sqrt(E |x - E x|^2) (arXiv 2605.31518); nan without variance.

        Where it is near 1 or above, features that look at the raw activations see little but the mean, and die: centre
        them (``ActiveSubspaceInit(center="mean")``, its default).
        """
        return float(self.mean.norm()) / self.total_variance**0.5 if self.total_variance else math.nan

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values scaled to sum 1 (Roy and Vetterli 2007); 0 where nothing varies."""
        return _effective_rank(self.variances)

    @cached_property
    def effective_rank_shift(self) -> float:
        """What this sample size does to the effective rank, as a share of it: -0.08 is 8 % too low.

        The change when n_tokens independent Gaussian vectors are drawn from this very covariance. The true rank is
        above the measured one by about as much from 2 d tokens on; by more with fewer, or where tokens depend on
        each other. O(d^3).
        """
        variances = self.variances[self.variances > 0].cpu()
        scaled = variances.sqrt()[:, None] * _wishart_factor(len(variances), self.n_tokens - 1, seed=0)
        return _effective_rank(torch.linalg.svdvals(scaled).square()) / self.effective_rank - 1

    @property
    def has_small_sample(self) -> bool:
        """Whether the sample is so small for the width that it lowers the ranks noticeably."""
        return self.n_tokens < ENOUGH_TOKENS_PER_DIMENSION * self.d

    def sample_size_warning(self) -> str | None:
        """Says how far off the ranks can be where the sample is small for the width; None where it is large."""
        if not self.has_small_sample:
            return None
        return (
            f"{self.n_tokens:,} tokens are few for width {self.d}: the effective rank of {self.effective_rank:.0f} is "
            f"at least {-self.effective_rank_shift:.1%} too low, and more where tokens depend on each other; use "
            f"{ENOUGH_TOKENS_PER_DIMENSION * self.d:,} tokens or more"
        )

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

    def principal_directions(self, k: int) -> Float64[Tensor, "d k"]:
        """(d, k) orthonormal columns: the top ``k`` right singular vectors of the centred activations."""
        if not 1 <= k <= self.d:
            raise ValueError(f"k={k} must lie between 1 and d={self.d}")
        return self._eigh[1][:, :k]

    def to_moments(self) -> RunningMoments:
        """The running moments behind it, to be updated or merged further."""
        return RunningMoments(self.n_tokens, self.mean.clone(), self.covariance * (self.n_tokens - 1))

    def merge(self, other: Spectrum) -> Spectrum:
        """The spectrum of the activations of both. Raises ValueError when the widths differ."""
        return Spectrum.from_moments(self.to_moments().merge_(other.to_moments()))

    def to(self, device: torch.device | str) -> Spectrum:
        return Spectrum(self.mean.to(device), self.covariance.to(device), self.n_tokens)

    def scaled(self, factor: float) -> Spectrum:
        """The spectrum of the activations times ``factor``."""
        return Spectrum(self.mean * factor, self.covariance * factor**2, self.n_tokens)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with mean, covariance, token count and a checksum of them; returns its path."""
        tensors = {"mean": self.mean, "covariance": self.covariance}
        about = json.dumps({"n_tokens": self.n_tokens})
        checksum = content_checksum(tensors, about)
        save_tensors(path, tensors, {"format": FILE_FORMAT, "spectrum": about, "checksum": checksum})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Spectrum:
        """Read a file that ``save`` wrote.

        Raises:
            ValueError: when the file is something else or damaged, or what it holds is no mean and covariance.
            FileNotFoundError: when it is not there.
        """
        if Path(path).is_dir():
            _refuse(path, "it is a folder")
        metadata = tensor_metadata(path)
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(
                f"{path} is not a spectrum file: format {metadata.get('format')!r}, expected {FILE_FORMAT!r}"
            )
        tensors = load_tensors(path)
        changed = changed_since_written(metadata, tensors, "spectrum")
        if changed:
            _refuse(path, changed)
        try:
            n_tokens = json.loads(metadata.get("spectrum", ""))["n_tokens"]
        except (ValueError, KeyError, TypeError):
            n_tokens = None
        wrong = _not_moments(tensors, n_tokens)
        if wrong:
            _refuse(path, wrong)
        return cls(tensors["mean"], tensors["covariance"], int(n_tokens))


def _refuse(path: str | Path, reason: str) -> NoReturn:
    raise ValueError(f"the spectrum file {path} cannot be used: {reason}. Measure the spectrum again")


def _not_moments(tensors: Mapping[str, Tensor], n_tokens: object) -> str:
    """Why these are no mean, covariance and number of tokens; empty where they are."""
    if tensors.keys() != {"mean", "covariance"}:
        return f"it holds {sorted(tensors)}, not mean and covariance"
    if type(n_tokens) is not int or n_tokens < 2:
        return f"its number of tokens, {n_tokens!r}, is no number from 2 on"
    mean, covariance = tensors["mean"], tensors["covariance"]
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        return f"mean and covariance have the shapes {tuple(mean.shape)} and {tuple(covariance.shape)}"
    if mean.dtype != torch.float64 or covariance.dtype != torch.float64:
        return f"mean and covariance are {mean.dtype} and {covariance.dtype}, not float64"
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        return "it holds NaN or infinity"
    allowed = _ROUNDING * float(covariance.diagonal().abs().sum())
    if float((covariance - covariance.T).abs().max()) > allowed:
        return "its covariance is not symmetric"
    # Of a positive semi-definite matrix, a little added to the diagonal makes one that has a Cholesky factor.
    shifted = covariance + allowed * torch.eye(len(mean), dtype=torch.float64)
    if allowed and int(torch.linalg.cholesky_ex(shifted).info):
        return "its covariance has negative eigenvalues"
    return ""


def principal_angles(first: Spectrum, second: Spectrum, k: int) -> Float64[Tensor, " k"]:
    """(k,) angles in radians between the top-``k`` principal subspaces of two spectra, smallest first.

    Small angles come from sines and large ones from cosines, each where it is accurate (Bjorck and Golub 1973).
    """
    if first.d != second.d:
        raise ValueError(f"spectra of widths {first.d} and {second.d} share no space to measure angles in")
    a, b = first.principal_directions(k), second.principal_directions(k).to(first.mean.device)
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).flip(0)
    return torch.where(cosines > math.sqrt(0.5), sines.asin(), cosines.acos())


def _effective_rank(variances: Float64[Tensor, " d"]) -> float:
    s = variances.sqrt()
    p = s / s.sum().clamp(min=_TINY)
    return float(torch.exp(-torch.special.xlogy(p, p).sum())) if bool(p.any()) else 0.0


def _wishart_factor(d: int, n: int, seed: int) -> Float64[Tensor, "{d} width"]:
    """Lower (d, min(d, n)) factor L of a draw L L^T from the Wishart distribution over n (Bartlett 1933)."""
    generator = np.random.default_rng(seed)
    width = min(d, n)
    lower = torch.from_numpy(generator.standard_normal((d, width))).tril(-1)
    lower.diagonal().copy_(torch.from_numpy(generator.chisquare(n - np.arange(width))).sqrt())
    return lower / math.sqrt(n)
