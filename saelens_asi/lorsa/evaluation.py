"""How good a Lorsa is: dead features, normalized error."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saelens_asi.lorsa.model import Lorsa
from saelens_asi.metrics import ReconstructionMetrics
from saelens_asi.moments import RunningMoments


@torch.no_grad()
def lorsa_metrics(lorsa: Lorsa, batches: Iterable[tuple[Tensor, Tensor]]) -> ReconstructionMetrics:
    """Evaluate on batches of (x, y), each (n, n_positions, d_model), that it was not trained on.

    Tokens are positions; skipped ones do not count, neither in errors nor in firings. The share of dead features is
    that of dead rows of W_V and W_O.
    """
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
    return ReconstructionMetrics(moments.n_tokens, dead, error / variance, n_active / moments.n_tokens)


def reconstruct(lorsa: Lorsa, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output without the skipped positions, indices of selected features, and which of them fired at the others."""
    skip = lorsa.cfg.skip_positions
    features = lorsa.encode(x)
    y_hat = lorsa.decode(features, x.shape[0])[:, skip:]
    counted = (features.values != 0) & (features.rows % x.shape[1] >= skip)
    return y_hat, features.features, counted
