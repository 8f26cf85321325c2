"""What a line of the training history costs: ``python -m benchmarks.history_cost [--d-sae 32768]``."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from saelens_asi.plugin.trainer import PluginTrainer

D_IN, BATCH, WARM_UP = 576, 4096, 2


def low_rank_batches() -> Iterator[Tensor]:
    """Activations with most of their variance in 128 dimensions, as attention outputs have it."""
    basis = torch.randn(128, D_IN) / 12
    while True:
        yield torch.randn(BATCH, 128) @ basis + 0.1 * torch.randn(BATCH, D_IN) + 1


def timed(owner: type[SAETrainer], seconds: list[float]) -> Callable[[], None]:
    """Time ``owner.step`` from now on; returns what puts the method back."""
    stock = vars(owner)["step"]

    def step(self: SAETrainer, batch: Tensor) -> object:
        start = time.perf_counter()
        output = stock(self, batch)
        seconds.append(time.perf_counter() - start)
        return output

    owner.step = step
    return lambda: setattr(owner, "step", stock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-sae", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--optimizer", choices=["adam", "sparse_adam"], default="sparse_adam")
    args = parser.parse_args()
    torch.manual_seed(0)
    cfg = SAETrainerConfig(
        total_training_samples=args.steps * BATCH,
        train_batch_size_samples=BATCH,
        lr_end=1e-4,
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=1),  # a line every step
    )
    flags: dict[str, Any] = {"initializer": "active_subspace", "optimizer": args.optimizer}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=args.d_sae, k=32, **flags))
    without: list[float] = []
    recorded: list[float] = []
    put_back = [timed(SAETrainer, without), timed(PluginTrainer, recorded)]
    try:
        SAETrainer(cfg, sae, low_rank_batches()).fit()
    finally:
        for restore in put_back:
            restore()
    step = statistics.median(without[WARM_UP:])
    line = statistics.median([a - b for a, b in zip(recorded, without, strict=True)][WARM_UP:])
    share = line / step / LoggingConfig().wandb_log_frequency
    print(
        f"d_sae {args.d_sae}, {args.optimizer}: step {step * 1e3:.0f} ms, line {line * 1e3:.1f} ms; at SAELens's "
        f"interval of {LoggingConfig().wandb_log_frequency} steps {share:.2%} of the training time"
    )


if __name__ == "__main__":
    main()
