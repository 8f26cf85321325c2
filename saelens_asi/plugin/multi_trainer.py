"""SAELens's trainer of several SAEs, where some of them ask for the plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator

from saelens_asi.plugin.estimate import initialize_together
from saelens_asi.plugin.recorder import output_folder
from saelens_asi.plugin.stream import check_hooks, open_stream
from saelens_asi.plugin.trainer import PluginTrainer


def extend_multi_trainer() -> None:
    """Have the estimate, the histories and a resume follow what ``MultiSAETrainer`` does at these points."""
    stock_estimate = MultiSAETrainer._estimate_scaling_factors
    stock_load = MultiSAETrainer.load_checkpoint

    def _estimate_scaling_factors(self: MultiSAETrainer) -> None:
        place_histories(self)
        initialize_multi_trainer(self, estimate_normalization=lambda: stock_estimate(self))

    def load_checkpoint(self: MultiSAETrainer, path: Path | str) -> None:
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


def place_histories(trainer: MultiSAETrainer) -> None:
    """Give the trainers inside a ``MultiSAETrainer`` a folder each, named as its SAE."""
    checkpoints, output = trainer.cfg.checkpoint_path, output_folder(trainer.save_checkpoint_fn)
    for name, single in trainer.trainers.items():
        if isinstance(single, PluginTrainer):
            single.place_history(
                None if checkpoints is None else Path(checkpoints) / name, None if output is None else output / name
            )


@torch.no_grad()
def initialize_multi_trainer(trainer: MultiSAETrainer, estimate_normalization: Callable[[], None]) -> None:
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
