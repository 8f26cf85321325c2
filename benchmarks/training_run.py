"""A training run on a real model's attention output: what its steps cost against the dense floor, all the way.

    python -m benchmarks.training_run                              # d_sae = 32,768, 300 steps of 4,096 tokens
    python -m benchmarks.training_run --d-sae 131072 --steps 100

Active Subspace Initialization and SparseAdam, through SAELens's trainer. Every tenth step the floor (one ``addmm`` and
one ``topk``, see train_step.py) is timed beside it, and the features that the step selected are compared with those
that the whole product gives for the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import TypedDict

import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from tqdm import tqdm

from benchmarks.ablation import activations
from benchmarks.train_step import LR, RESULTS, machine, make_trainer


class CheckedStep(TypedDict):
    """A step that was compared with the whole product: seconds, features, and which screen chose them."""

    step: int
    floor_s: float
    step_s: float
    screen: str | None
    differing_features: int
    active_share: float
    loss: float


def dense_selection(sae: SAE, x: Tensor, k: int) -> tuple[Tensor, float]:
    """(batch, k) features by the whole product, and the seconds that product and top-k took."""
    with torch.no_grad():
        W_enc, b_enc, shifted = sae.W_enc.detach(), sae.b_enc.detach(), x - sae.b_dec
        start = time.perf_counter()
        torch.addmm(b_enc, shifted, W_enc).topk(k, dim=1, sorted=False)
        seconds = time.perf_counter() - start
        norms = sae.W_dec.norm(dim=1)
        parts = [((part @ W_enc + b_enc) * norms).topk(k, dim=1) for part in shifted.split(512)]
        features = torch.cat([part.indices.masked_fill(part.values <= 0, -1) for part in parts])
        return features.sort(dim=1).values, seconds


def differing(output: TrainStepOutput, expected: Tensor) -> int:
    """Selected features that the dense selection has not."""
    acts = output.feature_acts.coalesce()
    tokens, features = acts.indices()
    return int((expected[tokens] != features[:, None]).all(dim=1).sum())


def measure(args: argparse.Namespace) -> tuple[list[CheckedStep], list[float]]:
    """The steps that were compared with the floor, and the seconds of all steps."""
    data = [batch for batch in activations(300_000, 80_000)[0].split(args.batch) if len(batch) == args.batch]
    trainer = make_trainer(args, data, optimizer="sparse_adam")
    rows: list[CheckedStep] = []
    seconds: list[float] = []
    since = 0
    bar = tqdm(range(args.steps), desc="training", unit="step", disable=None)
    for i in bar:
        x = data[i % len(data)]
        expected, floor = dense_selection(trainer.sae, x, args.k) if i % 10 == 5 else (None, 0.0)
        start = time.perf_counter()
        output = trainer.step(x)
        seconds.append(time.perf_counter() - start)
        trainer.n_training_steps += 1
        if expected is not None:
            approximation = trainer._sparse_steps.screen.approximation
            row: CheckedStep = {
                "step": i,
                "floor_s": floor,
                "step_s": sum(seconds[since:]) / (len(seconds) - since),  # all since the last row, its own included
                "screen": None if approximation is None else approximation.name,
                "differing_features": differing(output, expected),
                "active_share": float((trainer.n_forward_passes_since_fired == 0).float().mean()),
                "loss": float(output.loss),
            }
            since = len(seconds)
            rows.append(row)
            bar.write(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return rows, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=32_768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--label", default="", help="end of the result's name, as for another processor: _avx2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.device, args.autocast = "cpu", False
    rows, seconds = measure(args)
    floor = median(row["floor_s"] for row in rows)
    a_step = sum(seconds[5:]) / len(seconds[5:])
    summary = {
        "d_sae": args.d_sae,
        "batch": args.batch,
        "k": args.k,
        "lr": LR,
        "steps": args.steps,
        "seconds_a_step": a_step,
        "floor_s": floor,
        "times_the_floor": a_step / floor,
        "differing_features": sum(row["differing_features"] for row in rows),
        "compared_features": len(rows) * args.batch * args.k,
        "machine": machine(),
        "rows": rows,
    }
    path = args.out or RESULTS / f"training_run_{args.d_sae}{args.label}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print({name: value for name, value in summary.items() if name not in ("rows", "machine")})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
