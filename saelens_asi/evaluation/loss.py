"""What replacing activations by an SAE's reconstruction does to the model's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from sae_lens import SAE
from torch import Tensor

from saelens_asi.activations.hooks import HookedModel, Writer
from saelens_asi.activations.replacement import Logits, prediction_losses, replacements_at
from saelens_asi.evaluation.metrics import SAELossRecovered
from saelens_asi.evaluation.reconstruction import chunk_size
from saelens_asi.evaluation.saes import on_flat_vectors


@dataclass(frozen=True)
class Place:
    """What an SAE reads, and writes to when it stands in for it.

    Attributes:
        hook_name: of the model.
        head: index of the one head it reads, of a hook whose vectors hold heads side by side; None for all of them.
    """

    hook_name: str
    head: int | None = None

    def columns(self, d_in: int, width: int) -> slice:
        """Which columns of the hook's vectors (n, width) an SAE reads. Raises ValueError where they do not fit."""
        start = 0 if self.head is None else self.head * d_in
        if (self.head is None and d_in != width) or start + d_in > width:
            head = "" if self.head is None else f" of head {self.head}"
            raise ValueError(
                f"{self.hook_name!r} has activations of width {width}, but the SAE{head} has d_in={d_in}: check "
                "hook_name, and that it is the model that the SAE was trained on"
            )
        return slice(start, start + d_in)


@torch.no_grad()
def sae_losses_recovered(
    model: HookedModel,
    saes: Mapping[str, tuple[SAE, Place]],
    tokens: Tensor,
    *,
    replaced: Tensor,
    predicted: Tensor | None = None,
    batch_size: int = 8,
) -> dict[str, SAELossRecovered]:
    """Next-token predictions of a model with each of some SAEs in place, one at a time.

    A batch costs one forward pass, one more for each SAE, and one for each place that is zero-ablated.

    Args:
        model: a HookedTransformer or TransformerBridge.
        saes: SAEs of SAELens by name, each with its place.
        tokens: (n_windows, n_positions) token ids.
        replaced: (n_windows, n_positions) bool, where activations are replaced; elsewhere they stay.
        predicted: (n_windows, n_positions - 1) bool, which next tokens count; all unless told.
        batch_size: windows in one forward pass.
    """
    zero: dict[tuple[Place, int], str] = {}
    changed: dict[str, Logits] = {}
    for name, (sae, place) in saes.items():
        functions: dict[str, Writer] = {f"reconstructed {name}": reconstructing(sae, place)}
        spot = (place, sae.cfg.d_in)
        if spot not in zero:
            zero[spot] = f"zero {name}"
            functions[zero[spot]] = zeroing(sae, place)
        changed |= replacements_at(model, place.hook_name, functions, replaced)
    with ExitStack() as stack:
        for sae, _ in saes.values():
            stack.enter_context(on_flat_vectors(sae))
        losses = prediction_losses(model, tokens, changed, predicted=predicted, batch_size=batch_size)
    n_tokens = tokens[:, 1:].numel() if predicted is None else int(predicted.sum())
    named = {
        name: {
            "clean": losses["clean"],
            "zero": losses[zero[place, sae.cfg.d_in]],
            "reconstructed": losses[f"reconstructed {name}"],
        }
        for name, (sae, place) in saes.items()
    }
    return {name: SAELossRecovered.of(own, n_tokens) for name, own in named.items()}


def reconstructing(sae: SAE, place: Place) -> Writer:
    """From (n, width) activations of the place's hook to the same with the SAE's reconstruction of what it reads."""

    def reconstruct(vectors: Tensor) -> Tensor:
        parts = vectors.to(getattr(sae, "device", vectors.device)).split(chunk_size(sae))
        return torch.cat([sae.decode(sae.encode(x)) for x in parts]).to(vectors)

    return _at_columns(sae, place, reconstruct)


def zeroing(sae: SAE, place: Place) -> Writer:
    """From (n, width) activations of the place's hook to the same with zeros where the SAE reads."""
    return _at_columns(sae, place, torch.zeros_like)


def _at_columns(sae: SAE, place: Place, function: Writer) -> Writer:
    """``function`` of the columns that the SAE reads; the others stay."""

    def write(vectors: Tensor) -> Tensor:
        columns = place.columns(sae.cfg.d_in, vectors.shape[1])
        output = vectors.clone()
        output[:, columns] = function(vectors[:, columns]).to(vectors)
        return output

    return write


def sae_loss_recovered(
    model: HookedModel, sae: SAE, tokens: Tensor, hook_name: str, batch_size: int = 8
) -> SAELossRecovered:
    """Next-token predictions of a TransformerLens model with and without the SAE at ``hook_name``.

    The first position (BOS) is left as it is, also in the zero ablation: SAEs are not trained on it. For what the top
    principal components recover instead of an SAE, see ``saelens_asi.loss_recovered``.

    Args:
        model: a HookedTransformer or TransformerBridge.
        sae: any SAELens SAE for that hook.
        tokens: (n_windows, n_positions) token ids.
        hook_name: where the SAE goes.
        batch_size: windows in one forward pass.
    """
    replaced = torch.ones_like(tokens, dtype=torch.bool)
    replaced[:, 0] = False
    saes = {"": (sae, Place(hook_name))}
    return sae_losses_recovered(model, saes, tokens, replaced=replaced, batch_size=batch_size)[""]
