"""What the initialization sees of a training SAE of SAELens, of whichever architecture."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class FreshSAE(Protocol):
    """What is used of a SAELens training SAE, of whichever architecture."""

    W_dec: Tensor
    W_enc: Tensor
    b_dec: Tensor
    activation_fn: nn.Module

    @property
    def cfg(self) -> Any: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor) -> Tensor: ...


def check_fresh(sae: FreshSAE) -> None:
    """Raise ValueError for an SAE that was trained or loaded: an initialization would overwrite it."""
    if bool(sae.b_dec.any()):
        raise ValueError(
            "initializer='active_subspace' would overwrite this SAE's weights, which are not freshly initialised "
            "(b_dec is not zero): set initializer='default' to train them on, or pass a new SAE"
        )


def is_tied(sae: FreshSAE) -> bool:
    return not isinstance(getattr(sae, "W_enc", None), nn.Parameter)


def rescale_rows_(sae: FreshSAE, factor: float) -> None:
    sae.W_dec.data.mul_(factor)
    if not is_tied(sae):
        sae.W_enc.data.mul_(factor)
        for name in shifted_biases(sae):
            getattr(sae, name).data.mul_(factor)


def shifted_biases(sae: FreshSAE) -> list[str]:
    """Encoder biases that stand in for the centring of the input where SAELens does not subtract b_dec."""
    if sae.cfg.apply_b_dec_to_input:
        return []
    return [name for name in ("b_enc", "b_gate", "b_mag") if isinstance(getattr(sae, name, None), nn.Parameter)]
