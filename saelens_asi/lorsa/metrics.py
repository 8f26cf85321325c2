"""How good a Lorsa is: dead features, normalized error."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saelens_asi.evaluation.metrics import ReconstructionMetrics, RunningReconstruction
from saelens_asi.lorsa.model import Lorsa


@torch.no_grad()
def lorsa_metrics(lorsa: Lorsa, batches: Iterable[tuple[Tensor, Tensor]]) -> ReconstructionMetrics:
    """Evaluate on batches of (x, y), each (n, n_positions, d_model), that it was not trained on.

    Tokens are positions; skipped ones do not count, neither in errors nor in firings. The share of dead features is
    that of dead rows of W_V and W_O.
    """
    was_training = lorsa.training
    lorsa.eval()
    running = RunningReconstruction.zeros(lorsa.cfg.n_ov_heads, lorsa.cfg.d_model)
    for x, y in batches:
        x, y = x.to(lorsa.W_V), y.to(lorsa.W_V)[:, lorsa.cfg.skip_positions :]
        y_hat, features, fired = lorsa.reconstruct(x)
        firings = torch.bincount(features[fired], minlength=lorsa.cfg.n_ov_heads)
        running.update_(y.flatten(0, 1), y_hat.flatten(0, 1), firings)
    lorsa.train(was_training)
    return running.metrics()
