"""The SAELens trainer of runs that ask for the plugin: stock, plus initialization, optimizer and history."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig, SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from sae_lens.training.types import DataProvider
from torch import Tensor

from saelens_asi.history import Record
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.plugin.estimate import check_settings, initialize_together
from saelens_asi.plugin.fields import DEFAULTS, AnyTrainingSAE, initializer_settings
from saelens_asi.plugin.quirks import refuse_known_failures, with_lr_end
from saelens_asi.plugin.recorder import Recorder, Silence, StepFacts, count_firings, output_folder
from saelens_asi.plugin.sparse_steps import SparseSteps, make_optimizer
from saelens_asi.plugin.stream import check_hooks, find_store, open_stream, rewound
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

SPECTRUM_FILENAME = "active_subspace_spectrum.safetensors"


class PluginTrainer(SAETrainer[Any, Any]):
    """What a run with ``initializer`` or ``optimizer`` set does beyond SAELens; mixed into the trainer's class.

    Beside the two flags it mends, for these runs only: weights are saved when a run is interrupted, checkpoints
    that were passed before a resume are not written again, a resume works with prefetching, a missing ``lr_end``
    takes its documented default, and the user's config object is left as it was.
    """

    initialization_pending: bool
    checkpoint_thresholds: list[int]
    data_provider: DataProvider
    unsaved_spectrum: Spectrum | None = None
    history: list[Record]  # where a subclass has a history of its own, this one is in the file only
    _gradient_norm: Tensor | None = None  # of the step under way: SAELens's step() hands on the output alone
    _prefetch_after_resume: int | None = None

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
        sae.cfg = copy.copy(sae.cfg)
        sae.cfg.metadata = copy.deepcopy(sae.cfg.metadata)
        self._sparse_steps, self._recorder = SparseSteps(), Recorder()
        self._recorder.place(cfg.checkpoint_path, output_folder(save_checkpoint_fn))
        self.history = self._recorder.records
        super().__init__(
            with_lr_end(cfg),
            sae,
            data_provider,
            evaluator=evaluator,
            save_checkpoint_fn=save_checkpoint_fn,
            **later_arguments,
        )
        settings = initializer_settings(sae.cfg)
        self.initialization_pending = settings is not None and METADATA_KEY not in sae.cfg.metadata
        if settings is not None and self.initialization_pending:
            check_settings(settings, sae)
        if sae.cfg.optimizer == "sparse_adam":
            self._use_sparse_adam()

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
        own_prefetcher = self._restart_prefetching()
        try:
            self._initialize_if_pending()
            return super().fit()
        except (KeyboardInterrupt, InterruptedException):
            self._save_interrupted_run()
            raise
        finally:
            self._sparse_steps.finish()
            if own_prefetcher is not None:
                own_prefetcher.close()

    def _initialize_if_pending(self) -> None:
        if not self.initialization_pending:
            return
        self.sae.to(self.cfg.device)
        hook_name = getattr(find_store(self.data_provider, self.evaluator), "hook_name", "activations")
        check_hooks(self.data_provider, self.evaluator, {hook_name: self.sae.cfg.d_in})
        self._estimate_normalization()
        with open_stream(self.data_provider, self.evaluator, [hook_name]) as stream:
            initialize_together({hook_name: [self]}, stream)

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
        """SAELens's step, recorded every ``logger.wandb_log_frequency`` steps and at the end of the run."""
        self._recorder.start_clock()
        if not self._is_recorded(len(batch)):
            return super().step(batch)
        lr, firings = self.optimizer.param_groups[0]["lr"], count_firings(self.act_freq_scores)
        self._gradient_norm = None
        output = super().step(batch)
        facts = StepFacts(
            step=self._steps_done(),
            n_tokens=self.n_training_samples,
            lr=lr,
            gradient_norm=self._gradient_norm,
            coefficients=self.get_coefficients(),
            l0=(count_firings(self.act_freq_scores) - firings) / len(batch),
        )
        silence = Silence(
            self.n_forward_passes_since_fired,
            self.dead_neurons,
            dead_window=self.cfg.dead_feature_window,
            batch=self.cfg.train_batch_size_samples,
        )
        self._recorder.record(output, facts, silence)
        return output

    def _is_recorded(self, n_samples: int) -> bool:
        is_last = self.n_training_samples + n_samples >= self.cfg.total_training_samples
        every = self.cfg.logger.wandb_log_frequency
        return is_last or (every > 0 and (self._steps_done() + 1) % every == 0)

    def _steps_done(self) -> int:
        """The schedule counts what ``n_training_steps`` misses: SAELens's checkpoints hold one step too few of it."""
        return self.lr_scheduler.last_epoch

    def _train_step(self, sae: AnyTrainingSAE, sae_in: Tensor) -> TrainStepOutput:
        stock = super()._train_step
        is_stock = stock.__func__ is SAETrainer._train_step  # type: ignore[attr-defined]
        step = self._sparse_steps.take(
            sae,
            self.optimizer,
            sae_in,
            lambda: self._step_input(sae_in),
            self.autocast_if_enabled,
            replaced=None if is_stock else f"{type(self).__name__} has a _train_step of its own",
        )
        if isinstance(step, str):
            return stock(sae, sae_in)
        self._gradient_norm = step.gradient_norm
        self._count(step.firings)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return step.output

    def _step_input(self, sae_in: Tensor) -> TrainStepInput:
        return TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )

    @torch.no_grad()
    def _count(self, firings: Tensor) -> None:
        """What SAELens keeps of how often features fire."""
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[firings > 0] = 0
        self.act_freq_scores += firings
        self.n_frac_active_samples += self.cfg.train_batch_size_samples

    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        """SAELens's checkpoint, with the history; the first one also keeps the spectrum of the initialization."""
        super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None:
            return
        folder = Path(base) / checkpoint_name
        self._recorder.copy_to(folder)
        if self.unsaved_spectrum is not None:
            path = self.unsaved_spectrum.save(folder / SPECTRUM_FILENAME)
            logger.info("wrote the spectrum of the estimate to %s", path)
            self.unsaved_spectrum = None

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        if self.initialization_pending:
            logger.info("resuming from %s: initializer is not applied to trained weights", checkpoint_path)
        self.initialization_pending = False
        self._stop_prefetching()
        super().load_trainer_state(checkpoint_path)
        self._recorder.resume(Path(checkpoint_path), self._steps_done())
        self.checkpoint_thresholds = [n for n in self.checkpoint_thresholds if n >= self.n_training_samples]
        self._take_over_provenance(Path(checkpoint_path) / SAE_CFG_FILENAME)

    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
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

    def _stop_prefetching(self) -> None:
        """The runner winds its store forward next, which must not happen while a prefetcher reads from it."""
        store = find_store(self.data_provider, self.evaluator)
        if not isinstance(self.data_provider, PrefetchingIterator) or store is None:
            return
        self._prefetch_after_resume = self.data_provider._queue.maxsize
        self.data_provider.close()
        vars(store).update(vars(rewound(store)))
        # The iterator of sequences counts on the object that made it, so it is made anew from the store itself.
        if store.dataset is not None:
            store.iterable_sequences = store._iterate_tokenized_sequences()

    def _restart_prefetching(self) -> PrefetchingIterator[Tensor] | None:
        if self._prefetch_after_resume is None:
            return None
        store = find_store(self.data_provider, self.evaluator)
        own = PrefetchingIterator(iter(store), prefetch=self._prefetch_after_resume)  # type: ignore[arg-type]
        self.data_provider = own
        return own

    def _save_interrupted_run(self) -> None:
        if self.cfg.checkpoint_path is None:
            return
        path = Path(self.cfg.checkpoint_path) / str(self.n_training_samples)
        if self.initialization_pending:
            path.mkdir(parents=True, exist_ok=True)  # SAELens's runner writes there next; without it, its save fails
            logger.warning("interrupted before training started: there are no weights to save")
            return
        self.save_checkpoint(path.name)
        logger.warning(
            "interrupted after %d samples: weights and trainer state are in %s", self.n_training_samples, path
        )


def extend_trainer() -> None:
    """Every construction of a trainer passes here, whoever does it; configs without our fields pass untouched."""
    stock_new = SAETrainer.__new__
    signature = inspect.signature(SAETrainer.__init__)

    def __new__(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        given = _given_arguments(signature, args, kwargs)
        sae = given.get("sae")
        if sae is not None:
            take_flags_from_runner(sae, given.get("save_checkpoint_fn"))
            if asks_for_plugin(sae.cfg):
                cls = plugin_trainer_class(cls)  # type: ignore[arg-type]
        return object.__new__(cls) if stock_new is object.__new__ else stock_new(cls, *args, **kwargs)

    SAETrainer.__new__ = staticmethod(__new__)  # type: ignore[assignment]


def _given_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a trainer by name; those of a user's subclass with a signature of its own, as far as named."""
    try:
        return dict(signature.bind_partial(None, *args, **kwargs).arguments)
    except TypeError:
        return kwargs


def asks_for_plugin(cfg: TrainingSAEConfig) -> bool:
    """Whether a training config sets one of the plugin's fields."""
    return any(getattr(cfg, name, default) != default for name, default in DEFAULTS.items())


@cache
def plugin_trainer_class(base: type[SAETrainer[Any, Any]]) -> type[SAETrainer[Any, Any]]:
    """``base`` with ``PluginTrainer`` mixed in: the user's own subclasses of SAETrainer keep what they override."""
    if issubclass(base, PluginTrainer):
        return base
    return type(f"{base.__name__}WithActiveSubspace", (PluginTrainer, base), {"__module__": __name__})


def take_flags_from_runner(sae: AnyTrainingSAE, save_checkpoint_fn: SaveCheckpointFn | None) -> None:
    """Carry the optimizer of a runner's config over to an SAE that the runner loaded from ``from_pretrained_path``.

    SAELens ignores ``cfg.sae`` there. Loaded weights are never initialised again.
    """
    cfg = getattr(getattr(save_checkpoint_fn, "__self__", None), "cfg", None)
    if not isinstance(cfg, LanguageModelSAERunnerConfig) or cfg.from_pretrained_path is None:
        return
    sae.cfg.optimizer = cfg.sae.optimizer
    if sae.cfg.initializer != "default" or cfg.sae.initializer != "default":
        logger.info("weights come from %s: initializer is not applied", cfg.from_pretrained_path)
        sae.cfg.initializer = "default"
