"""What keeps numbers that are not finite out of a run, and a step that was cut short out of its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from saelens_asi.sparse.finite import FiniteFlag, all_finite, finite_rows, keep_finite_rows, without_bad_rows
from saelens_asi.sparse.shards import ALONE, Group

logger = logging.getLogger(__name__)

# Activations before which a share of them says little.
_FIRST_TOKENS = 10_000


class Guard:
    """Leaves out activations that are not finite, and stops a run whose weights are not.

    On a CPU both are seen in the step itself. On an accelerator a step asks nothing of the device: its flags are read
    at logging steps and before a checkpoint.

    Of several processes all have the same activations, and stop where one has weights that are not finite.
    """

    def __init__(self, max_skipped_fraction: float, world: Group = ALONE) -> None:
        self.n_skipped = 0
        self._world = world
        self._max_skipped_fraction = max_skipped_fraction
        self._flag = FiniteFlag()
        self._good: Tensor | None = None  # rows of the batch under way, on an accelerator
        self._warned = False

    def kept(self, batch: Tensor, last_good: Path | None) -> Tensor:
        """What of a batch is finite."""
        if batch.device.type != "cpu":
            kept, self._good = keep_finite_rows(batch)
            return kept
        good = finite_rows(batch)
        kept = without_bad_rows(batch, good)
        if kept is not batch:
            self._skip(len(batch) - len(kept))
            if not len(kept):
                raise FloatingPointError(f"no activation of a batch is finite; {_advice(last_good)}")
        return kept

    def _skip(self, n: int) -> None:
        self.n_skipped += n
        if not self._warned:
            logger.warning("%d activations are not finite: left out and counted (n_skipped_tokens)", n)
        self._warned = True

    def check_step(self, loss: Tensor, gradient_norm: Tensor | None, last_good: Path | None) -> None:
        """Raise FloatingPointError for a step whose loss or gradient is not finite."""
        if loss.device.type != "cpu":
            # A batch that came from a CPU has been looked at there.
            good = self._good if self._good is not None else torch.ones(0, dtype=torch.bool, device=loss.device)
            self._flag.update_(loss.detach(), good)
            self._good = None
            return
        if not loss.isfinite() or (gradient_norm is not None and not gradient_norm.isfinite()):
            raise FloatingPointError(f"the loss or its gradient is not finite; {_advice(last_good)}")

    def check_run(self, sae: nn.Module, optimizer: Optimizer | None, n_tokens: int, last_good: Path | None) -> None:
        """Raise FloatingPointError where too much was left out, or where weights are not finite, or moments.

        Args:
            sae: whose weights are looked at.
            optimizer: whose moments are; None to leave them out, which are twice as large.
            n_tokens: activations so far.
            last_good: checkpoint, for the error.
        """
        fine, n_bad = self._flag.read()
        if n_bad:
            self._skip(n_bad)
        self._flag = FiniteFlag()
        states = optimizer.state.values() if optimizer is not None else ()
        moments = (value for state in states for value in state.values() if torch.is_tensor(value))
        is_bad = torch.tensor(not fine or not all_finite([*sae.parameters(), *moments]), dtype=torch.int32)
        if self._world.max_(is_bad):
            raise FloatingPointError(f"weights are not finite; {_advice(last_good)}")
        if self.n_skipped > self._max_skipped_fraction * max(n_tokens, _FIRST_TOKENS):
            raise FloatingPointError(
                f"{self.n_skipped} of {n_tokens} activations are not finite, more than max_skipped_fraction="
                f"{self._max_skipped_fraction:g}: look at the model's dtype and at the data. {_advice(last_good)}"
            )


def _advice(last_good: Path | None) -> str:
    return f"the last good checkpoint is {last_good}" if last_good is not None else "no checkpoint was written yet"


class Trainer(Protocol):
    """What is asked of a trainer."""

    n_training_samples: int

    def steps_done(self) -> int: ...


class Progress:
    """Whether a trainer's state is that of whole steps."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._moved = False
        self.is_whole = True

    def watch(self, optimizer: Optimizer) -> None:
        """Learn when the optimizer moves weights."""
        optimizer.register_step_pre_hook(self._note)

    def _note(self, *unused: object) -> None:
        self._moved = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written in it between two steps is written whole, or the state is that of none."""
        self.is_whole = False
        yield
        self.is_whole = True

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """A step that fails before weights have moved counts as not begun; one that fails while they do, as neither."""
        samples, steps, self._moved = self._trainer.n_training_samples, self._trainer.steps_done(), False
        try:
            yield
        except BaseException:
            if self._trainer.steps_done() == steps:
                self._trainer.n_training_samples = samples
                self.is_whole = not self._moved
            raise
