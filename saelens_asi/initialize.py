"""Write an active-subspace initialization into an SAE, in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saelens_asi.active_subspace import ActiveSubspaceInit, random_directions_, subspace_basis
from saelens_asi.spectra.spectrum import Spectrum

# Activations that the least-squares norm is fitted on; the norm moves by less than 1 % beyond it.
NORM_SAMPLE = 1024

# Values of a dense (tokens x d_sae) pre-activation matrix made at a time while fitting the norm.
_MAX_DENSE_VALUES = 2**26
_MAX_NORM_STEPS = 8


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


@torch.no_grad()
def initialize_(
    sae: Any,
    settings: ActiveSubspaceInit,
    spectrum: Spectrum,
    sample: Tensor,
    fit_activation_fn: nn.Module | None = None,
) -> Initialization:
    """Initialize ``W_dec``, ``W_enc`` and the biases of a freshly made training SAE.

    Args:
        sae: any SAELens training SAE: ``W_dec`` (d_sae, d_in), ``W_enc`` (d_in, d_sae) unless tied, ``b_dec`` (d_in,).
        settings: what to do.
        spectrum: of the activations in the space that the encoder sees.
        sample: (n, d_in) activations as the SAE's ``encode`` takes them.
        fit_activation_fn: takes the place of the SAE's own activation function while the norm is fitted.

    Raises:
        ValueError: for weights that are not fresh, or settings that do not suit the SAE or the spectrum.
    """
    check_fresh(sae)
    norm = _fixed_norm(sae, settings)
    _check_center(sae, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    basis = subspace_basis(settings, spectrum, generator)
    d_in = spectrum.d
    directions = torch.empty(sae.W_dec.shape, dtype=torch.float32, device="cpu")
    random_directions_(directions, basis, generator)
    sae.W_dec.data.copy_(directions)
    del directions
    _tie_encoder_(sae)
    _set_center_(sae, spectrum.mean if settings.center == "mean" else torch.zeros_like(spectrum.mean))
    if norm is None:
        with _activation_fn_replaced(sae, fit_activation_fn):
            norm = _least_squares_norm_(sae, sample)
    else:
        _rescale_rows_(sae, norm)

    inside = spectrum.covariance if basis is None else basis.T @ spectrum.covariance.to(basis) @ basis
    return Initialization(
        d_init=d_in if basis is None else basis.shape[1],
        variance_explained=float(inside.trace()) / spectrum.total_variance,
        norm=norm,
        initial_nmse=_normalized_mse(sae, sample),
    )


def check_fresh(sae: Any) -> None:
    """Raise ValueError for an SAE that was trained or loaded: an initialization would overwrite it."""
    if bool(sae.b_dec.any()):
        raise ValueError(
            "initializer='active_subspace' would overwrite this SAE's weights, which are not freshly initialised "
            "(b_dec is not zero): set initializer='default' to train them on, or pass a new SAE"
        )


def _check_center(sae: Any, settings: ActiveSubspaceInit) -> None:
    if settings.center == "mean" and not sae.cfg.apply_b_dec_to_input and not _shifted_biases(sae):
        raise ValueError(
            f"center='mean' needs apply_b_dec_to_input=True for {type(sae).__name__}, which has no encoder bias that "
            "could take its place: set that, or center='zeros'"
        )


def _is_tied(sae: Any) -> bool:
    return not isinstance(getattr(sae, "W_enc", None), nn.Parameter)


def _fixed_norm(sae: Any, settings: ActiveSubspaceInit) -> float | None:
    """The norm where it is known beforehand; None where it is to be fitted."""
    own_norm = sae.cfg.decoder_init_norm
    if _is_tied(sae):  # matching pursuit projects on the rows themselves: only unit rows make sense
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


def _tie_encoder_(sae: Any) -> None:
    if not _is_tied(sae):
        sae.W_enc.data.copy_(sae.W_dec.data.T)


def _rescale_rows_(sae: Any, factor: float) -> None:
    sae.W_dec.data.mul_(factor)
    if not _is_tied(sae):
        sae.W_enc.data.mul_(factor)
        for name in _shifted_biases(sae):
            getattr(sae, name).data.mul_(factor)


def _shifted_biases(sae: Any) -> list[str]:
    """Encoder biases that stand in for the centring of the input where SAELens does not subtract b_dec."""
    if sae.cfg.apply_b_dec_to_input:
        return []
    return [name for name in ("b_enc", "b_gate", "b_mag") if isinstance(getattr(sae, name, None), nn.Parameter)]


def _set_center_(sae: Any, center: Tensor) -> None:
    """Put the decoder bias at ``center``, and make the encoder see activations relative to it."""
    sae.b_dec.data.copy_(center)
    if not sae.cfg.apply_b_dec_to_input and bool(center.any()):
        shift = sae.b_dec.data @ sae.W_enc.data
        for name in _shifted_biases(sae):
            getattr(sae, name).data.copy_(-shift)


@contextmanager
def _activation_fn_replaced(sae: Any, activation_fn: nn.Module | None) -> Iterator[None]:
    if activation_fn is None:
        yield
        return
    own = sae.activation_fn
    sae.activation_fn = activation_fn
    try:
        yield
    finally:
        sae.activation_fn = own


def _least_squares_norm_(sae: Any, sample: Tensor) -> float:
    """Scale unit rows to the norm with the lowest reconstruction error on ``sample``; returns it.

    With tied rows of norm c the reconstruction is b + c^2 r, r the one at unit norm, as long as the same features
    are selected: c^2 = <x - b, r> / <r, r>. Where selection depends on the scale (JumpReLU's threshold) the same
    step is repeated from the new norm until it settles.
    """
    norm = 1.0
    for _ in range(_MAX_NORM_STEPS):
        target_dot, square = 0.0, 0.0
        for x, reconstruction, offset in _reconstructions(sae, sample):
            r = (reconstruction - offset) / norm**2
            target_dot += float(((x - offset) * r).sum())
            square += float(r.square().sum())
        if square == 0:
            raise ValueError(
                "norm='least_squares' found no reconstruction to scale: no feature fires on the sample at norm "
                f"{norm:.3g}. Give norm a number, or check the activation function's threshold"
            )
        if target_dot <= 0:
            raise ValueError(
                f"norm='least_squares' found a reconstruction at norm {norm:.3g} that points away from the activations "
                "(no scale of it lowers the error): give norm a number, or check what the SAE's decoder adds"
            )
        factor = (target_dot / square) ** 0.5 / norm
        _rescale_rows_(sae, factor)
        norm *= factor
        if abs(factor - 1) < 1e-3:
            break
    return norm


def _normalized_mse(sae: Any, sample: Tensor) -> float:
    error, variance = 0.0, float((sample.double() - sample.double().mean(dim=0)).square().sum())
    for x, reconstruction, _ in _reconstructions(sae, sample):
        error += float((x - reconstruction).square().sum())
    return error / variance


def _reconstructions(sae: Any, sample: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Input, reconstruction, and what the SAE puts out when no feature fires; float32, a few rows at a time."""
    rows = max(1, _MAX_DENSE_VALUES // sae.cfg.d_sae)
    for x in sample.split(rows):
        acts = sae.encode(x)
        acts = acts.to_dense() if acts.is_sparse else acts
        statistics = {name: vars(sae)[name] for name in ("ln_mu", "ln_std", "x_norm_coeff") if name in vars(sae)}
        reconstruction = sae.decode(acts)
        vars(sae).update(statistics)  # decode() uses up the per-token statistics that encode() left
        offset = sae.decode(torch.zeros_like(acts))
        yield x.float(), reconstruction.float(), offset.float()
