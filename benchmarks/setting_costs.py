"""What settings of a run that starts well cost: ``python -m benchmarks.setting_costs [--d-sae 8192 32768]``.

``revive="auto"`` beside ``"off"``, and ``silent_moments="decay"`` beside ``"keep"``. Two trainers of the same SAE,
initialised by the flag, see the same batches of the main source, in turns of 50 steps, each of which holds one round of
the revival. The ratio is taken of each pair of turns, and of all.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor

from benchmarks.claims.sources import MAIN, MAIN_HOOK, activations
from benchmarks.claims.train import streamed_spectrum
from benchmarks.train_step import machine
from saelens_asi import ActiveSubspaceInit, initialize_
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.planning.recipe import learning_rate
from saelens_asi.plugin.revival import ROUND_STEPS

OUT = Path(__file__).parent / "results" / "setting_costs.json"
# Each setting without and with what costs.
SETTINGS = {"revive": ("off", "auto"), "silent_moments": ("keep", "decay")}
BATCH, K, WARM_UP = 1024, 32, 2
# As many steps as would make the whole run, of which the last part has no rounds.
RUN = 10_000


def trainer_of(sae: TopKTrainingSAE, setting: str, value: str) -> Any:
    """A trainer of a copy of an SAE that the initializer has started."""
    own = copy.deepcopy(sae)
    setattr(own.cfg, setting, value)
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
    initialize_(sae, settings, streamed_spectrum(tokens), tokens[:4096])
    sae.cfg.metadata[METADATA_KEY] = {}  # done, as a trainer sees it
    return sae


def measure(setting: str, d_sae: int, turns: int) -> dict[str, Any]:
    """Ratios of the seconds with a setting to those without it."""
    training_set, _ = activations(MAIN, MAIN_HOOK[MAIN.model])
    sae = started(d_sae, training_set[:57_600].float())
    trainers = {value: trainer_of(sae, setting, value) for value in SETTINGS[setting]}
    seconds: dict[str, list[float]] = {value: [] for value in trainers}
    for turn in range(WARM_UP + turns):
        first = turn * ROUND_STEPS * BATCH
        batches = training_set[first : first + ROUND_STEPS * BATCH].float().split(BATCH)
        for value in SETTINGS[setting][:: 1 if turn % 2 else -1]:
            seconds[value].append(_turn(trainers[value], batches))
    without, with_it = (seconds[value][WARM_UP:] for value in SETTINGS[setting])
    ratios = [one / other for one, other in zip(with_it, without, strict=True)]
    revived = {value: one.revival.n_revived for value, one in trainers.items() if one.revival is not None}
    return {
        "setting": setting,
        "d_sae": d_sae,
        "turns": turns,
        "seconds_of_a_step": statistics.median(without) / ROUND_STEPS,
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios)[::2],
        "ratio_of_sums": sum(with_it) / sum(without),
        **({"revived": sum(revived.values())} if revived else {}),
    }


def _turn(trainer: Any, batches: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    for batch in batches:
        trainer.step(batch)
        trainer.n_training_steps += 1
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for setting in SETTINGS:
        for d_sae in args.d_sae:
            found.append(measure(setting, d_sae, args.turns))
            print(found[-1], flush=True)
    OUT.write_text(json.dumps({"machine": machine(), "found": found}, indent=1) + "\n")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
