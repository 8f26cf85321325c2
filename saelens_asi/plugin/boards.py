"""What of a run's records goes where people look: to W&B beside SAELens's own values, to TensorBoard without W&B."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelens_asi.history import Record

logger = logging.getLogger(__name__)

# Beside the checkpoints, or the finished SAE of a run without.
TENSORBOARD_FOLDER = "tensorboard"

# From names in the manner of SAELens's to fields of a record. What a record has not, or holds as None, is left out.
_BESIDE_SAELENS = {
    "metrics/nmse": "nmse",
    "metrics/explained_variance": "explained_variance",
    "sparsity/never_fired": "never_fired",
    "sparsity/revived": "revived_features",
    "details/gradient_norm": "grad_norm",
    "details/skipped_tokens": "n_skipped_tokens",
}

# What SAELens itself sends to W&B, by its own names.
_SAELENS = {
    "losses/overall_loss": "loss",
    "metrics/l0": "l0",
    "sparsity/dead_features": "dead_features",
    "details/current_learning_rate": "lr",
    "details/n_training_samples": "n_tokens",
}


def beside_saelens(record: Record, tokens_per_second: float) -> dict[str, float]:
    """What SAELens does not send to W&B of a step.

    Beside the fields of the record: features that fired within the last 100,000 tokens, and so on
    (``sparsity/live_features_100000_tokens``), and the speed since the record before.
    """
    live = {
        f"sparsity/live_features_{n}_tokens": record["d_sae"] - silent
        for n, silent in record["silent_features"].items()
    }
    return {**_values(_BESIDE_SAELENS, record), **live, "details/tokens_per_second": tokens_per_second}


def all_of(record: Record, tokens_per_second: float) -> dict[str, float]:
    """The same, and under SAELens's names what it sends itself where W&B is on."""
    parts = {f"losses/{name}": value for name, value in record["losses"].items()}
    parts |= {f"metrics/{name}": value for name, value in record["metrics"].items()}
    parts |= {f"details/{name}_coefficient": value for name, value in record["coefficients"].items()}
    return {**parts, **_values(_SAELENS, record), **beside_saelens(record, tokens_per_second)}


def _values(names: Mapping[str, str], record: Record) -> dict[str, float]:
    return {name: record[field] for name, field in names.items() if record.get(field) is not None}


class TensorBoard:
    """Writes to TensorBoard where its package is installed, and nothing where it is not."""

    def __init__(self) -> None:
        self._writer: Any = None
        self._folder: Path | None = None
        self._is_off = False

    def write(self, folder: Path, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step; a failure is said once, and stops no training.

        Args:
            folder: of the run; another one than before is written to from now on.
            step: on SAELens's axis, where the first step of a run is 0.
            values: by name.
        """
        if self._is_off:
            return
        try:
            if self._writer is None or folder != self._folder:
                self._open(folder, step)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except ImportError:
            self._is_off = True
        except OSError as error:
            logger.warning("no more is written to TensorBoard: %s", error)
            self._is_off = True

    def _open(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # which needs a package that may be missing

        self.close()
        # What lies there of later steps is of a run that this one goes on with from before them.
        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=step, flush_secs=30)
        self._folder = folder
        logger.info("metrics: tensorboard --logdir %s", folder / TENSORBOARD_FOLDER)

    def close(self) -> None:
        """Write what waits in memory. What is written after opens the files again."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                logger.warning("the last values are not in TensorBoard: %s", error)
            self._writer = None
