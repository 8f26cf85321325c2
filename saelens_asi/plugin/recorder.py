"""The training history of runs with the flags, whether or not W&B is on: measured on the step's own tensors."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.synthetic import SyntheticSAERunnerConfig
from torch import Tensor

from saelens_asi.history import TRAINING_HISTORY, History, Record, read_history
from saelens_asi.plugin.sparse_steps import SparseTrainer

logger = logging.getLogger(__name__)

# Within how many tokens a feature has to fire; arXiv 2508.16929 counts over the last of them.
SILENT_TOKENS = (100_000, 1_000_000, 10_000_000)

_RUNNER_CONFIGS = (LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig, SyntheticSAERunnerConfig)


class HistoryTrainer(SparseTrainer):
    """A trainer that keeps a history: ``trainer.history``, and a file in the run's folder where it has one.

    A line costs a few reductions over (batch, d_in) and (d_sae,), every ``logger.wandb_log_frequency`` steps; no
    forward pass, and nothing of batch x d_sae.
    """

    history: list[Record]  # where a subclass has a history of its own, this one is in the file only
    _run_history: History
    _history_folder: Path | None = None
    _output_folder: Path | None = None
    _clock: float | None = None
    _seconds_before: float = 0.0

    def start_history(self, checkpoint_path: str | Path | None, output_path: str | Path | None) -> None:
        """Say where the history goes: it grows with the checkpoints, and is copied beside the finished SAE."""
        live = checkpoint_path if checkpoint_path is not None else output_path
        self._history_folder = None if live is None else Path(live)
        self._output_folder = None if output_path is None else Path(output_path)

    def step(self, batch: Tensor) -> TrainStepOutput:
        if self._clock is None:
            self._clock = time.perf_counter()
        if not self._is_recorded(len(batch)):
            return super().step(batch)
        lr, firings = self.optimizer.param_groups[0]["lr"], self._count_of_firings()
        self.gradient_norm = None
        output = super().step(batch)
        l0 = (self._count_of_firings() - firings) / len(batch)
        self._record({**self._place(lr), **self._measure(output), "l0": float(l0), **self._count_silent()})
        return output

    def _is_recorded(self, n_samples: int) -> bool:
        is_last = self.n_training_samples + n_samples >= self.cfg.total_training_samples
        every = self.cfg.logger.wandb_log_frequency
        return is_last or (every > 0 and (self._steps_done() + 1) % every == 0)

    def _steps_done(self) -> int:
        """The schedule counts what ``n_training_steps`` misses: SAELens's checkpoints hold one step too few of it."""
        return self.lr_scheduler.last_epoch

    def _count_of_firings(self) -> Tensor:
        dtype = torch.float32 if self.act_freq_scores.device.type == "mps" else torch.float64
        return self.act_freq_scores.sum(dtype=dtype)

    def _place(self, lr: float) -> Record:
        seconds = self._seconds_before + time.perf_counter() - (self._clock or 0.0)
        return {
            "step": self._steps_done(),
            "n_tokens": self.n_training_samples,
            "seconds": round(seconds, 3),
            "lr": float(lr),
            "grad_norm": None if self.gradient_norm is None else float(self.gradient_norm),
            "coefficients": {name: float(value) for name, value in self.get_coefficients().items()},
        }

    @torch.no_grad()
    def _measure(self, output: TrainStepOutput) -> Record:
        x = output.sae_in.detach()
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        error = torch.linalg.vector_norm(output.sae_out.detach() - x).square()
        nmse = float(error / (len(x) * x.var(dim=0, correction=0).sum()))
        return {
            "loss": float(output.loss.detach()),
            "losses": {name: _number(value) for name, value in output.losses.items()},
            "metrics": {name: _number(value) for name, value in output.metrics.items()},
            "nmse": nmse,
            "explained_variance": 1 - nmse,
        }

    @torch.no_grad()
    def _count_silent(self) -> Record:
        steps, batch = self.n_forward_passes_since_fired, self.cfg.train_batch_size_samples
        dead = int(self.dead_neurons.sum())
        reached = [n for n in SILENT_TOKENS if n <= self.n_training_samples]
        return {
            "d_sae": len(steps),
            "dead_features": dead,
            "dead_fraction": dead / len(steps),
            "dead_window_tokens": self.cfg.dead_feature_window * batch,
            "silent_features": {str(n): int((steps * batch >= n).sum()) for n in reached},
            "never_fired": int((steps >= self._steps_done()).sum()),
        }

    def _record(self, record: Record) -> None:
        if self._history_folder is None and not self._run_history.records:
            logger.info("this run has no folder: its training history is kept in memory, as trainer.history")
        try:
            self._run_history.append(record)
            if self._run_history.path is None and self._history_folder is not None:
                self._run_history.write_to(self._history_folder / TRAINING_HISTORY)
        except OSError as error:
            logger.warning("the training history goes on in memory only (trainer.history): %s", error)
            self._run_history.keep_in_memory()
            self._history_folder = None

    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is not None:
            self._copy_history(Path(base) / checkpoint_name)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Go on from a checkpoint, and with the history up to it; what came after it is dropped."""
        super().load_trainer_state(checkpoint_path)
        path = Path(checkpoint_path) / TRAINING_HISTORY
        records = read_history(path) if path.exists() else []
        self._run_history.restart(record for record in records if record["step"] <= self._steps_done())
        self._clock = None
        kept = self._run_history.records
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0

    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        if self._output_folder is not None and self._output_folder != self._history_folder:
            self._copy_history(self._output_folder)

    def _copy_history(self, folder: Path) -> None:
        try:
            self._run_history.copy_to(folder / TRAINING_HISTORY)
        except OSError as error:
            logger.warning("the training history is not in %s: %s", folder, error)


def _number(value: Any) -> float:
    return float(value() if callable(value) else value)


def output_folder(save_checkpoint_fn: Any) -> Path | None:
    """Where SAELens's runner writes the finished SAE. A trainer knows it only through its runner's own method."""
    cfg = getattr(getattr(save_checkpoint_fn, "__self__", None), "cfg", None)
    if not isinstance(cfg, _RUNNER_CONFIGS) or cfg.output_path is None:
        return None
    return Path(cfg.output_path)


def place_histories(trainer: Any) -> None:
    """Give the trainers inside a ``MultiSAETrainer`` a folder each, named as its SAE."""
    checkpoints, output = trainer.cfg.checkpoint_path, output_folder(trainer.save_checkpoint_fn)
    for name, single in trainer.trainers.items():
        if isinstance(single, HistoryTrainer):
            single.start_history(checkpoints and Path(checkpoints) / name, output and output / name)
