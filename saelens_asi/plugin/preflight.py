"""What would end a run after hours, looked at before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from sae_lens.config import SAETrainerConfig

from saelens_asi.activations.sae_state import shard_of
from saelens_asi.plugin.fields import AnyTrainingSAE
from saelens_asi.plugin.recorder import output_folder
from saelens_asi.plugin.stream import Provider, check_hooks, find_store
from saelens_asi.resume import check_writable


class PlannedRun(Protocol):
    """What is asked of a trainer."""

    cfg: SAETrainerConfig
    sae: AnyTrainingSAE
    data_provider: Provider
    evaluator: Any
    save_checkpoint_fn: Any


def check_run(trainer: PlannedRun) -> None:
    """Raise ValueError for folders that cannot be written, a disk too small for checkpoints, or a hook not there."""
    check_sae(trainer.sae)
    output = output_folder(trainer.save_checkpoint_fn)
    check_folders({"checkpoint_path": trainer.cfg.checkpoint_path, "output_path": output}, [trainer.sae])
    store = find_store(trainer.data_provider, trainer.evaluator)
    if store is not None and store._hook_names is None:
        check_hooks(trainer.data_provider, trainer.evaluator, {store.hook_name: trainer.sae.cfg.d_in})


def device_problem(device: str) -> str | None:
    """Why torch cannot use a device here, in its own words; None where it can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return str(error).split("\n")[0]
    return None


def check_device(device: str) -> None:
    """Raise ValueError for a device that is not there."""
    problem = device_problem(device)
    if problem is not None:
        raise ValueError(f"device={device!r} cannot be used here: {problem}")


def check_sae(sae: AnyTrainingSAE) -> None:
    k, d_sae = getattr(sae.cfg, "k", None), shard_of(sae).d_sae
    if k is not None and k > d_sae:
        raise ValueError(f"k={k} is more than the d_sae={d_sae} features: set k to at most d_sae")


def check_folders(folders: dict[str, str | Path | None], saes: list[AnyTrainingSAE]) -> None:
    """Raise ValueError, naming the setting, for a folder that cannot be written or whose disk is too small."""
    for setting, folder in folders.items():
        if folder is not None:
            check_writable(setting, folder)
    checkpoints = folders.get("checkpoint_path")
    if checkpoints is None:
        return
    # Two checkpoints lie there while the second is written: weights, and two moments of each.
    weights = sum(_whole_bytes(sae) for sae in saes)
    needed, free = 2 * 3 * weights, shutil.disk_usage(checkpoints).free
    if free < needed:
        raise ValueError(
            f"checkpoint_path={str(checkpoints)!r} has {free / 2**30:.1f} GiB free, and two checkpoints take "
            f"{needed / 2**30:.1f} GiB: free the space, or set checkpoint_path to another disk"
        )


def _whole_bytes(sae: AnyTrainingSAE) -> float:
    """Of the weights of an SAE, those of other processes' features among them."""
    here = sum(one.numel() * one.element_size() for one in sae.parameters())
    return here * shard_of(sae).d_sae / sae.cfg.d_sae
