"""The record of one SAE's evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelens_asi.evaluation.loss import SAELossRecovered
from saelens_asi.evaluation.reconstruction import ReconstructionMetrics

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

    def _histogram(self) -> dict[str, Any]:
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
