"""The SAELens trainer of runs that ask for the plugin: stock, plus initialization and optimizer."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig, SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.prefetch import PrefetchingIterator

from saelens_asi.history import History
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.plugin.estimate import check_settings, initialize_together
from saelens_asi.plugin.fields import DEFAULTS, initializer_settings
from saelens_asi.plugin.recorder import HistoryTrainer, output_folder
from saelens_asi.plugin.stream import check_hooks, find_store, open_stream, rewound
from saelens_asi.plugin.upstream import refuse_known_failures
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

SPECTRUM_FILENAME = "active_subspace_spectrum.safetensors"


class PluginTrainer(HistoryTrainer):
    """What a run with ``initializer`` or ``optimizer`` set does beyond SAELens; mixed into the trainer's class.

    Beside the two flags it mends, for these runs only: weights are saved when a run is interrupted, checkpoints
    that were passed before a resume are not written again, a resume works with prefetching, a missing ``lr_end``
    takes its documented default, and the user's config object is left as it was.
    """

    initialization_pending: bool
    checkpoint_thresholds: list[int]
    data_provider: Any
    unsaved_spectrum: Spectrum | None = None
    _prefetch_after_resume: int | None = None

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: Any,
        data_provider: Any,
        evaluator: Any = None,
        save_checkpoint_fn: Any = None,
        **later_arguments: Any,
    ) -> None:
        refuse_known_failures(cfg, sae)
        sae.cfg = copy.copy(sae.cfg)
        sae.cfg.metadata = copy.deepcopy(sae.cfg.metadata)
        if cfg.lr_end is None:
            cfg = replace(cfg, lr_end=cfg.lr / 10)
        self._run_history = History()
        self.history = self._run_history.records
        self.start_history(cfg.checkpoint_path, output_folder(save_checkpoint_fn))
        super().__init__(
            cfg, sae, data_provider, evaluator=evaluator, save_checkpoint_fn=save_checkpoint_fn, **later_arguments
        )
        settings = initializer_settings(sae.cfg)
        self.initialization_pending = settings is not None and METADATA_KEY not in sae.cfg.metadata
        if settings is not None and self.initialization_pending:
            check_settings(settings, sae)
        if sae.cfg.optimizer == "sparse_adam":
            self.use_sparse_adam()

    def fit(self) -> Any:
        own_prefetcher = self._restart_prefetching()
        try:
            self._initialize_if_pending()
            return super().fit()
        except (KeyboardInterrupt, InterruptedException):
            self._save_interrupted_run()
            raise
        finally:
            self.finish_sparse_steps()
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

    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        """SAELens's checkpoint; the first one also keeps the spectrum that the initialization came from."""
        super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if self.unsaved_spectrum is not None and base is not None:
            path = self.unsaved_spectrum.save(Path(base) / checkpoint_name / SPECTRUM_FILENAME)
            logger.info("wrote the spectrum of the estimate to %s", path)
            self.unsaved_spectrum = None

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        if self.initialization_pending:
            logger.info("resuming from %s: initializer is not applied to trained weights", checkpoint_path)
        self.initialization_pending = False
        self._stop_prefetching()
        super().load_trainer_state(checkpoint_path)
        self.checkpoint_thresholds = [n for n in self.checkpoint_thresholds if n >= self.n_training_samples]
        self._take_over_provenance(Path(checkpoint_path) / SAE_CFG_FILENAME)

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

    def _restart_prefetching(self) -> PrefetchingIterator[Any] | None:
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


def asks_for_plugin(cfg: Any) -> bool:
    """Whether a training config sets one of the plugin's fields."""
    return any(getattr(cfg, name, default) != default for name, default in DEFAULTS.items())


@cache
def plugin_trainer_class(base: type[Any]) -> type[Any]:
    """``base`` with ``PluginTrainer`` mixed in: the user's own subclasses of SAETrainer keep what they override."""
    if issubclass(base, PluginTrainer):
        return base
    return type(f"{base.__name__}WithActiveSubspace", (PluginTrainer, base), {"__module__": __name__})


def take_flags_from_runner(sae: Any, save_checkpoint_fn: Callable[..., Any] | None) -> None:
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


@torch.no_grad()
def initialize_multi_trainer(trainer: Any, estimate_normalization: Callable[[], None]) -> None:
    """Initialise every SAE of a ``MultiSAETrainer`` that asks for it, from one pass over the activations.

    Args:
        trainer: the coordinator of all SAEs.
        estimate_normalization: SAELens's own first step, which comes before the initialization.
    """
    pending: dict[str, list[PluginTrainer]] = {}
    for name, single in trainer.trainers.items():
        if isinstance(single, PluginTrainer) and single.initialization_pending:
            pending.setdefault(trainer.hook_names[name], []).append(single)
    if pending:
        widths = {hook_name: singles[0].sae.cfg.d_in for hook_name, singles in pending.items()}
        check_hooks(trainer.data_provider, trainer.evaluator, widths)
    estimate_normalization()
    if pending:
        with open_stream(trainer.data_provider, trainer.evaluator, list(pending)) as stream:
            initialize_together(pending, stream)
