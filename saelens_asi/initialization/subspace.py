"""The subspace in which features start: its dimension, and a basis of it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from saelens_asi.initialization.settings import ActiveSubspaceInit, is_int
from saelens_asi.spectra.spectrum import Spectrum

# "auto": the least and the largest share of d_in that the subspace has, and up to how many features for each dimension
# of d_in it is the least; the share of the variance behind which there is nothing to start in, and the dimensions that
# are taken at least.
_LEAST_SHARE, _LARGEST_SHARE, _UNCROWDED = 1 / 8, 1 / 4, 14
_AUTO_VARIANCE, _AUTO_LEAST = 0.99, 16

# Share of the variance that reports and Lorsa's "auto" go by.
AUTO_VARIANCE_SHARE = 0.9


def auto_share(d_in: int, d_sae: int, over_batch: bool = False) -> float:
    """Of d_in, how many dimensions ``d_sae`` features start in where none are asked for.

    An eighth up to fourteen features for each dimension of d_in; from there on as the square root of their number, up
    to a quarter: features crowd, and die of each other. A dimension that is too low loses features, one that is too
    high error (docs/claims.md: what was tried at hooks of two models, and at four sizes).

    A quarter where features are selected over a whole batch (BatchTopK): one threshold for all tokens leaves those
    behind that crowd, and more of them the longer the run (docs/claims.md, "BatchTopK").
    """
    if over_batch:
        return _LARGEST_SHARE
    return min(_LARGEST_SHARE, _LEAST_SHARE * math.sqrt(max(1.0, d_sae / (_UNCROWDED * d_in))))


def auto_d_init(spectrum: Spectrum, d_sae: int, over_batch: bool = False) -> int:
    """Dimension of the subspace for ``d_sae`` features where none is asked for; ``over_batch``: of a BatchTopK.

    ``auto_share`` of d_in; no more than hold 99 % of the variance, but sixteen at least where the sample has them. How
    much variance they hold says little else: the tail in which features live counts for little in it.
    """
    wanted = max(_AUTO_LEAST, round(auto_share(spectrum.d, d_sae, over_batch) * spectrum.d))
    return min(wanted, spectrum.intrinsic_dimension(_AUTO_VARIANCE), max(1, spectrum.rank))


def choose_d_init(
    settings: ActiveSubspaceInit, spectrum: Spectrum, d_sae: int | None = None, over_batch: bool = False
) -> int:
    """Dimension of the subspace for activations with this spectrum, and ``d_sae`` features (``over_batch``: of a
    BatchTopK).

    ``"auto"`` without a ``d_sae`` is the smallest dimension that holds 90 % of the variance.

    Raises ValueError when it exceeds d_in, or the rank of the sample.
    """
    d_in = spectrum.d
    settings.check_width(d_in)
    if settings.subspace == "full":
        return d_in
    if settings.d_init == "auto" and d_sae is not None:
        d_init = auto_d_init(spectrum, d_sae, over_batch)
    elif settings.d_init == "auto":
        d_init = spectrum.intrinsic_dimension(AUTO_VARIANCE_SHARE)
    elif is_int(settings.d_init):
        d_init = settings.d_init
    else:
        d_init = round(float(settings.d_init) * d_in)
    if settings.subspace == "active" and d_init > spectrum.rank:
        raise ValueError(
            f"d_init={d_init} exceeds the rank {spectrum.rank} of {spectrum.n_tokens} centred activations of width "
            f"{d_in}: give more n_tokens, or a lower d_init"
        )
    return d_init


def subspace_basis(
    settings: ActiveSubspaceInit,
    spectrum: Spectrum,
    generator: torch.Generator,
    d_sae: int | None = None,
    over_batch: bool = False,
) -> Float64[Tensor, "d_in d_init"] | None:
    """(d_in, d_init) orthonormal float64 columns that span what ``choose_d_init`` asks for; None for all of d_in."""
    d_init = choose_d_init(settings, spectrum, d_sae, over_batch)
    if settings.subspace == "full":
        return None
    if settings.subspace == "random":
        gaussian = torch.randn(spectrum.d, d_init, generator=generator, dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(gaussian)[0]
        return basis
    return spectrum.principal_directions(d_init)
