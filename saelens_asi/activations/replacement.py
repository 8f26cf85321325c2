"""What replacing the activations at one hook does to a model's next-token predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from tqdm.auto import tqdm

from saelens_asi.activations.hooks import HookedModel, Writer, device_of, hook_points, logits_at

# From a batch of windows, its place among them, and (n_windows, n_positions) bool where logits are wanted, to these:
# (n, d_vocab).
Logits = Callable[[Tensor, slice, Tensor], Tensor]

# Logits from which probabilities are made at once: of 262,144 words those of 64 tokens, in 64 MiB.
_CHUNK = 1 << 24


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
    progress: str | None = None,
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
        progress: show a bar with this name.
    """
    changed = replacements_at(model, hook_name, replacements, replaced)
    return prediction_losses(model, tokens, changed, predicted=predicted, batch_size=batch_size, progress=progress)


def replacements_at(
    model: HookedModel, hook_name: str, replacements: Mapping[str, Writer], replaced: Tensor
) -> dict[str, Logits]:
    """Replacements as in ``replacement_losses``, as ``prediction_losses`` takes them."""
    (point,) = hook_points(model, [hook_name]).values()

    def replacing(function: Writer) -> Logits:
        return lambda batch, place, where: logits_at(model, batch, where, point, _only_at(replaced[place], function))

    return {name: replacing(function) for name, function in replacements.items()}


@torch.no_grad()
def prediction_losses(
    model: HookedModel,
    tokens: Tensor,
    changed: Mapping[str, Logits],
    *,
    predicted: Tensor | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> dict[str, Predictions]:
    """Predictions of a model that is changed in some ways, and as ``"clean"`` those of the model as it is.

    Memory: twice the logits of a batch. They are made where a next token counts, and nowhere else.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: (n_windows, n_positions) token ids.
        changed: from a name to the logits of a model that is changed so.
        predicted: (n_windows, n_positions - 1) bool, which next tokens count; all unless told.
        batch_size: windows in a forward pass.
        progress: show a bar with this name.
    """
    predicted = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if predicted is None else predicted
    n_predicted = int(predicted.sum())
    if not n_predicted:
        raise ValueError("no next token is left to predict: give longer windows, or leave out fewer tokens")
    device = device_of(model)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("clean", *changed)}
    passes = tokens.numel() * len(sums)
    with tqdm(total=passes, desc=progress, unit=" tokens", unit_scale=True, disable=progress is None) as bar:
        for start in range(0, len(tokens), batch_size):
            place = slice(start, start + batch_size)
            batch, counted = tokens[place].to(device), predicted[place].to(device)
            where = torch.cat([counted, torch.zeros_like(counted[:, :1])], dim=1)
            targets = batch[:, 1:][counted]
            clean = list(log_probabilities(logits_at(model, batch, where)))
            sums["clean"] += _summed(clean, targets)
            bar.update(batch.numel())
            for name, logits in changed.items():
                sums[name] += _summed(log_probabilities(logits(batch, place, where)), targets, clean)
                bar.update(batch.numel())
    return {name: Predictions(*(both / n_predicted).tolist()) for name, both in sums.items()}


def log_probabilities(logits: Tensor) -> Iterator[Tensor]:
    """Those of (n, d_vocab) logits, some tokens at a time: all at once would be several times the logits."""
    for rows in logits.split(_rows(logits)):
        yield rows.float().log_softmax(dim=-1)


def _rows(logits: Tensor) -> int:
    return max(1, _CHUNK // logits.shape[-1])


def _summed(parts: Iterable[Tensor], targets: Tensor, clean: Sequence[Tensor] | None = None) -> Tensor:
    """(2,) cross-entropy with the targets, and divergence from ``clean`` or 0, summed over the tokens.

    Args:
        parts: log-probabilities of some tokens at a time.
        targets: (n,) of all of them.
        clean: log-probabilities of the same parts.
    """
    sums, n = [], 0
    for i, own in enumerate(parts):
        cross_entropy = nll_loss(own, targets[n : n + len(own)], reduction="sum")
        kl = torch.zeros_like(cross_entropy)
        if clean is not None:
            kl = kl_div(own, clean[i], log_target=True, reduction="sum")
        sums.append(torch.stack([cross_entropy, kl]))
        n += len(own)
    return torch.stack(sums).cpu().double().sum(dim=0) if sums else torch.zeros(2, dtype=torch.float64)


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
