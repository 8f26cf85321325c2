"""What it costs that a run can be killed: ``python -m benchmarks.keep_cost [--d-sae 32768]``.

The guard against numbers that are not finite, as a share of the steps of one run; and a checkpoint, as a share of the
default interval between two.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from tqdm.auto import tqdm

from benchmarks.history_cost import BATCH, D_IN, WARM_UP, low_rank_batches
from benchmarks.train_step import machine
from saelens_asi.plugin.fields import KEEPING
from saelens_asi.plugin.guard import Guard
from saelens_asi.plugin.trainer import PluginTrainer
from saelens_asi.resume import write_json


def _timed(owner: type, name: str, seconds: list[float]) -> Callable[[], None]:
    stock = vars(owner)[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return stock(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, call)
    return lambda: setattr(owner, name, stock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "keep_cost.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    parts: dict[str, list[float]] = {name: [] for name in ("step", "kept", "check_step", "check_run")}
    put_back = [_timed(Guard, name, parts[name]) for name in ("kept", "check_step", "check_run")]
    put_back.append(_timed(PluginTrainer, "step", parts["step"]))
    with tempfile.TemporaryDirectory() as folder:
        cfg = SAETrainerConfig(
            total_training_samples=args.steps * BATCH,
            train_batch_size_samples=BATCH,
            lr_end=1e-4,
            checkpoint_path=folder,
            logger=LoggingConfig(log_to_wandb=False),
        )
        flags: dict[str, Any] = {"initializer": "active_subspace", "optimizer": "sparse_adam"}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=args.d_sae, k=32, **flags))
        trainer = SAETrainer(cfg, sae, low_rank_batches())
        try:
            trainer.fit()
        finally:
            for restore in put_back:
                restore()
        saves = []
        for i in tqdm(range(4), desc="Checkpoints"):
            start = time.perf_counter()
            trainer.save_checkpoint(f"timed_{i}")
            saves.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in (Path(folder) / "timed_0").iterdir())
    step, save = statistics.median(parts["step"][WARM_UP:]), statistics.median(saves)
    a_step = statistics.median(parts["kept"][WARM_UP:]) + statistics.median(parts["check_step"][WARM_UP:])
    a_record = statistics.median(parts["check_run"]) / cfg.logger.wandb_log_frequency
    result = {
        "machine": machine(),
        "d_in": D_IN,
        "d_sae": args.d_sae,
        "batch": BATCH,
        "step_seconds": step,
        "guard_share_of_step": (a_step + a_record) / step,
        "checkpoint_seconds": save,
        "checkpoint_gib": size / 2**30,
        "checkpoint_share_of_default_interval": min(0.01, save / (60 * KEEPING["checkpoint_minutes"])),
    }
    write_json(args.out, result, indent=1)
    print(
        f"d_sae {args.d_sae}: step {step * 1e3:.0f} ms, guard {result['guard_share_of_step']:.2%} of it; checkpoint of "
        f"{result['checkpoint_gib']:.2f} GiB {save:.1f} s, every {KEEPING['checkpoint_minutes']:.0f} minutes "
        f"{result['checkpoint_share_of_default_interval']:.2%}; wrote {args.out}"
    )


if __name__ == "__main__":
    main()
