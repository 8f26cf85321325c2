"""What SAELens's trainer state holds beside what is by feature: saved once where processes share the features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, TRAINER_STATE_FILENAME

_NUMBERS = ("n_training_samples", "n_training_steps", "n_frac_active_samples", "started_fine_tuning")


def save_rest(trainer: Any, folder: Path) -> None:
    """SAELens's files of a trainer's state, by its names, without tensors that are as large as d_sae."""
    state = {name: getattr(trainer, name) for name in _NUMBERS}
    state["lr_scheduler"] = trainer.lr_scheduler.state_dict()
    state["coefficient_schedulers"] = {name: one.state_dict() for name, one in trainer.coefficient_schedulers.items()}
    state["optimizer"] = {"state": {}, "param_groups": trainer.optimizer.state_dict()["param_groups"]}
    torch.save(state, folder / TRAINER_STATE_FILENAME)
    trainer.activation_scaler.save(str(folder / ACTIVATION_SCALER_CFG_FILENAME))


def load_rest(trainer: Any, folder: Path) -> None:
    """What ``save_rest`` wrote, or the same of what SAELens wrote."""
    trainer.activation_scaler.load(folder / ACTIVATION_SCALER_CFG_FILENAME)
    # Mapped: of SAELens's own file no moment is read.
    state = torch.load(folder / TRAINER_STATE_FILENAME, map_location="cpu", mmap=True, weights_only=True)
    for name in _NUMBERS:
        setattr(trainer, name, state[name])
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for name, scheduler in state["coefficient_schedulers"].items():
        trainer.coefficient_schedulers[name].load_state_dict(scheduler)
    for group, saved in zip(trainer.optimizer.param_groups, state["optimizer"]["param_groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})


def skip_reading_once(sae: Any, folder: Path) -> None:
    """Have SAELens's runner, which reads an SAE's weights from a checkpoint next, find them read."""
    stock = sae.load_weights_from_checkpoint

    def load_weights_from_checkpoint(checkpoint_path: Path | str) -> None:
        vars(sae).pop("load_weights_from_checkpoint")
        if Path(checkpoint_path) != folder:
            stock(checkpoint_path)

    vars(sae)["load_weights_from_checkpoint"] = load_weights_from_checkpoint
