"""The one part of the package that reaches into SAELens. ``register`` is called on import, and is idempotent."""

from __future__ import annotations

import inspect
from typing import Any

from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer

from saelens_asi.plugin.fields import add_fields
from saelens_asi.plugin.recorder import place_histories
from saelens_asi.plugin.trainer import (
    PluginTrainer,
    asks_for_plugin,
    initialize_multi_trainer,
    plugin_trainer_class,
    take_flags_from_runner,
)
from saelens_asi.plugin.upstream import check_upstream

_MARK = "_saelens_asi_registered"


def register() -> None:
    """Add the fields to SAELens's training configs, and have its trainers act on them.

    Raises:
        ImportError: when the installed SAELens is not one that this plugin was made for.
    """
    if _MARK in vars(SAETrainer):
        return
    check_upstream()
    add_fields()
    _extend_trainer()
    _extend_multi_trainer()
    setattr(SAETrainer, _MARK, True)


def _extend_trainer() -> None:
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


def _extend_multi_trainer() -> None:
    stock_estimate = MultiSAETrainer._estimate_scaling_factors
    stock_load = MultiSAETrainer.load_checkpoint

    def _estimate_scaling_factors(self: MultiSAETrainer) -> None:
        place_histories(self)
        initialize_multi_trainer(self, estimate_normalization=lambda: stock_estimate(self))

    def load_checkpoint(self: MultiSAETrainer, path: Any) -> None:
        uses_plugin = any(isinstance(trainer, PluginTrainer) for trainer in self.trainers.values())
        if uses_plugin and isinstance(self.data_provider, PrefetchingIterator):
            raise ValueError(
                "resume_from_checkpoint with prefetch_llm_batches fails in SAELens's multi-SAE runner (its prefetcher "
                "reads the data while it is wound forward): set prefetch_llm_batches=False to resume"
            )
        stock_load(self, path)
        if uses_plugin:
            self.checkpoint_thresholds = [n for n in self.checkpoint_thresholds if n >= self.n_training_samples]

    MultiSAETrainer._estimate_scaling_factors = _estimate_scaling_factors  # type: ignore[method-assign]
    MultiSAETrainer.load_checkpoint = load_checkpoint  # type: ignore[method-assign]
