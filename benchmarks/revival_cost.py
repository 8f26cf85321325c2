"""What ``revive="auto"`` costs a run that starts well: ``python -m benchmarks.revival_cost [--d-sae 8192 32768]``.

Two trainers of the same SAE, initialised by the flag, see the same batches of the main source, in turns of 50 steps,
each of which holds one round of the revival. The ratio is taken of each pair of turns, and of all.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor

from benchmarks.claims.sources import MAIN, MAIN_HOOK, activations
from benchmarks.train_step import machine
from saelens_asi import ActiveSubspaceInit, RunningMoments, Spectrum, initialize_
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.planning.recipe import learning_rate
from saelens_asi.plugin.revival import ROUND_STEPS

OUT = Path(__file__).parent / "results" / "revival_cost.json"
BATCH, K, WARM_UP = 1024, 32, 2
# As many steps as would make the whole run, of which the last part has no rounds.
RUN = 10_000


def trainer_of(sae: TopKTrainingSAE, revive: str) -> Any:
    """A trainer of a copy of an SAE that the initializer has started."""
    own = copy.deepcopy(sae)
    own.cfg.revive = revive
    cfg = SAETrainerConfig(
        total_training_samples=RUN * BATCH,
        train_batch_size_samples=BATCH,
        lr=learning_rate(sae.cfg.d_sae),
        lr_end=1e-5,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg, own, iter(()))


def started(d_sae: int, tokens: Tensor) -> TopKTrainingSAE:
    settings = ActiveSubspaceInit()
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=tokens.shape[1], d_sae=d_sae, k=K, initializer=settings, optimizer="sparse_adam",
            aux_loss_coefficient=0.0,
        )
    )  # fmt: skip
    moments = RunningMoments.zeros(tokens.shape[1])
    moments.update_(tokens)
    initialize_(sae, settings, Spectrum.from_moments(moments), tokens[:4096])
    sae.cfg.metadata[METADATA_KEY] = {}  # done, as a trainer sees it
    return sae


def measure(d_sae: int, turns: int) -> dict[str, Any]:
    """Ratios of the seconds with revival to those without it, one for each pair of turns."""
    training_set, _ = activations(MAIN, MAIN_HOOK[MAIN.model])
    sae = started(d_sae, training_set[:57_600].float())
    trainers = {revive: trainer_of(sae, revive) for revive in ("off", "auto")}
    turns_of: dict[str, list[float]] = {"off": [], "auto": []}
    for turn in range(WARM_UP + turns):
        first = turn * ROUND_STEPS * BATCH
        batches = training_set[first : first + ROUND_STEPS * BATCH].float().split(BATCH)
        for revive in ("off", "auto") if turn % 2 else ("auto", "off"):
            start = time.perf_counter()
            for batch in batches:
                trainers[revive].step(batch)
                trainers[revive].n_training_steps += 1
            turns_of[revive].append(time.perf_counter() - start)
    off, auto = (turns_of[revive][WARM_UP:] for revive in ("off", "auto"))
    ratios = [one / other for one, other in zip(auto, off, strict=True)]
    return {
        "d_sae": d_sae,
        "turns": turns,
        "seconds_of_a_step": statistics.median(off) / ROUND_STEPS,
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios)[::2],
        "ratio_of_sums": sum(auto) / sum(off),
        "revived": trainers["auto"].revival.n_revived,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--turns", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for d_sae in args.d_sae:
        found.append(measure(d_sae, args.turns))
        print(found[-1], flush=True)
    OUT.write_text(json.dumps({"machine": machine(), "found": found}, indent=1) + "\n")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
