"""A trainer whose SAE's features are spread over processes: what it tells of all of them, saves and reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from saelens_asi.plugin.fields import AnyTrainingSAE
from saelens_asi.plugin.launch import check_alike
from saelens_asi.plugin.sharded_checkpoints import (
    SHARDS,
    ShardedTensors,
    make_room_,
    read_shards,
    read_stock,
    write_shards,
)
from saelens_asi.plugin.sharded_sae import whole_config
from saelens_asi.resume import failing_together, save_tensors, write_json
from saelens_asi.sparse.shards import Shard

_NUMBERS = ("n_training_samples", "n_training_steps", "n_frac_active_samples", "started_fine_tuning")


class ShardedRun(SAETrainer[Any, Any]):
    """Mixed into a trainer of SAELens. Its tensors by feature are those of the features that lie in this process.

    Where the process is alone all of it is SAELens's own. Otherwise all processes have to call it.
    """

    shard: Shard
    _l0: Tensor  # of the step that was recorded last

    def _alike(self, cfg: SAETrainerConfig, sae: AnyTrainingSAE) -> SAETrainerConfig:
        """The config that all processes share; SAELens has each add a name of its own to the folder of checkpoints."""
        world = self.shard.world
        cfg = dataclasses.replace(cfg, checkpoint_path=world.of_first(cfg.checkpoint_path))
        of_trainer = {name: value for name, value in vars(cfg).items() if name != "logger"}
        of_sae = whole_config(sae).to_dict()
        check_alike(world, {**of_trainer, **of_sae.pop("metadata"), **of_sae, "batch_shards": sae.cfg.batch_shards})
        return cfg

    def _of_batch(self, output: TrainStepOutput) -> TrainStepOutput:
        """The output with activations and reconstructions of all tokens of the batch, where others see some of them."""
        tokens = self.shard.tokens
        sae_in, sae_out = (torch.cat(tokens.gather_rows(one)) for one in (output.sae_in, output.sae_out))
        return dataclasses.replace(output, sae_in=sae_in, sae_out=sae_out)

    @property
    def feature_sparsity(self) -> Tensor:
        """Of all features, also those of other processes, which have to ask for it too."""
        here: Tensor = super().feature_sparsity
        return self.shard.of_all(here)

    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        """SAELens's, of all features."""
        logged = super().build_train_step_log_dict(output, n_training_samples)
        if not self.shard.is_whole:
            silent, dead = self.n_forward_passes_since_fired.sum(), self.dead_neurons.sum()
            n_silent, n_dead = self.shard.features.sum_(torch.stack([silent, dead])).tolist()
            logged["sparsity/mean_passes_since_fired"] = n_silent / self.shard.d_sae
            logged["sparsity/dead_features"] = int(n_dead)
            logged["metrics/l0"] = float(self._l0)
        return logged

    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        if self.n_frac_active_samples > 0:
            n_dead = self.shard.features.sum_(self.dead_neurons.sum())
            self.sae.cfg.metadata.num_dead_features = int(n_dead)

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """SAELens's; of several processes the first saves what is not by feature."""
        if self.shard.is_whole:
            super().save_trainer_state(checkpoint_path)
        else:
            _save_rest(self, checkpoint_path)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """All of a checkpoint of any number of processes, the weights among it."""
        path = Path(checkpoint_path)
        if self.shard.is_whole and not (path / SHARDS).is_dir():
            super().load_trainer_state(path)
            # Read here too: SAELens's runners do it next, and a trainer made by hand resumes in one call.
            self.sae.load_weights_from_checkpoint(path)
        else:
            self._read_shards(path)

    def _write_shards(self, folder: Path) -> None:
        """What SAELens writes into a checkpoint: by feature from all processes at once, the rest from the first."""
        log_feature_sparsity = self.log_feature_sparsity
        write_shards(folder, self._sharded_tensors(), self.shard)
        if self.shard.world.is_first:
            write_json(folder / SAE_CFG_FILENAME, whole_config(self.sae).to_dict())
            save_tensors(folder / SPARSITY_FILENAME, {"sparsity": log_feature_sparsity})
            self.save_trainer_state(folder)
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=folder)

    def _read_shards(self, path: Path) -> None:
        """This process's features of what any number of processes wrote."""
        with failing_together(self.shard.world):
            make_room_(self.sae, self.optimizer, path)
            _load_rest(self, path)
        read = read_shards if (path / SHARDS).is_dir() else read_stock
        read(path, self._sharded_tensors(), self.shard)
        _skip_reading_once(self.sae, path)

    def _sharded_tensors(self) -> ShardedTensors:
        counters = {name: getattr(self, name) for name in ("act_freq_scores", "n_forward_passes_since_fired")}
        return ShardedTensors.of(self.sae, self.optimizer, counters)


def _save_rest(trainer: Any, folder: Path) -> None:
    """SAELens's files of a trainer's state, by its names, without tensors that are as large as d_sae."""
    state = {name: getattr(trainer, name) for name in _NUMBERS}
    state["lr_scheduler"] = trainer.lr_scheduler.state_dict()
    state["coefficient_schedulers"] = {name: one.state_dict() for name, one in trainer.coefficient_schedulers.items()}
    state["optimizer"] = {"state": {}, "param_groups": trainer.optimizer.state_dict()["param_groups"]}
    torch.save(state, folder / TRAINER_STATE_FILENAME)
    trainer.activation_scaler.save(str(folder / ACTIVATION_SCALER_CFG_FILENAME))


def _load_rest(trainer: Any, folder: Path) -> None:
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


def _skip_reading_once(sae: Any, folder: Path) -> None:
    """Have SAELens's runner, which reads an SAE's weights from a checkpoint next, find them read."""
    stock = sae.load_weights_from_checkpoint

    def load_weights_from_checkpoint(checkpoint_path: Path | str) -> None:
        vars(sae).pop("load_weights_from_checkpoint")
        if Path(checkpoint_path) != folder:
            stock(checkpoint_path)

    vars(sae)["load_weights_from_checkpoint"] = load_weights_from_checkpoint
