"""Runs of SAELens's runner in the processes that torchrun has launched, on the tiny model, one after the other.

``torchrun ... -m tests.helpers.many_run FOLDER [SETTINGS as JSON, or a list of them]``; SAE in FOLDER/output,
checkpoints in FOLDER/checkpoints, all that a run ended with in FOLDER/final.pt. Settings of a list have a ``name``, of
the folder of that run below FOLDER. A run that is refused (ValueError) leaves FOLDER/refused.RANK, and the next one
begins.

``n_steps``, ``seconds`` that a step takes, ``batch_shards``, ``fail``: a rank that raises in step 3, ``odd``: a rank
with ``odd_settings``, ``go_on_from``: the path of a checkpoint below FOLDER without the runner's own part, ``kind``: of
what is to be trained; all others are settings of the runner.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.training.sae_trainer import SAETrainer

from saelens_asi.lorsa import CachedSequences, Lorsa, LorsaConfig, LorsaTraining, train_lorsa
from tests.helpers import tiny
from tests.helpers.many import whole_state

OF_SAE = ("batch_shards", "checkpoint_minutes", "keep_checkpoints", "max_skipped_fraction")


def main(folder: Path, runs: dict[str, Any] | list[dict[str, Any]]) -> None:
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"pid.{_rank()}").write_text(str(os.getpid()))
    for settings in runs if isinstance(runs, list) else [runs]:
        own = folder / settings.pop("name", "")
        try:
            run(own, settings)
        except ValueError as error:
            own.mkdir(parents=True, exist_ok=True)
            (own / f"refused.{_rank()}").write_text(str(error))


def run(folder: Path, settings: dict[str, Any]) -> None:
    """One of them; ``final.pt`` is written by the first process."""
    settings = dict(settings)
    odd, odd_settings = settings.pop("odd", None), settings.pop("odd_settings", {})
    if odd == _rank():
        settings |= odd_settings
    torch.manual_seed(0)
    if "go_on_from" in settings:
        base, name = settings.pop("go_on_from").split("/")
        (checkpoint,) = (folder.parent / base).glob(f"checkpoints/*/{name}")
        settings["resume_from_checkpoint"] = str(checkpoint)
    KINDS[settings.pop("kind", "runner")](folder, settings)


def _runner(folder: Path, settings: dict[str, Any]) -> None:
    own = {"d_sae": 602, "optimizer": "sparse_adam", "initializer": "default"}
    own |= {name: settings.pop(name) for name in OF_SAE if name in settings}
    sae = tiny.sae_config(settings.pop("architecture", "topk"), **own)
    n_steps, seconds, fail = settings.pop("n_steps", 10), settings.pop("seconds", 0.0), settings.pop("fail", None)
    standard = {"checkpoint_path": str(folder / "checkpoints"), "training_tokens": n_steps * tiny.BATCH}
    cfg = tiny.runner_config(sae, folder, **{**standard, **settings})
    with _watched(folder, seconds, fail == _rank()) as trainers:
        LanguageModelSAETrainingRunner(
            cfg, override_dataset=tiny.tokens(), override_model=tiny.hooked_transformer()
        ).run()
    end = {**whole_state(trainers[0]), "rng": torch.get_rng_state()}
    if _rank() == 0:
        torch.save(end, folder / "final.pt")


@contextmanager
def _watched(folder: Path, seconds: float, fails: bool) -> Iterator[list[Any]]:
    """The trainers that train in this block; what they begin with is noted in the folder."""
    trainers: list[Any] = []
    stock_step = SAETrainer.step

    def step(self: Any, batch: torch.Tensor) -> Any:
        if not trainers:
            trainers.append(self)
            with (folder / f"begun.{_rank()}").open("a") as file:
                file.write(f"{self.n_training_samples}\n")
        time.sleep(seconds)
        if fails and self.n_training_steps == 3:
            raise OSError("this process fails")
        return stock_step(self, batch)

    with mock.patch.object(SAETrainer, "step", step):
        yield trainers


def _several(folder: Path, settings: dict[str, Any]) -> None:
    saes = {name: tiny.sae_config("topk", d_sae=48, optimizer="sparse_adam") for name in "ab"}
    cfg = MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=dict.fromkeys(saes, tiny.ATTN_OUT),
        context_size=tiny.CONTEXT,
        train_batch_size_tokens=tiny.BATCH,
        training_tokens=4 * tiny.BATCH,
        streaming=False,
        checkpoint_path=None,
        output_path=str(folder / "output"),
    )
    MultiSAETrainingRunner(cfg, override_dataset=tiny.tokens(), override_model=tiny.hooked_transformer()).run()


def _lorsa(folder: Path, settings: dict[str, Any]) -> None:
    lorsa = Lorsa(LorsaConfig(d_model=8, n_qk_heads=2, n_ov_heads=12, d_qk=4, k=2, n_ctx=8))
    x = torch.zeros(8, 8, 8)
    settings = LorsaTraining(steps=2, batch_size=2, lr_warm_up_steps=0)
    train_lorsa(lorsa, CachedSequences(x, x, x[..., 0].long()), settings)


KINDS: dict[str, Callable[[Path, dict[str, Any]], None]] = {"runner": _runner, "several": _several, "lorsa": _lorsa}


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
