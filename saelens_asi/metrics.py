"""How good an SAE is: dead features by tokens, normalized error, loss recovered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saelens_asi.ablation import Predictions, replacement_losses
from saelens_asi.hooks import Writer

# Values of a dense (tokens x d_sae) activation matrix made at a time.
_MAX_DENSE_VALUES = 2**25


@dataclass(frozen=True)
class ReconstructionMetrics:
    """How an SAE reconstructs activations it was not trained on.

    Attributes:
        n_tokens: activation vectors evaluated.
        dead_fraction: share of the features that fire on none of them (arXiv 2508.16929 counts over 10M tokens).
        nmse: E|x - x_hat|^2 / E|x - E x|^2.
        l0: mean number of features that fire on a token.
    """

    n_tokens: int
    dead_fraction: float
    nmse: float
    l0: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def reconstruction_metrics(sae: Any, batches: Iterable[Tensor]) -> ReconstructionMetrics:
    """Evaluate any SAELens SAE on batches of (n, d_in) activations."""
    d_sae = sae.cfg.d_sae
    fired = torch.zeros(d_sae, dtype=torch.bool, device=sae.device)
    n_tokens, n_active, error = 0, 0, 0.0
    total = torch.zeros(sae.cfg.d_in, dtype=torch.float64, device=sae.device)
    square = 0.0
    for x, acts in _encoded(sae, batches):
        error += float((x.double() - sae.decode(acts).double()).square().sum())
        active = acts != 0
        fired |= active.any(dim=0)
        n_active += int(active.sum())
        n_tokens += x.shape[0]
        total += x.double().sum(dim=0)
        square += float(x.double().square().sum())
    if n_tokens < 2:
        raise ValueError(f"an evaluation needs at least 2 activations, got {n_tokens}")
    variance = square - float(total.square().sum()) / n_tokens
    return ReconstructionMetrics(n_tokens, 1 - int(fired.sum()) / d_sae, error / variance, n_active / n_tokens)


@torch.no_grad()
def firing_rates(sae: Any, batches: Iterable[Tensor]) -> Tensor:
    """(d_sae,) share of tokens on which each feature fires."""
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.device)
    n_tokens = 0
    for x, acts in _encoded(sae, batches):
        counts += (acts != 0).sum(dim=0)
        n_tokens += x.shape[0]
    return (counts.double() / n_tokens).float().cpu()


def _encoded(sae: Any, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations and their dense feature activations, as many tokens at a time as memory should hold."""
    for batch in batches:
        for x in batch.to(sae.device).split(max(1, _MAX_DENSE_VALUES // sae.cfg.d_sae)):
            acts = sae.encode(x)
            yield x, acts.to_dense() if acts.is_sparse else acts


@dataclass(frozen=True)
class SAELossRecovered:
    """What replacing a hook's activations by their reconstruction does to the model's predictions, in nats a token.

    Attributes:
        clean: next-token cross-entropy of the model as it is.
        zero: with the hook zero-ablated.
        reconstructed: with the SAE's reconstruction in place of the activations.
        kl_zero: divergence KL(clean || ablated) of the next-token distributions, hook zero-ablated.
        kl_reconstructed: the same with the SAE's reconstruction.
        n_tokens: tokens predicted.
    """

    clean: float
    zero: float
    reconstructed: float
    kl_zero: float
    kl_reconstructed: float
    n_tokens: int

    @property
    def recovered(self) -> float:
        """(zero - reconstructed) / (zero - clean) of the cross-entropies.

        Can exceed 1: where a layer's output harms the predictions on this text, a worse reconstruction lowers the
        loss. ``kl_recovered`` cannot.
        """
        return (self.zero - self.reconstructed) / (self.zero - self.clean)

    @property
    def kl_recovered(self) -> float:
        """1 - kl_reconstructed / kl_zero: 1 where the predictions are those of the model as it is."""
        return 1 - self.kl_reconstructed / self.kl_zero

    @classmethod
    def of(cls, losses: Mapping[str, Predictions], n_tokens: int) -> SAELossRecovered:
        """From the losses named ``clean``, ``zero`` and ``reconstructed``."""
        return cls(
            clean=losses["clean"].cross_entropy,
            zero=losses["zero"].cross_entropy,
            reconstructed=losses["reconstructed"].cross_entropy,
            kl_zero=losses["zero"].kl,
            kl_reconstructed=losses["reconstructed"].kl,
            n_tokens=n_tokens,
        )


@torch.no_grad()
def sae_loss_recovered(model: Any, sae: Any, tokens: Tensor, hook_name: str, batch_size: int = 8) -> SAELossRecovered:
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

    def reconstruct(vectors: Tensor) -> Tensor:
        chunks = vectors.split(max(1, _MAX_DENSE_VALUES // sae.cfg.d_sae))
        return torch.cat([sae.decode(sae.encode(x)) for x in chunks])

    replaced = torch.ones_like(tokens, dtype=torch.bool)
    replaced[:, 0] = False
    functions: dict[str, Writer] = {"zero": torch.zeros_like, "reconstructed": reconstruct}
    losses = replacement_losses(model, tokens, hook_name, functions, replaced=replaced, batch_size=batch_size)
    return SAELossRecovered.of(losses, tokens[:, 1:].numel())
