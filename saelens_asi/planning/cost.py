"""Seconds of a training step at sizes that were not timed, from some that were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from saelens_asi.planning.pilots import Pilot


@dataclass(frozen=True)
class StepCost:
    """Of a step of ``batch`` tokens: base + per_feature x d_sae + per_active x k.

    Attributes:
        base: seconds whatever the size.
        per_feature: seconds a feature: scores, screens, rows that are moved.
        per_active: seconds for each feature that is active on a token: sums and gradients.
        setup: seconds before the first step, for each feature.
        batch: tokens.
    """

    base: float
    per_feature: float
    per_active: float
    setup: float
    batch: int

    def seconds(self, d_sae: int, k: int) -> float:
        """Of one step."""
        return self.base + self.per_feature * d_sae + self.per_active * k

    def hours(self, d_sae: int, k: int, tokens: float, model_seconds: float = 0.0) -> float:
        """Of a whole run, with ``model_seconds`` of the language model for each token."""
        steps = tokens / self.batch
        return (self.setup * d_sae + steps * self.seconds(d_sae, k) + model_seconds * tokens) / 3600

    def tokens(self, d_sae: int, k: int, hours: float, model_seconds: float = 0.0) -> float:
        """That these hours reach; 0 where they end before the first step."""
        each = self.seconds(d_sae, k) / self.batch + model_seconds
        return max(0.0, 3600 * hours - self.setup * d_sae) / each


def step_cost(pilots: Sequence[Pilot], seconds: Sequence[float] | None = None) -> StepCost:
    """Fitted to timings at three sizes or more, in relative terms; no part is negative (non-negative least squares).

    Args:
        pilots: that were timed, with the same batch.
        seconds: of a step of each, instead of those on the clock.

    Raises:
        ValueError: for fewer than two pilots.
    """
    if len(pilots) < 2:
        raise ValueError("the cost of a step needs two pilots at least, of different sizes")
    timed = np.array([pilot.seconds for pilot in pilots] if seconds is None else seconds, dtype=float)
    terms = np.array([(1.0, pilot.d_sae, pilot.k) for pilot in pilots])
    scale = terms.max(axis=0)
    found, _ = nnls(terms / scale / timed[:, None], np.ones(len(timed)))
    base, per_feature, per_active = (float(value) for value in found / scale)
    setup = max(pilot.setup_seconds / pilot.d_sae for pilot in pilots if pilot.d_sae == max(p.d_sae for p in pilots))
    return StepCost(base, per_feature, per_active, setup, pilots[0].batch)
