"""SparseAdam by itself against torch.optim.SparseAdam, and a training step of every architecture against stock Adam.

    python -m benchmarks.optimizers

The first table is an embedding of 500,000 rows of 128 numbers with COO gradients (``nn.Embedding(sparse=True)``), read
16,384 times a step with the frequencies of words. The second is SAELens's own trainer with ``optimizer="adam"`` and
``"sparse_adam"`` for each of its architectures, on the same batches. Repetitions interleave, medians are compared.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class

from benchmarks.train_step import RESULTS, machine
from saelens_asi import SparseAdam

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": 32},
    "abstopk": {"k": 32},
    "batchtopk": {"k": 32},
    "matryoshka_batchtopk": {"k": 32},
    "standard": {"l1_coefficient": 1.0},
    "gated": {"l1_coefficient": 1.0},
    "jumprelu": {"l0_coefficient": 1.0},
    "matching_pursuit": {"max_iterations": 8},
}


def interleaved(steps: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warm_up + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def embedding(repeats: int) -> dict[str, float]:
    weights = 1 / torch.arange(1, 500_001)
    lookups = torch.multinomial(weights, 16_384, replacement=True, generator=torch.Generator().manual_seed(0))

    def step(make: Callable[..., torch.optim.Optimizer]) -> Callable[[], None]:
        table = torch.nn.Embedding(500_000, 128, sparse=True)
        table(lookups).square().sum().backward()
        return make(table.parameters(), lr=1e-3).step  # the same gradient in every step: only the optimizer is timed

    return interleaved({"torch.optim.SparseAdam": step(torch.optim.SparseAdam), "ours": step(SparseAdam)}, repeats)


def architecture(name: str, d_sae: int, batch: int, repeats: int) -> dict[str, float]:
    sae_class, config_class = get_sae_training_class(name)
    own = dict(ARCHITECTURES[name])
    if name == "matryoshka_batchtopk":
        own["matryoshka_widths"] = [d_sae // 16, d_sae // 4, d_sae]
    scales = torch.linspace(0, -4, 576).exp()
    supply = torch.randn(8 * batch, 576, generator=torch.Generator().manual_seed(0)) * scales + scales.flip(0)
    steps = {}
    for optimizer in ("adam", "sparse_adam"):
        torch.manual_seed(0)
        sae = sae_class(config_class(d_in=576, d_sae=d_sae, optimizer=optimizer, **own))
        cfg = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=batch, lr=3e-4, lr_end=3e-4, lr_warm_up_steps=10
        )
        trainer, data = SAETrainer(cfg, sae, iter(())), itertools.cycle(supply.split(batch))

        steps[optimizer] = functools.partial(_step, trainer, data)
    return interleaved(steps, repeats)


def _step(trainer: SAETrainer, data: Iterator[torch.Tensor]) -> None:
    trainer.step(next(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizers.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "d_in": 576, "d_sae": args.d_sae, "batch": args.batch}
    result["embedding"] = embedding(args.repeats)
    theirs, ours = result["embedding"].values()
    print(f"embedding: torch.optim.SparseAdam {theirs * 1e3:.1f} ms, ours {ours * 1e3:.1f} ms, {theirs / ours:.2f} x\n")
    print("| architecture | stock Adam, s | sparse_adam, s | ratio |\n|---|---|---|---|")
    result["architectures"] = {}
    for name in ARCHITECTURES:
        seconds = result["architectures"][name] = architecture(name, args.d_sae, args.batch, args.repeats)
        stock, sparse = seconds.values()
        print(f"| {name} | {stock:.3f} | {sparse:.3f} | {sparse / stock:.2f} |", flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
