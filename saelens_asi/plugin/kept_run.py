"""A run that is saved while it goes, and goes on from there: what trainers of one and of several SAEs share."""

from __future__ import annotations

import copy
import logging
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SaveCheckpointFn

from saelens_asi.interrupts import Interrupts
from saelens_asi.plugin.checkpoints import (
    LATEST,
    Keeper,
    KeepSettings,
    Reason,
    check_whole,
    find_latest,
    how_to_resume,
    refuse_misfit,
)
from saelens_asi.plugin.data_state import DataState
from saelens_asi.plugin.launch import of_first_start, only_first
from saelens_asi.plugin.recorder import RUNNER_CONFIGS
from saelens_asi.plugin.stream import Provider
from saelens_asi.resume import failing_together, one_writer, read_manifest
from saelens_asi.sparse.shards import ALONE, Group

logger = logging.getLogger(__name__)

# Their runners add a folder of their own to the user's, another one each time.
_ADD_A_FOLDER = (LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig)


class SavesCheckpoints(Protocol):
    """What SAELens's trainers have."""

    def save_checkpoint(self, checkpoint_name: str) -> None: ...


class KeptRun:
    """Mixed into a trainer of SAELens, which says what a checkpoint of it is."""

    cfg: SAETrainerConfig
    save_checkpoint_fn: SaveCheckpointFn | None
    checkpoint_thresholds: list[int]
    n_training_samples: int
    keeper: Keeper | None = None
    _told: Callable[[], torch.Tensor] | None = None  # what processes have asked one another in the last step
    _checked: Path | None = None  # the checkpoint that was looked for, and found whole and fitting

    @abstractmethod
    def misfit(self, path: Path) -> str:
        """How a checkpoint's run differs from this one, in words; empty where a resume goes on as the run would."""

    @abstractmethod
    def check_finite(self) -> None:
        """Raise FloatingPointError where weights, moments or too many activations are not finite: as none is saved."""

    @abstractmethod
    def resume_from(self, path: Path) -> None:
        """Load all of a checkpoint."""

    @abstractmethod
    def _write(self, folder: Path, wandb_aliases: list[str] | None) -> None:
        """Write a checkpoint's files to a folder that has another name once it is whole."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What a resume has to share, beside the SAEs' configs."""

    @abstractmethod
    def steps_done(self) -> int:
        """Steps of the optimizer."""

    @abstractmethod
    def _torn(self) -> str:
        """Why the state is not that of a whole step, in words; empty where it is."""

    @abstractmethod
    def _has_begun(self) -> bool:
        """Whether there are trained weights to save."""

    def _keep(
        self,
        settings: KeepSettings,
        resume: str | None,
        provider: Provider,
        evaluator: object,
        world: Group = ALONE,
    ) -> None:
        """To be called once the trainer is made; ``world`` are the processes that are kept together."""
        self._keep_settings, self._resume, self._world = settings, resume, world
        self.data_state, self.interrupts = DataState(provider, evaluator), Interrupts()
        self.run_id = world.of_first(uuid.uuid4().hex[:8])
        self._runner = runner_of(self.save_checkpoint_fn)
        if self._runner is not None and not world.is_first:
            self._leave_runner_to_first()
        self._make_keeper()
        self._resolve_latest()

    def _make_keeper(self) -> None:
        folder = self.cfg.checkpoint_path
        self.keeper = None if folder is None else Keeper(self._keep_settings, Path(folder), self._facts, self._world)

    def _facts(self) -> dict[str, Any]:
        return {
            "run": self.run_id,
            "n_training_steps": self.steps_done(),
            "n_training_samples": self.n_training_samples,
            "settings": self._settings(),
        }

    def _resolve_latest(self) -> None:
        """Have the runner resume from the newest checkpoint where its config says 'latest', in that run's folder; and
        from the newest of this run where torchrun has started its processes again."""
        cfg: Any = getattr(self._runner, "cfg", None)
        is_runners = hasattr(cfg, "resume_from_checkpoint")
        asked = cfg.resume_from_checkpoint if is_runners else self._resume
        first = only_first(self._world, self._first_start)
        if asked == LATEST and is_runners:
            found: str | Path | None = self._find_latest()
        elif asked != LATEST and first is not None:
            folder = Path(first["folder"])
            self._go_on_in(folder)
            found = self._find_latest([folder], first["time"]) or asked
        else:
            return  # LATEST of an SAE's config is looked for by ``fit``
        if not is_runners:
            self._resume = None if found is None else str(found)
            return
        self._runner.cfg = cfg = copy.copy(cfg)  # the user's stays as it was
        cfg.resume_from_checkpoint = None if found is None else str(found)
        cfg.checkpoint_path = self.cfg.checkpoint_path

    def _first_start(self) -> dict[str, Any] | None:
        """Where this run began to write, and when, if torchrun has started its processes again since."""
        if self.keeper is None:
            return None
        here = {"folder": str(self.keeper.folder.absolute()), "time": time.time()}
        first: dict[str, Any] | None = of_first_start(here)
        return first

    def _find_latest(self, folders: list[Path] | None = None, since: float = 0.0) -> Path | None:
        """The newest checkpoint that fits, in these folders or else in all that runs of this path write to."""
        found = only_first(self._world, lambda: self._newest(folders, since))
        if found is None:
            if self._world.is_first:
                as_then = "at its beginning" if folders is None else "as it did the first time"
                logger.warning("no checkpoint to resume from: the run starts %s", as_then)
        else:
            self._checked = found
            self._go_on_in(found.parent)
        return found

    def _newest(self, folders: list[Path] | None, since: float) -> Path | None:
        if self.keeper is None:
            return None
        if folders is None:
            base = self.keeper.folder
            adds = isinstance(getattr(self._runner, "cfg", None), _ADD_A_FOLDER)
            folders = [base, *([base.parent, *base.parent.glob("*/")] if adds else [])]
        return find_latest(folders, self.misfit, since)

    def _go_on_in(self, folder: Path) -> None:
        self.cfg = replace(self.cfg, checkpoint_path=str(folder))
        self._make_keeper()

    def _check_resume(self, path: Path) -> None:
        """Raise ValueError for a checkpoint that is damaged, or of a run with other settings."""
        if path == self._checked:  # every byte of it was read a moment ago
            self._checked = None
            return

        def check() -> None:
            check_whole(path)
            refuse_misfit(path, self.misfit(path))

        only_first(self._world, check)

    def _has_resumed(self, path: Path) -> None:
        """The same run goes on, and counts the checkpoints that it wrote before as its own."""
        self.run_id = (read_manifest(path) or {}).get("run", self.run_id)
        self.checkpoint_thresholds = [n for n in self.checkpoint_thresholds if n >= self.n_training_samples]
        if self.keeper is not None:
            self.keeper.last_good = path

    def _resume_if_asked(self) -> None:
        """``resume`` of an SAE's config: for runners that know no checkpoint to resume from."""
        if self._resume is None or self.n_training_samples:
            return
        found = self._find_latest() if self._resume == LATEST else Path(self._resume)
        if found is not None:
            self.resume_from(found)

    @contextmanager
    def _kept(self) -> Iterator[Provider]:
        """Hold the run's folder and its signals while it trains; save what there is when it ends early.

        Yields what the trainer draws from.
        """
        with ExitStack() as stack:
            with failing_together(self._world):
                if self.keeper is not None and self._world.is_first:
                    stack.enter_context(one_writer(self.keeper.folder, "checkpoint_path"))
            stack.enter_context(self.interrupts.held_back())
            stack.callback(self.data_state.close)
            try:
                yield self.data_state.start()
            except BaseException as error:
                self._save_after(error)
                raise

    def _between_steps(self) -> None:
        """Where a run is saved, by time or for a signal, which then does what it would have done."""
        name = str(self.n_training_samples)
        is_due = self.keeper is not None and self.n_training_samples > 0 and self.keeper.is_due(name)
        is_due, is_interrupted = self._agreed(is_due)
        if is_interrupted:
            if self.keeper is not None and self._has_begun() and self.keeper.last_good != self.keeper.folder / name:
                self.keeper.save_or_warn(lambda: self._save_whole(name, "interrupt"))
            self.data_state.stop_together()
            self.interrupts.deliver()
        if self.keeper is not None and is_due:
            self.keeper.save_or_warn(lambda: self._save_whole(name, "interval"))

    def _agreed(self, is_due: bool) -> tuple[bool, bool]:
        """Whether a checkpoint is due, as the first process has it, and whether a signal has come to any.

        Of several processes, as it was a step ago: they tell one another while the step goes on. A signal that one has
        received is noted by all.
        """
        received = self.interrupts.received
        if self._world.size == 1:
            return is_due, received is not None
        of_first = is_due and self._world.is_first
        before, now = self._told, torch.tensor([received or 0, of_first])
        self._told = self._world.max_later(now)
        if before is None:
            return False, False
        number, due = before().tolist()
        if number:
            self.interrupts.note(number)
        return bool(due), bool(number)

    def _agree_at_the_end(self) -> None:
        """After the last step: a signal that has come to one process has come to all, and all do what it would do."""
        if self._world.size == 1:
            return
        if self._told is not None:
            self._told()
        number = int(self._world.max_(torch.tensor([self.interrupts.received or 0])))
        if number:
            self.interrupts.note(number)

    def _checkpoint_if_needed(self) -> None:
        if self.checkpoint_thresholds and self.n_training_samples > self.checkpoint_thresholds[0]:
            save = partial(cast(SavesCheckpoints, self).save_checkpoint, str(self.n_training_samples))
            if self.keeper is None:
                save()
            else:
                self.keeper.save_or_warn(save)
            self.checkpoint_thresholds.pop(0)

    def _save_whole(
        self, name: str, reason: Reason, base: Path | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        self.check_finite()
        keeper = self.keeper
        if base is not None and (keeper is None or base != keeper.folder):
            keeper = Keeper(self._keep_settings, base, self._facts, self._world)
        if keeper is None:
            return
        # A function of the user's is told the folder's name, which it has only once it is whole.
        own_fn = self.save_checkpoint_fn if self._runner is None else None
        if own_fn is not None:
            self.save_checkpoint_fn = None
        try:
            with keeper.writing(name, reason) as folder:
                self._write(folder, wandb_aliases)
                if self._world.is_first:  # all are at the same place
                    self.data_state.save(folder, keeper.settings.buffer_bytes)
        finally:
            if own_fn is not None:
                self.save_checkpoint_fn = own_fn
        if own_fn is not None:
            own_fn(checkpoint_path=keeper.folder / name)

    def _save_after(self, error: BaseException) -> None:
        """Save what there is when a run ends early, and say how it goes on."""
        keeper = self.keeper
        self._leave_runner_nothing_to_save()
        if keeper is None or isinstance(error, FloatingPointError):
            return
        if self._world.size > 1:  # the others are elsewhere, or gone: nothing can be written together
            if self._world.is_first and not isinstance(error, ChildProcessError):
                logger.warning("ended (%r): %s", error, how_to_resume(keeper.last_good))
            return
        if not self._has_begun():
            logger.warning("ended before training began: there is nothing to save, the same command starts again")
            return
        if torn := self._torn():
            logger.error(
                "%s (%r): no checkpoint can be written of that. %s", torn, error, how_to_resume(keeper.last_good)
            )
            return
        path = keeper.folder / str(self.n_training_samples)
        if keeper.last_good != path:
            keeper.save_or_warn(lambda: self._save_whole(path.name, "failure"))
        way_out = how_to_resume(keeper.last_good)
        logger.warning("ended after %d samples (%r): %s", self.n_training_samples, error, way_out)

    def _leave_runner_to_first(self) -> None:
        """What SAELens's runner writes is written by one process; the others take part in writing the whole SAE."""
        self._runner.save_checkpoint = self.save_checkpoint_fn = _nothing
        self._runner.save_final_sae = _write_together

    def _leave_runner_nothing_to_save(self) -> None:
        """Keep SAELens's runner from writing a second time, past the manifest, when an interrupt reaches it."""
        if self._runner is not None and self.keeper is not None:
            self._runner.save_checkpoint = _nothing


def _nothing(checkpoint_path: Path | None) -> None:
    """In place of a runner's ``save_checkpoint``."""


def _write_together(sae: Any, output_path: str, log_feature_sparsity: object = None) -> None:
    """In place of a runner's ``save_final_sae``, in all processes but the first."""
    sae.save_inference_model(output_path)


def schedule_settings(cfg: SAETrainerConfig) -> dict[str, Any]:
    """What of a trainer's config a resume has to share."""
    names = (
        *("lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles"),
        *("adam_beta1", "adam_beta2", "train_batch_size_samples", "dead_feature_window", "feature_sampling_window"),
        "autocast",
    )
    settings = {name: getattr(cfg, name) for name in names}
    # A constant rate can go on for longer than was planned; a schedule that ends cannot.
    if cfg.lr_decay_steps > 0 or cfg.lr_scheduler_name != "constant":
        settings["total_training_samples"] = cfg.total_training_samples
    return settings


def runner_of(save_checkpoint_fn: SaveCheckpointFn | None) -> Any:
    """SAELens's runner behind a trainer, which hands it a method of its own; None for a trainer made by hand."""
    runner = getattr(save_checkpoint_fn, "__self__", None)
    return runner if isinstance(getattr(runner, "cfg", None), RUNNER_CONFIGS) else None
