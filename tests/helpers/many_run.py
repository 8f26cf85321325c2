"""A run of SAELens's runner in the processes that torchrun has launched, on the tiny model.

``torchrun ... -m tests.helpers.many_run FOLDER [SETTINGS as JSON]``; SAE in FOLDER/output, checkpoints in
FOLDER/checkpoints. ``n_steps``, ``seconds`` that a step takes, ``batch_shards``, ``fail``: a rank that raises in step 3,
``odd``: a rank with another learning rate; all others are settings of the runner.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.training.sae_trainer import SAETrainer

from tests.helpers import tiny


def main(folder: Path, settings: dict[str, Any]) -> None:
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank = int(os.environ.get("RANK", "0"))
    n_steps, seconds = settings.pop("n_steps", 10), settings.pop("seconds", 0.0)
    odd, fail = settings.pop("odd", None), settings.pop("fail", None)
    own = {"d_sae": 602, "optimizer": "sparse_adam", "initializer": "default"}
    for name in ("batch_shards", "checkpoint_minutes", "keep_checkpoints"):
        if name in settings:
            own[name] = settings.pop(name)
    sae = tiny.sae_config(settings.pop("architecture", "topk"), **own)
    stock_step = SAETrainer.step

    def step(self: Any, batch: torch.Tensor) -> Any:
        time.sleep(seconds)
        if fail == rank and self.n_training_steps == 3:
            raise OSError("this process fails")
        return stock_step(self, batch)

    SAETrainer.step = step  # type: ignore[method-assign]
    if odd == rank:
        settings["lr"] = 0.123
    cfg = tiny.runner_config(
        sae,
        folder,
        **{"checkpoint_path": str(folder / "checkpoints"), "training_tokens": n_steps * tiny.BATCH, **settings},
    )
    LanguageModelSAETrainingRunner(cfg, override_dataset=tiny.tokens(), override_model=tiny.hooked_transformer()).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
