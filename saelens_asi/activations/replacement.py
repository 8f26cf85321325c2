"""What replacing the activations at one hook does to a model's next-token predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from saelens_asi.activations.hooks import HookedModel, Writer, device_of, hook_points, logits_with

Logits = Callable[[Tensor, slice], Tensor]


class Predictions(NamedTuple):
    """Next-token predictions, in nats a token.

    Attributes:
        cross_entropy: with the text.
        kl: divergence KL(clean || these) from the predictions of the model as it is.
    """

    cross_entropy: float
    kl: float


@torch.no_grad()
def replacement_losses(
    model: HookedModel,
    tokens: Tensor,
    hook_name: str,
    replacements: Mapping[str, Writer],
    *,
    replaced: Tensor,
    predicted: Tensor | None = None,
    batch_size: int = 8,
) -> dict[str, Predictions]:
    """Predictions with each replacement in place, and as ``"clean"`` those of the model as it is.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: (n_windows, n_positions) token ids.
        hook_name: which activations are replaced.
        replacements: from a name to a function of (n, width) activations, one vector a token, to others.
        replaced: (n_windows, n_positions) bool, where they are replaced; elsewhere they stay.
        predicted: (n_windows, n_positions - 1) bool, which next tokens count; all unless told.
        batch_size: windows in a forward pass.
    """
    changed = replacements_at(model, hook_name, replacements, replaced)
    return prediction_losses(model, tokens, changed, predicted=predicted, batch_size=batch_size)


def replacements_at(
    model: HookedModel, hook_name: str, replacements: Mapping[str, Writer], replaced: Tensor
) -> dict[str, Logits]:
    """Replacements as in ``replacement_losses``, as ``prediction_losses`` takes them."""
    (point,) = hook_points(model, [hook_name]).values()

    def replacing(function: Writer) -> Logits:
        return lambda batch, place: logits_with(model, batch, point, _only_at(replaced[place], function))

    return {name: replacing(function) for name, function in replacements.items()}


@torch.no_grad()
def prediction_losses(
    model: HookedModel,
    tokens: Tensor,
    changed: Mapping[str, Logits],
    *,
    predicted: Tensor | None = None,
    batch_size: int = 8,
) -> dict[str, Predictions]:
    """Predictions of a model that is changed in some ways, and as ``"clean"`` those of the model as it is.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: (n_windows, n_positions) token ids.
        changed: from a name to a function of a batch of windows, and its place among them, to the logits.
        predicted: (n_windows, n_positions - 1) bool, which next tokens count; all unless told.
        batch_size: windows in a forward pass.
    """
    predicted = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if predicted is None else predicted
    n_predicted = int(predicted.sum())
    if not n_predicted:
        raise ValueError("no next token is left to predict: give longer windows, or leave out fewer tokens")
    device = device_of(model)
    sums = {name: [0.0, 0.0] for name in ("clean", *changed)}
    for start in range(0, len(tokens), batch_size):
        place = slice(start, start + batch_size)
        batch, counted = tokens[place].to(device), predicted[place].to(device)
        targets = batch[:, 1:][counted]
        clean = _log_probabilities(logits_with(model, batch), counted)
        sums["clean"][0] += float(nll_loss(clean, targets, reduction="sum"))
        for name, logits in changed.items():
            changed_ones = _log_probabilities(logits(batch, place), counted)
            sums[name][0] += float(nll_loss(changed_ones, targets, reduction="sum"))
            sums[name][1] += float(kl_div(changed_ones, clean, log_target=True, reduction="sum"))
    return {name: Predictions(loss / n_predicted, kl / n_predicted) for name, (loss, kl) in sums.items()}


def _log_probabilities(logits: Tensor, counted: Tensor) -> Tensor:
    """(n_counted, d_vocab) of the next tokens that count."""
    return logits[:, :-1][counted].float().log_softmax(dim=-1)


def _only_at(where: Tensor, function: Writer) -> Writer:
    def write(activations: Tensor) -> Tensor:
        chosen = where.to(activations.device)
        values = activations[chosen]
        output = activations.clone()
        output[chosen] = function(values.reshape(len(values), -1)).to(values).reshape(values.shape)
        return output

    return write


def ratio(numerator: float, denominator: float) -> float:
    """NaN where there is nothing to take a share of."""
    return numerator / denominator if denominator else float("nan")
