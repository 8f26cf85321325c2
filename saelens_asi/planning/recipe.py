"""What the plan recommends, and what its figures are of: one way to train, for every size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from saelens_asi.initialization import ActiveSubspaceInit
from saelens_asi.sweep.cells import Cell

# The rate at 8,192 features; it falls with the root of their number (as Gao et al. 2024, arXiv 2406.04093, found too).
RATE, RATE_AT, RATE_EXPONENT, HIGHEST_RATE = 1e-3, 8192, -0.5, 2e-3


def learning_rate(d_sae: int) -> float:
    """Of ``d_sae`` features, in batches of 1,024; two digits."""
    return min(HIGHEST_RATE, float(f"{RATE * (d_sae / RATE_AT) ** RATE_EXPONENT:.2g}"))


@dataclass(frozen=True, kw_only=True)
class KnownCell(Cell):
    """A cell whose spectrum has been measured before.

    Attributes:
        spectrum: file of ``Spectrum.save``; None for an estimate of its own.
    """

    spectrum: str | None = None

    def initializer_settings(self) -> ActiveSubspaceInit | None:
        settings = super().initializer_settings()
        return None if settings is None else replace(settings, spectrum=self.spectrum)


def recommended(d_sae: int, k: int, spectrum: str | Path | None = None) -> KnownCell:
    """TopK with the initializer and SparseAdam, their defaults, and no auxiliary loss."""
    known = None if spectrum is None else str(spectrum)
    return KnownCell(d_sae=d_sae, k=k, lr=learning_rate(d_sae), spectrum=known)
