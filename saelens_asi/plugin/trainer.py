"""The SAELens trainer of runs that ask for the plugin: stock, plus initialization, optimizer and history."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig, SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from sae_lens.training.types import DataProvider
from torch import Tensor

from saelens_asi.activations.sae_state import shard_of
from saelens_asi.history import Record
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.interrupts import Interrupts
from saelens_asi.plugin.bar import Standing, TrainingBar, standing, standing_of_record
from saelens_asi.plugin.batches import make_saveable
from saelens_asi.plugin.boards import TensorBoard, all_of, beside_saelens
from saelens_asi.plugin.checkpoints import KeepSettings, how_to_resume, run_misfit, sae_misfit, said_of
from saelens_asi.plugin.estimate import check_settings, initialize_together
from saelens_asi.plugin.fields import CHOICES, AnyTrainingSAE, asks_for_plugin, initializer_settings
from saelens_asi.plugin.fused_steps import DeadWatch
from saelens_asi.plugin.guard import Guard, Progress
from saelens_asi.plugin.kept_run import KeptRun, schedule_settings
from saelens_asi.plugin.launch import losses_named, processes
from saelens_asi.plugin.pace import Pace, dense_step_fits
from saelens_asi.plugin.parallel_store import evaluated_together, share_model_
from saelens_asi.plugin.preflight import check_device, check_run
from saelens_asi.plugin.quirks import refuse_known_failures, with_lr_end
from saelens_asi.plugin.recorder import (
    Recorder,
    Silence,
    StepFacts,
    count_firings,
    output_folder,
)
from saelens_asi.plugin.revival import REVIVAL, Counters, Revival, check_revival
from saelens_asi.plugin.sharded_run import ShardedRun
from saelens_asi.plugin.sharded_sae import check_same_everywhere, extend_saes, shard_, whole_config
from saelens_asi.plugin.sparse_steps import SparseSteps, check_moments, make_optimizer
from saelens_asi.plugin.stream import ActivationStream, Batch, find_store, open_stream
from saelens_asi.resume import save_tensors, write_json
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

SPECTRUM_FILENAME = "active_subspace_spectrum.safetensors"
GUARD = "guard.json"


class PluginTrainer(KeptRun, ShardedRun):
    """What a run with a flag set does beyond SAELens; mixed into the trainer's class.

    Beside the flags, for these runs only: checkpoints are whole and hold all that the rest of the run follows from,
    a signal lets the step end and is saved after, what is not finite stays out, a missing ``lr_end`` takes its
    documented default, and the user's config object is left as it was.

    Attributes:
        coordinator: the ``MultiSAETrainer`` that saves and resumes all its trainers at once, if there is one.
    """

    coordinator: Any = None

    n_training_steps: int
    initialization_pending: bool
    checkpoint_thresholds: list[int]
    data_provider: DataProvider
    unsaved_spectrum: Spectrum | None = None
    history: list[Record]  # where a subclass has a history of its own, this one is in the file only
    revival: Revival | None = None
    _sae_in: Tensor | None = None  # of the step under way, the whole batch
    _gradient_norm: Tensor | None = None  # of the step under way: SAELens's step() hands on the output alone

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: AnyTrainingSAE,
        data_provider: DataProvider,
        evaluator: Evaluator[Any] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        **later_arguments: Any,
    ) -> None:
        refuse_known_failures(cfg, sae)
        check_device(cfg.device)
        check_revival(sae)
        check_moments(sae)
        shard_(sae)
        self.shard = shard_of(sae)
        cfg = self._alike(cfg, sae)
        sae.cfg = copy.copy(sae.cfg)
        sae.cfg.metadata = copy.deepcopy(sae.cfg.metadata)
        self._sparse_steps, self._recorder, self._tensorboard = SparseSteps(), Recorder(), TensorBoard()
        self.pace, self._dead_watch, self._bar = Pace(), DeadWatch(), TrainingBar()
        if self.shard.world.is_first:
            self._recorder.place(cfg.checkpoint_path, output_folder(save_checkpoint_fn))
        self.history = self._recorder.records
        super().__init__(
            with_lr_end(cfg),
            sae,
            data_provider,
            evaluator=evaluated_together(evaluator, data_provider, self.shard),
            save_checkpoint_fn=save_checkpoint_fn,
            **later_arguments,
        )
        self.guard, self.progress = Guard(sae.cfg.max_skipped_fraction, self.shard.world), Progress(self)
        settings = initializer_settings(sae.cfg)
        self.initialization_pending = settings is not None and METADATA_KEY not in sae.cfg.metadata
        if settings is not None and self.initialization_pending:
            check_settings(settings, sae)
        if sae.cfg.optimizer == "sparse_adam":
            self._use_sparse_adam()
        self.revival = None if sae.cfg.revive == "off" else Revival(self.cfg, sae)
        self.progress.watch(self.optimizer)
        self._keep(KeepSettings.of(sae.cfg), sae.cfg.resume, self.data_provider, self.evaluator, self.shard.world)

    def _use_sparse_adam(self) -> None:
        """Replace the optimizer that SAELens built, and the schedule that moves its learning rate."""
        cfg = self.cfg
        self.optimizer = make_optimizer(cfg, self.sae)
        self.lr_scheduler = get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )

    def fit(self) -> AnyTrainingSAE:
        if self.coordinator is None:
            self._resume_if_asked()
        check_run(self)
        try:
            with self._kept() as self.data_provider, losses_named(self.shard.world, self._way_out):
                self._initialize_if_pending()
                if self.keeper is not None:
                    self.keeper.clock.start()
                sae = super().fit()
                self.data_state.stop_together()
                self._agree_at_the_end()
                return sae
        finally:
            self._sparse_steps.finish()
            self.close_tensorboard()

    def _way_out(self) -> str:
        return how_to_resume(self._last_good())

    def _initialize_if_pending(self) -> None:
        if not self.initialization_pending:
            return
        self.sae.to(self.cfg.device)
        hook_name = getattr(find_store(self.data_provider, self.evaluator), "hook_name", "activations")
        self._estimate_normalization()
        with open_stream(self.data_provider, self.evaluator, [hook_name]) as stream:
            initialize_together({hook_name: [self]}, until_interrupted(stream, self.interrupts))

    def _estimate_normalization(self) -> None:
        """What ``SAETrainer.fit`` does first (and then finds done): the initialization comes after it."""
        arguments = {
            "d_in": self.sae.cfg.d_in,
            "data_provider": self.data_provider,
            "n_batches_for_norm_estimate": self.cfg.n_batches_for_norm_estimate,
        }
        mode, scaler = self.sae.cfg.normalize_activations, self.activation_scaler
        if mode == "expected_average_only_in" and scaler.scaling_factor is None:
            scaler.estimate_scaling_factor(**arguments)
        elif mode == "covariance_whitening" and scaler.whitening is None:
            scaler.estimate_whitening(**arguments)

    def step(self, batch: Tensor) -> TrainStepOutput:
        """SAELens's step on what is finite of a batch; recorded every ``logger.wandb_log_frequency`` steps and at the
        end of the run."""
        self.data_state.drawn(batch)
        with self.progress.of_step():
            kept = self.guard.kept(batch, self._last_good())
            output = self._recorded_step(kept)
            self.n_training_samples += len(batch) - len(kept)
            self.guard.check_step(output.loss, self._gradient_norm, self._last_good())
            self._revive()
        self.data_state.trained_on(batch)
        return output

    def _recorded_step(self, batch: Tensor) -> TrainStepOutput:
        self._recorder.start_clock(self.n_training_samples)
        self._gradient_norm = None
        if not self._is_recorded(len(batch)):
            return super().step(batch)
        check_same_everywhere(self.shard, batch)
        features = self.shard.features
        lr, firings = self.optimizer.param_groups[0]["lr"], count_firings(self.act_freq_scores)
        output = self._of_batch(super().step(batch))
        self._l0 = features.sum_(count_firings(self.act_freq_scores) - firings) / len(batch)
        self.guard.check_run(self.sae, None, self.n_training_samples, self._last_good())
        facts = StepFacts(
            step=self.steps_done(),
            n_tokens=self.n_training_samples,
            lr=lr,
            gradient_norm=self._gradient_norm,
            coefficients=self.get_coefficients(),
            l0=self._l0,
            n_skipped=self.guard.n_skipped,
            n_revived=None if self.revival is None else self.revival.n_revived,
        )
        silence = Silence(
            self.n_forward_passes_since_fired,
            self.dead_neurons,
            dead_window=self.cfg.dead_feature_window,
            batch=self.cfg.train_batch_size_samples,
            features=features,
        )
        self._recorder.record(output, facts, silence)
        self._to_tensorboard()
        return output

    def _to_tensorboard(self) -> None:
        folder = self._recorder.folder
        if folder is not None and not self.cfg.logger.log_to_wandb:
            record = self._recorder.records[-1]
            values = all_of(record, self._recorder.tokens_per_second)
            self._tensorboard.write(folder, record["step"] - 1, values)  # as SAELens counts a step after it is logged

    def close_tensorboard(self) -> None:
        """To be called when training ends, also by an error: what waits in memory is written."""
        self._tensorboard.close()

    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        """What goes to W&B of a step: SAELens's values, and beside them what the record of this step holds."""
        logged = super().build_train_step_log_dict(output, n_training_samples)
        records = self._recorder.records
        if not records or records[-1]["step"] != self.steps_done():
            return logged  # called by somebody else, between the steps that are recorded
        return {**beside_saelens(records[-1], self._recorder.tokens_per_second), **logged}

    def _revive(self) -> None:
        """Take in the step that was just made, and revive features where that is due."""
        if self.revival is None or self._sae_in is None:
            return
        silent, steps_done = self.n_forward_passes_since_fired, self.steps_done()
        self.revival.see(self._sae_in, silent, steps_done)
        self._sae_in = None
        if not self.revival.is_due(steps_done):
            return
        kept = (self.optimizer, self._sparse_steps, Counters(silent, self.act_freq_scores), steps_done)
        if self.revival.is_failed_start(steps_done, silent):
            with self.progress.writing():
                self.revival.start_anew_(*kept)
            return
        found = self.revival.find(steps_done, silent)
        if found is not None:
            with self.progress.writing():
                self.revival.write_(found, *kept)

    def check_finite(self) -> None:
        self.guard.check_run(self.sae, self.optimizer, self.n_training_samples, self._last_good())

    def _last_good(self) -> Path | None:
        keeper = self.keeper if self.coordinator is None else self.coordinator.keeper
        return None if keeper is None else keeper.last_good

    def maybe_reset_sparsity(self) -> dict[str, Any]:
        """SAELens's first act of a step: between two steps, so here is where a run is saved, or ends on a signal."""
        if self.coordinator is None:
            self._between_steps()
        return super().maybe_reset_sparsity()

    def _is_recorded(self, n_samples: int) -> bool:
        is_last = self.n_training_samples + n_samples >= self.cfg.total_training_samples
        every = self.cfg.logger.wandb_log_frequency
        return is_last or (every > 0 and (self.steps_done() + 1) % every == 0)

    def _update_pbar(self, step_output: TrainStepOutput, pbar: Any, update_interval: int = 100) -> None:
        """SAELens's bar moves every so many steps; here with each, unless the user has another one."""
        stock = super()._update_pbar
        if stock.__func__ is SAETrainer._update_pbar:  # type: ignore[attr-defined]
            self._bar.move(pbar, self.n_training_samples, lambda: {"": self.standing(step_output)})
        else:
            stock(step_output, pbar)

    def standing(self, output: TrainStepOutput) -> Standing:
        """How training stands after a step, for the bar."""
        if self.shard.is_whole:
            return standing(self, output)
        last = self._recorder.records[-1] if self._recorder.records else None
        return standing_of_record(output, last, self.shard.d_sae)

    def steps_done(self) -> int:
        """The schedule counts what ``n_training_steps`` misses: SAELens's checkpoints hold one step too few of it."""
        return self.lr_scheduler.last_epoch

    def _train_step(self, sae: AnyTrainingSAE, sae_in: Tensor) -> TrainStepOutput:
        stock, self._sae_in = super()._train_step, sae_in
        is_stock = stock.__func__ is SAETrainer._train_step  # type: ignore[attr-defined]
        if not self.shard.is_whole:
            self.pace.settle()
        with self.pace.of_step(sae_in.device, lambda: dense_step_fits(sae, len(sae_in))) as is_sparse:
            if not is_sparse:
                self._sparse_steps.invalidate()
                return stock(sae, sae_in)
            step = self._sparse_steps.take(
                sae,
                self.optimizer,
                sae_in,
                lambda: self._step_input(sae_in),
                self.autocast_if_enabled,
                replaced=None if is_stock else f"{type(self).__name__} has a _train_step of its own",
            )
            if isinstance(step, str) and not self.shard.is_whole:
                raise ValueError(
                    f"features cannot be spread over processes here, which take sparse steps alone: {step}"
                )
            if isinstance(step, str):
                self.pace.settle()
                return stock(sae, sae_in)
        self._gradient_norm = step.gradient_norm
        self._count(step.firings)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return step.output

    def invalidate_caches(self) -> None:
        """Forget what steps keep of the weights: to be called after writing to weights through ``.data``.

        Anything else is noticed: an optimizer's step, ``torch.no_grad``, ``load_state_dict``. Without this call, rows
        of ``W_dec`` that were written through ``.data`` are noticed within 32 steps.
        """
        self._sparse_steps.invalidate()

    def _step_input(self, sae_in: Tensor) -> TrainStepInput:
        return TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=self._dead_mask(),
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )

    def _dead_mask(self) -> Tensor | None:
        """Which features are dead; None where none is, or where nobody would look, as far as it can be told."""
        silent = self.n_forward_passes_since_fired
        if silent.device.type == "cpu":
            return self.dead_neurons
        # A mask on an accelerator has to be looked at, for which the host waits.
        if getattr(self.sae.cfg, "aux_loss_coefficient", None) == 0:
            return None
        if not self.shard.is_whole:
            return self.dead_neurons  # of other processes' features some may be dead
        window = self.cfg.dead_feature_window
        return None if self._dead_watch.none_is_dead(silent, window, self.steps_done()) else self.dead_neurons

    @torch.no_grad()
    def _count(self, firings: Tensor) -> None:
        """What SAELens keeps of how often features fire."""
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired.masked_fill_(firings > 0, 0)
        self.act_freq_scores += firings
        self.n_frac_active_samples += self.cfg.train_batch_size_samples

    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        """SAELens's checkpoint, whole or not there, with all that the rest of the run follows from."""
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None and not self.shard.is_whole:
            return  # SAELens would have each process upload a checkpoint of its own
        if base is None or self.coordinator is not None:
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
            if base is not None:
                self._add_own_files(Path(base) / checkpoint_name, self._revival_state())
            return
        self._save_whole(checkpoint_name, "asked for", Path(base), wandb_aliases)

    def _write(self, folder: Path, wandb_aliases: list[str] | None) -> None:
        of_revival = self._revival_state()
        if self.shard.is_whole:
            super().save_checkpoint(folder.name, folder.parent, wandb_aliases)
        else:
            self._write_shards(folder)
        if self.shard.world.is_first:
            self._add_own_files(folder, of_revival)

    def _revival_state(self) -> dict[str, Tensor]:
        """Of all features, to which all processes contribute."""
        return {} if self.revival is None else self.revival.state()

    def _add_own_files(self, folder: Path, of_revival: dict[str, Tensor]) -> None:
        self._recorder.copy_to(folder)
        if of_revival:
            save_tensors(folder / REVIVAL, of_revival)
        if self.unsaved_spectrum is not None:
            path = self.unsaved_spectrum.save(folder / SPECTRUM_FILENAME)
            logger.info("wrote the spectrum of the estimate to %s", path)

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """SAELens counts a step after its checkpoint: what is saved has it, as weights and schedules have."""
        counted, self.n_training_steps = self.n_training_steps, self.steps_done()
        try:
            super().save_trainer_state(checkpoint_path)
        finally:
            self.n_training_steps = counted
        write_json(checkpoint_path / GUARD, {"n_skipped": self.guard.n_skipped})
        self.pace.save(checkpoint_path)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Weights, optimizer, counters, place in the data: all of a checkpoint, after a look at whether it fits.

        Raises:
            ValueError: for a checkpoint that is damaged, or of a run with other settings; names the differences.
        """
        path = Path(checkpoint_path)
        if self.coordinator is None:
            self._check_resume(path)
        if self.initialization_pending:
            logger.info("resuming from %s: initializer is not applied to trained weights", path)
        self.initialization_pending = False
        with said_of(path):
            if self.coordinator is None:
                self.data_state.load(path)
            super().load_trainer_state(path)
        self.n_training_steps = self.steps_done()  # SAELens's own checkpoints hold one too few
        self._recorder.resume(path, self.steps_done())
        if (path / GUARD).exists():
            self.guard.n_skipped = json.loads((path / GUARD).read_text())["n_skipped"]
        self.pace.load(path)
        if self.revival is not None:
            with said_of(path):
                self.revival.load(path, self.steps_done(), self.n_forward_passes_since_fired)
        self._dead_watch = DeadWatch()
        self._take_over_provenance(path / SAE_CFG_FILENAME)
        self._has_resumed(path)

    def resume_from(self, path: Path) -> None:
        self.load_trainer_state(path)

    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        self.sae.cfg.metadata["n_skipped_tokens"] = self.guard.n_skipped
        if self.revival is not None:
            self.sae.cfg.metadata["n_revived_features"] = self.revival.n_revived
        self._sparse_steps.finish()
        self._recorder.finish()

    def place_history(self, checkpoint_path: str | Path | None, output_path: str | Path | None) -> None:
        """See ``Recorder.place``: for a trainer that a ``MultiSAETrainer`` has made, and which knows no folder."""
        self._recorder.place(checkpoint_path, output_path)

    def _take_over_provenance(self, cfg_path: Path) -> None:
        """A resume loads weights and trainer state only: how the weights began stands in the checkpoint's config."""
        saved = json.loads(cfg_path.read_text())["metadata"] if cfg_path.exists() else {}
        if METADATA_KEY in saved:
            self.sae.cfg.metadata[METADATA_KEY] = saved[METADATA_KEY]

    def _settings(self) -> dict[str, Any]:
        return {**schedule_settings(self.cfg), **self.data_state.settings}

    def misfit(self, path: Path) -> str:
        return "; ".join(filter(None, (sae_misfit(path, whole_config(self.sae)), run_misfit(path, self._settings()))))

    def _go_on_in(self, folder: Path) -> None:
        super()._go_on_in(folder)
        if self.shard.world.is_first:
            self._recorder.place(folder, output_folder(self.save_checkpoint_fn))

    def _torn(self) -> str:
        return "" if self.progress.is_whole else "ended within the optimizer's step"

    def _has_begun(self) -> bool:
        return self.n_training_samples > 0 and not self.initialization_pending


def until_interrupted(stream: ActivationStream, interrupts: Interrupts) -> ActivationStream:
    """The same stream, between whose batches a signal does what it would have done."""

    def batches() -> Iterator[Batch]:
        for batch in stream.batches:
            interrupts.deliver()
            yield batch

    return dataclasses.replace(stream, batches=batches())


def extend_trainer() -> None:
    """Every construction of a trainer passes here, whoever does it; configs without our fields pass untouched."""
    stock_new = SAETrainer.__new__
    signature = inspect.signature(SAETrainer.__init__)

    def __new__(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        given = given_arguments(signature, args, kwargs)
        sae = given.get("sae")
        if sae is not None:
            take_flags_from_runner(sae, given.get("save_checkpoint_fn"))
            if asks_for_plugin(sae.cfg):
                cls = plugin_trainer_class(cls)  # type: ignore[arg-type]
        return object.__new__(cls) if stock_new is object.__new__ else stock_new(cls, *args, **kwargs)

    SAETrainer.__new__ = staticmethod(__new__)  # type: ignore[assignment]
    extend_saes()
    extend_store()
    extend_runner()


def extend_runner() -> None:
    """Processes meet before SAELens's runner loads a language model, which goes to each one's own GPU then."""
    stock = LanguageModelSAETrainingRunner.__init__

    @functools.wraps(stock)
    def __init__(self: LanguageModelSAETrainingRunner, cfg: Any, *args: Any, **kwargs: Any) -> None:
        if asks_for_plugin(cfg.sae):
            processes(cfg.sae.batch_shards, cfg.device)
        stock(self, cfg, *args, **kwargs)

    LanguageModelSAETrainingRunner.__init__ = __init__  # type: ignore[method-assign]


def extend_store() -> None:
    """Stores of runs with our fields get a place that can be saved: here, since a runner's prefetcher starts to read
    before a trainer is there."""
    stock = ActivationsStore.from_config.__func__  # type: ignore[attr-defined]

    @functools.wraps(stock)
    def from_config(cls: type[ActivationsStore], model: Any, cfg: Any, *args: Any, **kwargs: Any) -> ActivationsStore:
        store = stock(cls, model, cfg, *args, **kwargs)
        sae_cfg = getattr(cfg, "sae", None)
        if sae_cfg is not None and asks_for_plugin(sae_cfg):
            make_saveable(store)
            share_model_(store, processes(sae_cfg.batch_shards, cfg.device).world)
        return store

    ActivationsStore.from_config = classmethod(from_config)  # type: ignore[assignment]


def given_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a trainer by name; those of a user's subclass with a signature of its own, as far as named."""
    try:
        return dict(signature.bind_partial(None, *args, **kwargs).arguments)
    except TypeError:
        return kwargs


@cache
def plugin_trainer_class(base: type[SAETrainer[Any, Any]]) -> type[SAETrainer[Any, Any]]:
    """``base`` with ``PluginTrainer`` mixed in: the user's own subclasses of SAETrainer keep what they override."""
    if issubclass(base, PluginTrainer):
        return base
    return type(f"{base.__name__}WithActiveSubspace", (PluginTrainer, base), {"__module__": __name__})


def take_flags_from_runner(sae: AnyTrainingSAE, save_checkpoint_fn: SaveCheckpointFn | None) -> None:
    """Carry the choices of a runner's config over to an SAE that is loaded from ``from_pretrained_path``.

    SAELens ignores ``cfg.sae`` there. Loaded weights are never initialised again.
    """
    cfg = getattr(getattr(save_checkpoint_fn, "__self__", None), "cfg", None)
    if not isinstance(cfg, LanguageModelSAERunnerConfig) or cfg.from_pretrained_path is None:
        return
    for name in CHOICES:
        setattr(sae.cfg, name, getattr(cfg.sae, name))
    if sae.cfg.initializer != "default" or cfg.sae.initializer != "default":
        logger.info("weights come from %s: initializer is not applied", cfg.from_pretrained_path)
        sae.cfg.initializer = "default"
