"""SAELens's trainer of several SAEs, where some of them ask for the plugin."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens import MultiSAETrainingRunner
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SaveCheckpointFn
from sae_lens.training.types import MultiHookDataProvider

from saelens_asi.plugin.batches import make_saveable
from saelens_asi.plugin.checkpoints import (
    LATEST,
    Keeper,
    KeepSettings,
    Reason,
    check_whole,
    find_latest,
    how_to_resume,
    refuse_misfit,
    run_misfit,
    sae_misfit,
    said_of,
)
from saelens_asi.plugin.data_state import DataState
from saelens_asi.plugin.estimate import initialize_together
from saelens_asi.plugin.interrupts import Interrupts
from saelens_asi.plugin.preflight import check_folders, check_sae
from saelens_asi.plugin.recorder import output_folder
from saelens_asi.plugin.stream import check_hooks, open_stream
from saelens_asi.plugin.trainer import (
    PluginTrainer,
    asks_for_plugin,
    given_arguments,
    runner_of,
    schedule_settings,
    until_interrupted,
)
from saelens_asi.resume import one_writer

logger = logging.getLogger(__name__)


class PluginMultiTrainer(MultiSAETrainer):
    """What ``MultiSAETrainer`` does beyond SAELens where an SAE asks for it; mixed into the trainer's class."""

    cfg: SAETrainerConfig
    data_provider: MultiHookDataProvider
    save_checkpoint_fn: SaveCheckpointFn | None
    checkpoint_thresholds: list[int]
    n_training_steps: int
    n_training_samples: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._flagged = {name: one for name, one in self.trainers.items() if isinstance(one, PluginTrainer)}
        for single in self._flagged.values():
            single.coordinator = self
        self._keep_settings = _shared_settings(self._flagged)
        self.data_state = DataState(self.data_provider, self.evaluator)
        self.interrupts = Interrupts()
        self.run_id = uuid.uuid4().hex[:8]
        self._has_ended = False
        self._runner = runner_of(self.save_checkpoint_fn)
        self.keeper = self._make_keeper()
        self._resolve_latest()

    def _make_keeper(self) -> Keeper | None:
        folder = self.cfg.checkpoint_path
        return None if folder is None else Keeper(self._keep_settings, Path(folder), self._facts)

    def _facts(self) -> dict[str, Any]:
        return {
            "run": self.run_id,
            "n_training_steps": self.n_training_steps,
            "n_training_samples": self.n_training_samples,
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return {**schedule_settings(self.cfg), **self.data_state.settings, "hooks_of_saes": self.hook_names}

    def misfit(self, path: Path) -> str:
        """How a checkpoint's run differs from this one, in words."""
        missing = [name for name in self.saes if not (path / name).is_dir()]
        if missing:
            return f"it holds no {', '.join(missing)}"
        differences = {name: sae_misfit(path / name, sae.cfg) for name, sae in self.saes.items()}
        of_saes = [f"{name}: {text}" for name, text in differences.items() if text]
        return "; ".join(filter(None, (*of_saes, run_misfit(path, self._settings()))))

    def _resolve_latest(self) -> None:
        cfg = getattr(self._runner, "cfg", None)
        wanted = getattr(cfg, "resume_from_checkpoint", None)
        if cfg is None or self.keeper is None or wanted != LATEST:
            return
        base = self.keeper.folder
        found = find_latest([base, base.parent, *base.parent.glob("*/")], self.misfit)
        self._runner.cfg = cfg = copy.copy(cfg)  # the user's stays as it was
        cfg.resume_from_checkpoint = None if found is None else str(found)
        if found is None:
            logger.warning("no checkpoint to resume from: the run starts at its beginning")
            return
        cfg.checkpoint_path = str(found.parent)
        self.cfg = replace(self.cfg, checkpoint_path=str(found.parent))
        self.keeper = self._make_keeper()

    def fit(self) -> dict[str, TrainingSAE[Any]]:
        self._resume_if_asked()
        with ExitStack() as stack:
            for sae in self.saes.values():
                check_sae(sae)
            output = output_folder(self.save_checkpoint_fn)
            check_folders(
                {"checkpoint_path": self.cfg.checkpoint_path, "output_path": output}, list(self.saes.values())
            )
            if self.keeper is not None:
                stack.enter_context(one_writer(self.keeper.folder, "checkpoint_path"))
            stack.enter_context(self.interrupts.held_back())
            stack.callback(self.data_state.close)
            self.data_provider = self.data_state.start()
            try:
                return super().fit()
            except BaseException as error:
                self._save_after(error)
                raise

    def _estimate_scaling_factors(self) -> None:
        place_histories(self)
        initialize_multi_trainer(self, super()._estimate_scaling_factors)
        if self.keeper is not None:
            self.keeper.start_clock()

    def _maybe_log_sparsity(self, final: bool = False) -> None:
        """SAELens's first act of a step: between two steps, so here is where a run is saved, or ends on a signal."""
        if not final:
            if self.interrupts.received is not None:
                raise self.interrupts.exception()
            name = str(self.n_training_samples)
            if self.keeper is not None and self.n_training_samples and self.keeper.is_due(name):
                self.keeper.save_or_warn(lambda: self._save_whole(name, "interval"))
        super()._maybe_log_sparsity(final)

    def _checkpoint_if_needed(self) -> None:
        if self.checkpoint_thresholds and self.n_training_samples > self.checkpoint_thresholds[0]:
            name = str(self.n_training_samples)
            if self.keeper is None:
                self.save_checkpoint(name)
            else:
                self.keeper.save_or_warn(lambda: self.save_checkpoint(name))
            self.checkpoint_thresholds.pop(0)

    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """SAELens's checkpoint of all SAEs, whole or not there, with all that the rest of the run follows from."""
        if self._has_ended:
            return  # SAELens's runner saves once more on an interrupt, past the manifest
        if self.keeper is None:
            super().save_checkpoint(checkpoint_name, wandb_aliases)
        else:
            self._save_whole(checkpoint_name, "asked for", wandb_aliases)

    def _save_whole(self, name: str, reason: Reason, wandb_aliases: list[str] | None = None) -> None:
        assert self.keeper is not None
        for single in self._flagged.values():
            single.check_finite()
        # All SAEs have trained on the same batches.
        of_first = next(iter(self._flagged.values())).data_state
        self.data_state.place, self.data_state.untrained = of_first.place, of_first.untrained
        own_fn = self.save_checkpoint_fn if self._runner is None else None
        if own_fn is not None:
            self.save_checkpoint_fn = None
        try:
            with self.keeper.writing(name, reason) as folder:
                super().save_checkpoint(folder.name, wandb_aliases)
                self.data_state.save(folder, self.keeper.settings.buffer_bytes)
        finally:
            if own_fn is not None:
                self.save_checkpoint_fn = own_fn
        if own_fn is not None:
            own_fn(checkpoint_path=self.keeper.folder / name)

    def load_checkpoint(self, path: Path | str) -> None:
        """All of a checkpoint, after a look at whether it is whole and fits.

        Raises:
            FileNotFoundError: where it lacks an SAE.
            ValueError: for a checkpoint that is damaged, or of a run with other settings; names the differences.
        """
        path = Path(path)
        check_whole(path)
        if all((path / name).is_dir() for name in self.saes):  # SAELens has a message of its own for those that lack
            refuse_misfit(path, self.misfit(path))
        with said_of(path):
            super().load_checkpoint(path)
            self.data_state.load(path)
        for single in self.trainers.values():
            single.n_training_steps = single.lr_scheduler.last_epoch
        self.n_training_steps = next(iter(self.trainers.values())).n_training_steps
        self.checkpoint_thresholds = [n for n in self.checkpoint_thresholds if n >= self.n_training_samples]
        for single in self._flagged.values():
            single.data_state.place = self.data_state.place
        if self.keeper is not None:
            self.keeper.last_good = path

    def _resume_if_asked(self) -> None:
        """``resume`` of the SAEs' configs."""
        wanted = {single.sae.cfg.resume for single in self._flagged.values()} - {None}
        if not wanted or self.n_training_samples or self.keeper is None:
            return
        found = find_latest([self.keeper.folder], self.misfit) if wanted == {LATEST} else Path(wanted.pop())
        if found is not None:
            self.load_checkpoint(found)

    def _save_after(self, error: BaseException) -> None:
        """Save what there is when a run ends early, and say how it goes on."""
        self._has_ended, keeper = True, self.keeper
        if keeper is None or isinstance(error, FloatingPointError):
            return
        if not self.n_training_samples or any(one.initialization_pending for one in self._flagged.values()):
            logger.warning("ended before training began: there is nothing to save, the same command starts again")
            return
        steps = {(single.lr_scheduler.last_epoch, single.n_training_samples) for single in self.trainers.values()}
        if len(steps) > 1 or not all(single.progress.is_whole for single in self._flagged.values()):
            logger.error(
                "ended within a step (%r), which some SAEs have taken and others not: no checkpoint can be written of "
                "that. %s",
                error,
                how_to_resume(keeper.last_good),
            )
            return
        self.n_training_steps, self.n_training_samples = steps.pop()
        path = keeper.folder / str(self.n_training_samples)
        reason: Reason = "interrupt" if self.interrupts.received is not None else "failure"
        if keeper.last_good != path:
            keeper.save_or_warn(lambda: self._save_whole(path.name, reason))
        logger.warning(
            "ended after %d samples (%s): %s",
            self.n_training_samples,
            self.interrupts.received.name if self.interrupts.received is not None else repr(error),
            how_to_resume(keeper.last_good),
        )


def _shared_settings(flagged: Mapping[str, PluginTrainer]) -> KeepSettings:
    """The run's, which its SAEs have to agree on."""
    settings = {name: KeepSettings.of(single.sae.cfg) for name, single in flagged.items()}
    (first, shared), *others = settings.items()
    for name, other in others:
        if other != shared:
            raise ValueError(
                f"checkpoint_minutes, keep_checkpoints and checkpoint_buffer are of the whole run: {first} has "
                f"{shared}, and {name} has {other}. Set them to the same"
            )
    return shared


def extend_multi_trainer() -> None:
    """Every construction of a ``MultiSAETrainer`` passes here; one without our fields passes untouched."""
    stock_new, stock_init = MultiSAETrainer.__new__, MultiSAETrainingRunner.__init__
    signature = inspect.signature(MultiSAETrainer.__init__)

    def __new__(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        saes = given_arguments(signature, args, kwargs).get("saes") or {}
        if any(asks_for_plugin(sae.cfg) for sae in saes.values()):
            cls = plugin_multi_trainer_class(cls)  # type: ignore[arg-type]
        return object.__new__(cls) if stock_new is object.__new__ else stock_new(cls, *args, **kwargs)

    @functools.wraps(stock_init)
    def __init__(self: MultiSAETrainingRunner, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        # Here, since the runner's prefetcher starts to read before a trainer is there.
        if any(asks_for_plugin(sae.cfg) for sae in self.saes.values()):
            make_saveable(self.activations_store)

    MultiSAETrainer.__new__ = staticmethod(__new__)  # type: ignore[assignment]
    MultiSAETrainingRunner.__init__ = __init__  # type: ignore[method-assign]


@cache
def plugin_multi_trainer_class(base: type[MultiSAETrainer]) -> type[MultiSAETrainer]:
    """``base`` with ``PluginMultiTrainer`` mixed in."""
    if issubclass(base, PluginMultiTrainer):
        return base
    return type(f"{base.__name__}WithActiveSubspace", (PluginMultiTrainer, base), {"__module__": __name__})


def place_histories(trainer: MultiSAETrainer) -> None:
    """Give the trainers inside a ``MultiSAETrainer`` a folder each, named as its SAE."""
    checkpoints, output = trainer.cfg.checkpoint_path, output_folder(trainer.save_checkpoint_fn)
    for name, single in trainer.trainers.items():
        if isinstance(single, PluginTrainer):
            single.place_history(
                None if checkpoints is None else Path(checkpoints) / name, None if output is None else output / name
            )


@torch.no_grad()
def initialize_multi_trainer(trainer: PluginMultiTrainer, estimate_normalization: Callable[[], None]) -> None:
    """Initialise every SAE of a ``MultiSAETrainer`` that asks for it, from one pass over the activations.

    Args:
        trainer: the coordinator of all SAEs.
        estimate_normalization: SAELens's own first step, which comes before the initialization.
    """
    pending: dict[str, list[PluginTrainer]] = {}
    for name, single in trainer.trainers.items():
        if isinstance(single, PluginTrainer) and single.initialization_pending:
            pending.setdefault(trainer.hook_names[name], []).append(single)
    widths = {hook_name: trainer.saes[name].cfg.d_in for name, hook_name in trainer.hook_names.items()}
    check_hooks(trainer.data_provider, trainer.evaluator, widths)
    estimate_normalization()
    if pending:
        with open_stream(trainer.data_provider, trainer.evaluator, list(pending)) as stream:
            initialize_together(pending, until_interrupted(stream, trainer.interrupts))
