"""What an evaluation measures: error, firings, predictions; running sums and records of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saelens_asi.activations.replacement import Predictions, ratio


@dataclass(frozen=True)
class ReconstructionMetrics:
    """How a dictionary reconstructs vectors it was not trained on.

    Attributes:
        n_tokens: vectors evaluated.
        dead_fraction: share of the features that fire on none of them (arXiv 2508.16929 counts over 10M tokens).
        nmse: E|x - x_hat|^2 / E|x - E x|^2.
        l0: mean number of features that fire on a token.
    """

    n_tokens: int
    dead_fraction: float
    nmse: float
    l0: float

    @property
    def explained_variance(self) -> float:
        """1 - nmse, over all tokens at once: ``explained_variance`` of SAELens's evals on the same tokens.

        SAELens's ``explained_variance_legacy`` is another number: the mean of 1 - |x - x_hat|^2 / |x - E x|^2 over the
        tokens, with E x that of each batch.
        """
        return 1 - self.nmse

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass
class RunningReconstruction:
    """Errors and firings of a dictionary over the vectors seen so far; those of two streams can be merged.

    Attributes:
        firing_counts: (d_sae,) int64, on how many vectors each feature fired.
        mean: (d,) float64, of the vectors x.
        deviation: float64 scalar, the sum of |x - mean|^2.
        error: float64 scalar, the sum of |x - x_hat|^2.
        n_tokens: number of vectors.
    """

    firing_counts: Tensor
    mean: Tensor
    deviation: Tensor
    error: Tensor
    n_tokens: int

    @classmethod
    def zeros(cls, d_sae: int, d: int) -> RunningReconstruction:
        """Nothing seen yet, of a dictionary of ``d_sae`` features for vectors of width ``d``."""
        zero = torch.tensor(0.0, dtype=torch.float64)
        counts = torch.zeros(d_sae, dtype=torch.int64)
        return cls(counts, torch.zeros(d, dtype=torch.float64), zero, zero, 0)

    @torch.no_grad()
    def update_(self, x: Tensor, x_hat: Tensor, firings: Tensor) -> RunningReconstruction:
        """Add vectors (n, d), their reconstructions (n, d), and how often each feature fired on them (d_sae,)."""
        x, x_hat = _wide(x), _wide(x_hat)
        mean = x.mean(dim=0) if len(x) else x.new_zeros(x.shape[1])
        sums = ((x - mean).square().sum(), (x - x_hat).square().sum())
        return self.merge_(RunningReconstruction(firings.to(x.device), mean, *sums, len(x)))

    def merge_(self, other: RunningReconstruction) -> RunningReconstruction:
        """Add what ``other`` has seen (Chan, Golub and LeVeque 1979). Raises ValueError where the shapes differ."""
        shapes = [(len(one.firing_counts), len(one.mean)) for one in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"cannot merge a dictionary of (d_sae, d) = {shapes[1]} into one of {shapes[0]}")
        if other.n_tokens:
            n_tokens = self.n_tokens + other.n_tokens
            mean = self.mean.to(other.mean.device)
            delta = other.mean - mean
            between = delta.square().sum() * (self.n_tokens * other.n_tokens / n_tokens)
            self.firing_counts = self.firing_counts.to(other.mean.device) + other.firing_counts
            self.deviation = self.deviation.to(mean.device) + other.deviation + between
            self.error = self.error.to(mean.device) + other.error
            self.mean = mean + delta * (other.n_tokens / n_tokens)
            self.n_tokens = n_tokens
        return self

    def metrics(self) -> ReconstructionMetrics:
        """The measures of all vectors so far.

        Raises:
            ValueError: for fewer than 2 vectors, for vectors that do not vary, or where something is not finite.
        """
        if self.n_tokens < 2:
            raise ValueError(f"an evaluation needs at least 2 activations, got {self.n_tokens}")
        error, deviation = float(self.error), float(self.deviation)
        if not (math.isfinite(error) and math.isfinite(deviation)):
            raise ValueError(
                f"among {self.n_tokens} activations or their reconstructions are NaN or infinity: run the model and "
                "the SAE in a wider dtype (bfloat16 or float32)"
            )
        if deviation == 0:
            raise ValueError(
                f"the {self.n_tokens} activations are all the same, so that no share of their variance can be "
                "explained: check the hook, and that the data holds more than one token"
            )
        counts = self.firing_counts
        dead = int((counts == 0).sum()) / len(counts)
        return ReconstructionMetrics(self.n_tokens, dead, error / deviation, int(counts.sum()) / self.n_tokens)


def _wide(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()


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
        return ratio(self.zero - self.reconstructed, self.zero - self.clean)

    @property
    def kl_recovered(self) -> float:
        """1 - kl_reconstructed / kl_zero: 1 where the predictions are those of the model as it is."""
        return 1 - ratio(self.kl_reconstructed, self.kl_zero)

    def to_dict(self) -> dict[str, float | None]:
        """All measures; None where a share means nothing because the ablation changes nothing."""
        shares = {"recovered": self.recovered, "kl_recovered": self.kl_recovered}
        return asdict(self) | {name: None if math.isnan(share) else share for name, share in shares.items()}

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


# Decades of firing rates that the histogram covers, and bins in each.
_DECADES, _BINS_PER_DECADE = 7, 4


@dataclass(frozen=True, eq=False)
class SAEEvaluation(ReconstructionMetrics):
    """What an SAE does on text or activations that it was not trained on.

    Attributes:
        n_tokens: activations evaluated: the number by which dead features are counted.
        dead_fraction: share of the features that fire on none of them.
        nmse: E|x - x_hat|^2 / E|x - E x|^2.
        l0: mean number of features that fire on a token.
        firing_counts: (d_sae,) int64 on the CPU, on how many of the tokens each feature fires.
        d_in: width of the activations.
        hook_name: where they were read; None where they were given.
        effective_rank: of the activations (``Spectrum.effective_rank``); None where it was not asked for.
        intrinsic_dimension: dimensions that hold 99 % of their variance; None where it was not asked for.
        loss: what the reconstruction does to the predictions; None without a model.
    """

    firing_counts: Tensor
    d_in: int
    hook_name: str | None = None
    effective_rank: float | None = None
    intrinsic_dimension: int | None = None
    loss: SAELossRecovered | None = None

    @property
    def d_sae(self) -> int:
        return len(self.firing_counts)

    @property
    def n_dead(self) -> int:
        return int((self.firing_counts == 0).sum())

    @property
    def firing_rates(self) -> Tensor:
        """(d_sae,) float32 share of tokens on which each feature fires."""
        return (self.firing_counts.double() / self.n_tokens).float()

    @property
    def effective_rank_share(self) -> float | None:
        """Effective rank as a share of the width, as the paper quotes it."""
        return None if self.effective_rank is None else self.effective_rank / self.d_in

    def to_dict(self) -> dict[str, Any]:
        """Everything but the counts of single features, whose histogram it holds, as strict JSON."""
        names = ["hook_name", "n_tokens", "d_in", "d_sae", "n_dead", "dead_fraction", "nmse", "explained_variance"]
        names += ["l0", "effective_rank", "effective_rank_share", "intrinsic_dimension"]
        values = {name: getattr(self, name) for name in names}
        return values | {"loss": self.loss and self.loss.to_dict(), "firing_rates": self._histogram()}

    def _histogram(self) -> dict[str, int | list[int] | list[float]]:
        """Live features by log10 of their firing rate, lower edge of each bin; rarer ones are in the first."""
        n_bins = _DECADES * _BINS_PER_DECADE
        logs = self.firing_rates[self.firing_counts > 0].double().log10().clamp(min=-_DECADES)
        edges = [i / _BINS_PER_DECADE - _DECADES for i in range(n_bins)]
        counts = torch.histc(logs, n_bins, -_DECADES, 0).long().tolist()
        return {"never": self.n_dead, "log10_from": edges, "features": counts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], firing_counts: Tensor) -> SAEEvaluation:
        """Back from ``to_dict`` and the counts."""
        own = ("n_tokens", "dead_fraction", "nmse", "l0", "d_in", "hook_name", "effective_rank", "intrinsic_dimension")
        loss = values["loss"]
        if loss is not None:
            loss = SAELossRecovered(**{k: v for k, v in loss.items() if k not in ("recovered", "kl_recovered")})
        return cls(**{name: values[name] for name in own}, firing_counts=firing_counts, loss=loss)
