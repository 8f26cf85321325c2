"""Weights of a fresh SAE by Active Subspace Initialization (arXiv 2508.16929)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelens_asi.activations.sae_state import shard_of
from saelens_asi.initialization.directions import CHUNK, random_directions_
from saelens_asi.initialization.fresh_sae import FreshSAE, check_fresh, is_tied, rescale_rows_, shifted_biases
from saelens_asi.initialization.norm import least_squares_norm_, reconstruct
from saelens_asi.initialization.settings import ActiveSubspaceInit
from saelens_asi.initialization.subspace import subspace_basis
from saelens_asi.spectra.spectrum import Spectrum


@dataclass(frozen=True)
class Initialization:
    """What an initialization did.

    Attributes:
        d_init: dimension of the subspace.
        variance_explained: share of the activations' variance inside it.
        norm: norm of the decoder rows.
        initial_nmse: E|x - x_hat|^2 / E|x - E x|^2 on the sample, in the space that the encoder sees.
    """

    d_init: int
    variance_explained: float
    norm: float
    initial_nmse: float

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def initialize_(
    sae: FreshSAE,
    settings: ActiveSubspaceInit,
    spectrum: Spectrum,
    sample: Float[Tensor, "n d_in"],
    fit_activation_fn: nn.Module | None = None,
) -> Initialization:
    """Initialize ``W_dec``, ``W_enc`` and the biases of a freshly made training SAE.

    Of an SAE whose features are spread over processes each initialises its own, as one process would: they all call
    this. Of them ``encode`` gives a process its own columns, and ``decode`` sums over all.

    Args:
        sae: any SAELens training SAE: ``W_dec`` (d_sae, d_in), ``W_enc`` (d_in, d_sae) unless tied, ``b_dec`` (d_in,).
            One with a part of the features says in ``shard`` which.
        settings: what to do.
        spectrum: of the activations in the space that the encoder sees.
        sample: (n, d_in) activations as the SAE's ``encode`` takes them.
        fit_activation_fn: of an SAE that selects features over a whole batch, what selects k for each token. It takes
            the place of the SAE's own activation function while the norm is fitted.

    Raises:
        ValueError: for weights that are not fresh, or settings that do not suit the SAE or the spectrum.
    """
    check_fresh(sae)
    norm = _fixed_norm(sae, settings)
    _check_center(sae, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    basis = subspace_basis(settings, spectrum, generator, shard_of(sae).d_sae, fit_activation_fn is not None)
    d_in = spectrum.d
    random_directions_(sae.W_dec.data, basis, generator, shard_of(sae))
    _tie_encoder_(sae)
    _set_center_(sae, spectrum.mean if settings.center == "mean" else torch.zeros_like(spectrum.mean))
    if norm is None:
        norm, error = least_squares_norm_(sae, sample, fit_activation_fn)
    else:
        rescale_rows_(sae, norm)
        error = reconstruct(sae, sample)[-1].error()
    variance = float((sample.double() - sample.double().mean(dim=0)).square().sum())

    inside = spectrum.covariance if basis is None else basis.T @ spectrum.covariance.to(basis) @ basis
    return Initialization(
        d_init=d_in if basis is None else basis.shape[1],
        variance_explained=float(inside.trace()) / spectrum.total_variance,
        norm=norm,
        initial_nmse=error / variance,
    )


def _check_center(sae: FreshSAE, settings: ActiveSubspaceInit) -> None:
    if settings.center == "mean" and not sae.cfg.apply_b_dec_to_input and not shifted_biases(sae):
        raise ValueError(
            f"center='mean' needs apply_b_dec_to_input=True for {type(sae).__name__}, which has no encoder bias that "
            "could take its place: set that, or center='zeros'"
        )


def _fixed_norm(sae: FreshSAE, settings: ActiveSubspaceInit) -> float | None:
    """The norm where it is known beforehand; None where it is to be fitted."""
    own_norm: float | None = sae.cfg.decoder_init_norm
    if is_tied(sae):  # matching pursuit projects on the rows themselves: only unit rows make sense
        if settings.norm not in ("least_squares", "decoder_init_norm", own_norm):
            raise ValueError(
                f"norm={settings.norm} does not suit {type(sae).__name__}, whose encoder is its decoder and whose rows "
                f"have norm {own_norm}: leave norm at 'least_squares'"
            )
        return own_norm
    if settings.norm == "least_squares":
        return None
    if settings.norm != "decoder_init_norm":
        return float(settings.norm)
    if own_norm is None:
        raise ValueError("norm='decoder_init_norm', but decoder_init_norm=None: give it a number, or norm a number")
    return own_norm


def _tie_encoder_(sae: FreshSAE) -> None:
    if not is_tied(sae):
        sae.W_enc.data.copy_(sae.W_dec.data.T)


def _set_center_(sae: FreshSAE, center: Tensor) -> None:
    """Put the decoder bias at ``center``, and make the encoder see activations relative to it."""
    sae.b_dec.data.copy_(center)
    if not sae.cfg.apply_b_dec_to_input and bool(center.any()):
        names = shifted_biases(sae)
        for start in range(0, len(sae.W_dec), CHUNK):
            # A sum for each feature, and no product, whose bits may depend on how many features there are.
            shift = (sae.W_dec.data[start : start + CHUNK] * sae.b_dec.data).sum(dim=1)
            for name in names:
                getattr(sae, name).data[start : start + CHUNK].copy_(-shift)
