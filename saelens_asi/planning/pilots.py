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
from torch import Tensor

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
        nmse: on held-out activations, at the end.
        curve: normalized error of every tenth training batch.
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
    curve: Sequence[float]
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
    """
    training = SweepTraining(training_tokens=steps * batch, batch_size=batch, device=device)
    marks: list[tuple[float, float]] = []

    def mark(*_: object) -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        marks.append((time.perf_counter(), time.process_time()))

    began = time.perf_counter()
    trainer, _ = train_cell(recommended(d_sae, k, spectrum), training, activations, mark)
    mark()
    each = np.diff(np.array(marks), axis=0)
    counted = each[min(_UNCOUNTED, len(each) // 2) :]
    found = evaluate(trainer.sae, activations=held_out.float(), ranks=False, progress=False)
    return Pilot(
        d_sae=d_sae,
        k=k,
        steps=training.steps,
        batch=batch,
        nmse=found.nmse,
        curve=[round(record["nmse"], 6) for record in trainer.history],  # type: ignore[attr-defined]
        seconds=float(counted[:, 0].mean()),
        cpu_seconds=float(counted[:, 1].mean()),
        setup_seconds=marks[0][0] - began,
        rate_quantiles=rate_quantiles(found.firing_counts),
        dead_fraction=found.dead_fraction,
        n_tokens=found.n_tokens,
    )
