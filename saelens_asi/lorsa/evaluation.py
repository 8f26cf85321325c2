"""How good a Lorsa is: dead features, normalized error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saelens_asi.lorsa.model import Lorsa
from saelens_asi.moments import RunningMoments


@dataclass(frozen=True)
class LorsaMetrics:
    """How a Lorsa reconstructs a layer on sequences it was not trained on; skipped positions do not count.

    Attributes:
        n_tokens: positions evaluated.
        dead_fraction: share of the features (and so of W_V and W_O) that fire on none of them.
        nmse: E|y - y_hat|^2 / E|y - E y|^2.
        l0: mean number of features that fire at a position.
    """

    n_tokens: int
    dead_fraction: float
    nmse: float
    l0: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def lorsa_metrics(lorsa: Lorsa, batches: Iterable[tuple[Tensor, Tensor]]) -> LorsaMetrics:
    """Evaluate on batches of (x, y), each (n, n_positions, d_model)."""
    was_training = lorsa.training
    lorsa.eval()
    moments = RunningMoments.zeros(lorsa.cfg.d_model, lorsa.W_V.device)
    fired = torch.zeros(lorsa.cfg.n_ov_heads, dtype=torch.bool, device=lorsa.W_V.device)
    error, n_active = 0.0, 0
    for x, y in batches:
        x, y = x.to(lorsa.W_V), y.to(lorsa.W_V)
        y_hat, features, counted = reconstruct(lorsa, x)
        error += float((y[:, lorsa.cfg.skip_positions :] - y_hat).double().square().sum())
        moments.update_(y[:, lorsa.cfg.skip_positions :])
        fired[features[counted]] = True
        n_active += int(counted.sum())
    lorsa.train(was_training)
    if moments.n_tokens < 2:
        raise ValueError(f"an evaluation needs at least 2 positions, got {moments.n_tokens}")
    variance = float(moments.scatter.trace())
    dead = 1 - int(fired.sum()) / lorsa.cfg.n_ov_heads
    return LorsaMetrics(moments.n_tokens, dead, error / variance, n_active / moments.n_tokens)


def reconstruct(lorsa: Lorsa, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output without the skipped positions, indices of selected features, and which of them fired at the others."""
    skip = lorsa.cfg.skip_positions
    features = lorsa.encode(x)
    y_hat = lorsa.decode(features, x.shape[0])[:, skip:]
    counted = (features.values != 0) & (features.rows % x.shape[1] >= skip)
    return y_hat, features.features, counted
