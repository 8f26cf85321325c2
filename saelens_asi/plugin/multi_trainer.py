"""SAELens's trainer of several SAEs, where some of them ask for the plugin."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens import MultiSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.types import MultiHookDataProvider

from saelens_asi.plugin.bar import TrainingBar, standing
from saelens_asi.plugin.batches import make_saveable
from saelens_asi.plugin.checkpoints import KeepSettings, run_misfit, sae_misfit, said_of
from saelens_asi.plugin.estimate import initialize_together
from saelens_asi.plugin.fields import asks_for_plugin
from saelens_asi.plugin.kept_run import KeptRun, schedule_settings
from saelens_asi.plugin.launch import is_launched
from saelens_asi.plugin.preflight import check_folders, check_sae
from saelens_asi.plugin.recorder import output_folder
from saelens_asi.plugin.stream import check_hooks, open_stream
from saelens_asi.plugin.trainer import (
    PluginTrainer,
    given_arguments,
    until_interrupted,
)


class PluginMultiTrainer(KeptRun, MultiSAETrainer):
    """What ``MultiSAETrainer`` does beyond SAELens where an SAE asks for it; mixed into the trainer's class."""

    data_provider: MultiHookDataProvider
    n_training_steps: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if is_launched():
            raise ValueError(
                "several SAEs at once are trained by one process: start MultiSAETrainingRunner without torchrun, or "
                "train each SAE by a run of its own, whose features torchrun's processes share"
            )
        super().__init__(*args, **kwargs)
        self._flagged = {name: one for name, one in self.trainers.items() if isinstance(one, PluginTrainer)}
        for single in self._flagged.values():
            single.coordinator = self
        self._has_ended, self._bar = False, TrainingBar()
        self._keep(*_shared_settings(self._flagged), self.data_provider, self.evaluator)

    def _settings(self) -> dict[str, Any]:
        return {**schedule_settings(self.cfg), **self.data_state.settings, "hooks_of_saes": self.hook_names}

    def misfit(self, path: Path) -> str:
        missing = [name for name in self.saes if not (path / name).is_dir()]
        if missing:
            return f"it holds no {', '.join(missing)}"
        differences = {name: sae_misfit(path / name, sae.cfg) for name, sae in self.saes.items()}
        of_saes = [f"{name}: {text}" for name, text in differences.items() if text]
        return "; ".join(filter(None, (*of_saes, run_misfit(path, self._settings()))))

    def fit(self) -> dict[str, TrainingSAE[Any]]:
        self._resume_if_asked()
        for sae in self.saes.values():
            check_sae(sae)
        output = output_folder(self.save_checkpoint_fn)
        check_folders({"checkpoint_path": self.cfg.checkpoint_path, "output_path": output}, list(self.saes.values()))
        try:
            with self._kept() as self.data_provider:
                return super().fit()
        finally:
            for single in self._flagged.values():
                single.close_tensorboard()

    def _estimate_scaling_factors(self) -> None:
        place_histories(self)
        self._bar.began_at = self.n_training_samples
        initialize_multi_trainer(self, super()._estimate_scaling_factors)
        if self.keeper is not None:
            self.keeper.clock.start()

    def _maybe_log_sparsity(self, final: bool = False) -> None:
        """SAELens's first act of a step: between two steps, so here is where a run is saved, or ends on a signal."""
        if not final:
            self._between_steps()
        super()._maybe_log_sparsity(final)

    def _update_pbar(self, step_outputs: Mapping[str, TrainStepOutput], pbar: Any, update_interval: int = 100) -> None:
        """SAELens's bar moves every so many steps, from zero also after a resume; here with each, from where it was."""
        stock = super()._update_pbar
        if stock.__func__ is not MultiSAETrainer._update_pbar:  # type: ignore[attr-defined]
            stock(step_outputs, pbar)  # a subclass of the user's has another one
            return
        self._bar.move(
            pbar,
            self.n_training_samples,
            lambda: {name: standing(self.trainers[name], output) for name, output in step_outputs.items()},
        )

    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """SAELens's checkpoint of all SAEs, whole or not there, with all that the rest of the run follows from."""
        if self._has_ended:
            return  # SAELens's runner saves once more on an interrupt, past the manifest
        if self.keeper is None:
            super().save_checkpoint(checkpoint_name, wandb_aliases)
        else:
            self._save_whole(checkpoint_name, "asked for", wandb_aliases=wandb_aliases)

    def check_finite(self) -> None:
        for single in self._flagged.values():
            single.check_finite()

    def _write(self, folder: Path, wandb_aliases: list[str] | None) -> None:
        # All SAEs have trained on the same batches.
        of_first = next(iter(self._flagged.values())).data_state
        self.data_state.place, self.data_state.untrained = of_first.place, of_first.untrained
        super().save_checkpoint(folder.name, wandb_aliases)

    def load_checkpoint(self, path: Path | str) -> None:
        """All of a checkpoint, after a look at whether it is whole and fits.

        Raises:
            FileNotFoundError: where it lacks an SAE.
            ValueError: for a checkpoint that is damaged, or of a run with other settings; names the differences.
        """
        path = Path(path)
        if all((path / name).is_dir() for name in self.saes):  # SAELens has a message of its own for those that lack
            self._check_resume(path)
        with said_of(path):
            super().load_checkpoint(path)
            self.data_state.load(path)
        for single in self.trainers.values():
            single.n_training_steps = single.lr_scheduler.last_epoch
        self.n_training_steps = next(iter(self.trainers.values())).n_training_steps
        for single in self._flagged.values():
            single.data_state.place = self.data_state.place
        self._has_resumed(path)

    def resume_from(self, path: Path) -> None:
        self.load_checkpoint(path)

    def steps_done(self) -> int:
        return next(iter(self._flagged.values())).steps_done()

    def _torn(self) -> str:
        steps = {(single.lr_scheduler.last_epoch, single.n_training_samples) for single in self.trainers.values()}
        if len(steps) > 1 or not all(single.progress.is_whole for single in self._flagged.values()):
            return "ended within a step, which some SAEs have taken and others not"
        self.n_training_samples = steps.pop()[1]  # SAELens counts after the last SAE of a step
        return ""

    def _has_begun(self) -> bool:
        return self.steps_done() > 0 and not any(one.initialization_pending for one in self._flagged.values())

    def _leave_runner_nothing_to_save(self) -> None:
        self._has_ended = True


def _shared_settings(flagged: Mapping[str, PluginTrainer]) -> tuple[KeepSettings, str | None]:
    """How the run is kept and what it resumes from, which its SAEs have to agree on."""
    settings = {name: (KeepSettings.of(one.sae.cfg), one.sae.cfg.resume) for name, one in flagged.items()}
    (first, shared), *others = settings.items()
    for name, other in others:
        if other != shared:
            raise ValueError(
                "checkpoint_minutes, keep_checkpoints, checkpoint_buffer and resume are of the whole run: "
                f"{first} has {shared}, and {name} has {other}. Set them to the same"
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
