"""A minute of real training steps at small sizes: what they cost on this machine, and what error they reach."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from sae_lens import TrainingSAE
from torch import Tensor

from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.run import evaluate
from saelens_asi.planning.recipe import recommended
from saelens_asi.sweep.run import SweepTraining, train_cell

STEPS, BATCH, HELD_OUT = 40, 1024, 8192

# The first steps choose kernels and screens, and are not counted.
_UNCOUNTED = 15

# Of the firings of the features, over their mean.
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class Pilot:
    """A short training that was measured.

    Attributes:
        d_sae: features.
        k: active on a token.
        steps: of training.
        batch: tokens in a step.
        nmse: on held-out activations, at the end: E|x - x_hat|^2 over the variance of the hook.
        nmse_at_quarter: the same after a quarter of the steps.
        seconds: on the clock for a step.
        cpu_seconds: of all cores for a step.
        setup_seconds: before the first step: estimate, initialization.
        rate_quantiles: of the features' firings on held-out activations over their mean, at ``QUANTILES``.
        dead_fraction: share of the features that fired on none of ``n_tokens`` held-out activations.
        n_tokens: held-out activations.
    """

    d_sae: int
    k: int
    steps: int
    batch: int
    nmse: float
    nmse_at_quarter: float
    seconds: float
    cpu_seconds: float
    setup_seconds: float
    rate_quantiles: Sequence[float]
    dead_fraction: float
    n_tokens: int

    @property
    def tokens(self) -> int:
        return self.steps * self.batch

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rate_quantiles(firing_counts: Int64[Tensor, " d_sae"]) -> list[float]:
    """Of the features' firings over their mean, at ``QUANTILES``."""
    counts = firing_counts.double()
    relative = counts / counts.mean().clamp(min=1e-12)
    return [round(value, 5) for value in relative.quantile(torch.tensor(QUANTILES).double()).tolist()]


def _variance(activations: Float[Tensor, "n d_in"]) -> float:
    """E|x - E x|^2."""
    return float(activations.double().var(dim=0, correction=0).sum())


def _clocks(device: str) -> tuple[float, float]:
    """Seconds on the clock, and of all cores, when all is done that was asked of the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def run_pilot(
    activations: Float[Tensor, "n d_in"],
    held_out: Float[Tensor, "m d_in"],
    d_sae: int,
    k: int,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    device: str = "cpu",
    spectrum: str | Path | None = None,
    variance: float | None = None,
) -> Pilot:
    """Train ``steps`` steps of the recommended recipe with SAELens's trainer, and measure the result.

    Args:
        activations: to train on; they come round again where they are fewer than the steps take.
        held_out: to measure on.
        d_sae: features.
        k: active on a token.
        steps: of training.
        batch: tokens in a step.
        device: where the SAE is trained.
        spectrum: file of the activations' spectrum; without it each pilot measures it anew.
        variance: E|x - E x|^2 of the hook, by which errors are normalized; that of ``held_out`` unless told. Where a
            few tokens hold most of it, a batch or a sample has another one each time.
    """
    of_held_out = _variance(held_out)
    variance = variance or of_held_out
    training = SweepTraining(training_tokens=steps * batch, batch_size=batch, device=device)
    quarter = training.steps // 4 * batch
    at_quarter: SAEEvaluation | None = None
    began, ended = [], []  # of each step on two clocks: an evaluation between two steps is in neither

    def look_at(sae: TrainingSAE[Any]) -> SAEEvaluation:
        return evaluate(sae, activations=held_out.float(), ranks=False, progress=False)

    def between(n_tokens: int, sae: TrainingSAE[Any]) -> None:
        nonlocal at_quarter
        ended.append(_clocks(device))
        if n_tokens == quarter:
            at_quarter = look_at(sae)
        began.append(_clocks(device))

    called = _clocks(device)
    trainer, _ = train_cell(recommended(d_sae, k, spectrum), training, activations, between)
    ended.append(_clocks(device))
    each = np.array(ended[1:]) - np.array(began)
    counted = each[min(_UNCOUNTED, len(each) // 2) :]
    found = look_at(trainer.sae)
    scale = of_held_out / variance
    return Pilot(
        d_sae=d_sae,
        k=k,
        steps=training.steps,
        batch=batch,
        nmse=found.nmse * scale,
        nmse_at_quarter=(at_quarter or found).nmse * scale,
        seconds=float(counted[:, 0].mean()),
        cpu_seconds=float(counted[:, 1].mean()),
        setup_seconds=ended[0][0] - called[0],
        rate_quantiles=rate_quantiles(found.firing_counts),
        dead_fraction=found.dead_fraction,
        n_tokens=found.n_tokens,
    )
