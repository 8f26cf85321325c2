"""The state of a training run: all that a checkpoint of it holds, and how a step changes it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saelens_asi.history import LORSA_HISTORY, History
from saelens_asi.lorsa.checkpoints import Checkpoints, check_folder
from saelens_asi.lorsa.config import LorsaTraining
from saelens_asi.lorsa.io import save_lorsa
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.lorsa.run_folder import (
    RunFacts,
    RunState,
    check_unused,
    forget_run,
    is_saved,
    read_finished,
    read_last,
    write_state,
)
from saelens_asi.lorsa.sequences import Sequences, finite_sequences
from saelens_asi.plugin.launch import is_launched
from saelens_asi.resume import DISK_ERRORS, one_writer, remove_unfinished
from saelens_asi.sparse.finite import all_finite
from saelens_asi.sparse_adam import SparseAdam

logger = logging.getLogger(__name__)

# Positions before which a share of them says little.
_FIRST_TOKENS = 10_000

# Names of tensors in a checkpoint.
_MOMENTS, _CPU, _CUDA = "optimizer/", "generator/cpu", "generator/cuda"


def make_optimizer(lorsa: Lorsa, settings: LorsaTraining) -> SparseAdam:
    """SparseAdam with one row a feature, or, for ``"adam"``, the same update for every entry.

    W_V, W_O and b_V have a row a feature; b_D and, with ``train_qk``, queries and keys move in every step.
    """
    rows = [lorsa.W_V, lorsa.W_O, lorsa.b_V]
    qk = [p for name, p in lorsa.named_parameters() if name[-2:] in ("_Q", "_K") or name.endswith("_norm")]
    row_dim = 0 if settings.optimizer == "sparse_adam" else None
    groups: list[dict[str, object]] = [{"params": rows, "row_dim": row_dim}, {"params": [lorsa.b_D]}]
    if settings.train_qk:
        groups.append({"params": qk})
    return SparseAdam(groups, lr=settings.lr, betas=settings.betas)


class StepOutcome(NamedTuple):
    """What the history needs of a step.

    Attributes:
        loss: () mean over positions of the squared error's sum; NaN where all sequences were left out.
        y: (n_sequences, n_positions - skip_positions, d_model) the layer's output at the positions that count.
        fired: (m,) bool of the selected features, True where they fired at such a position.
    """

    loss: Tensor
    y: Tensor
    fired: Tensor


class _Rest(NamedTuple):
    """What a step that fails may have changed before weights move, as it was before."""

    generators: dict[str, Tensor]
    threshold: Tensor
    n_skipped: int


class TrainingRun:
    """The state of a run: all that a checkpoint holds, and how a step changes it.

    Raises ValueError in one of several processes that torchrun has launched.

    Attributes:
        lorsa: trained in place.
        settings: of the run.
        data: sequences.
        folder: of the history, the checkpoints and the finished Lorsa; None: nothing is written.
        optimizer: of ``make_optimizer``.
        silent: (n_ov_heads,) int64 positions since each feature last fired.
        history: a record each logged step.
        done: steps that are finished.
        n_skipped: positions of sequences that were left out because they hold a number that is not finite.
        is_finished: whether ``folder`` holds the finished Lorsa of this run.
    """

    def __init__(self, lorsa: Lorsa, settings: LorsaTraining, data: Sequences, folder: Path | None = None) -> None:
        if is_launched():
            raise ValueError(
                "a Lorsa is trained by one process: start train_lorsa without torchrun, which launched several here"
            )
        self.lorsa, self.settings, self.data, self.folder = lorsa, settings, data, folder
        self.optimizer = make_optimizer(lorsa, settings)
        self.silent = torch.zeros(lorsa.cfg.n_ov_heads, dtype=torch.int64, device=lorsa.W_V.device)
        self.history = History()
        self.done, self.n_skipped, self.is_finished = 0, 0, False
        self._checkpoints: Checkpoints | None = None
        if folder is not None:
            self._checkpoints = Checkpoints(folder, settings.checkpoint_every, settings.checkpoint_minutes)
        self._start, self._seconds_before = time.perf_counter(), 0.0
        self._moving = False  # whether weights, moments and counters are of different steps
        self._note_rest()

    @contextmanager
    def folder_held(self) -> Iterator[None]:
        """Check that the folder can be written to and is large enough, and keep other runs out of it."""
        if self.folder is None:
            yield
            return
        weights = sum(p.numel() * p.element_size() for p in self.lorsa.parameters())
        moments = sum(8 * p.numel() for group in self.optimizer.param_groups for p in group["params"])
        check_folder(self.folder, weights + moments, weights)
        with one_writer(self.folder, "out"):
            yield

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Go back to the newest checkpoint, make room for a new run, or see that there is room."""
        if self.folder is None or self._checkpoints is None:
            return
        try:
            json.dumps(self.lorsa.provenance, allow_nan=False)
        except (TypeError, ValueError) as error:  # or no checkpoint could be written
            raise ValueError(f"lorsa.provenance cannot be written as JSON: {error}") from None
        remove_unfinished(self._checkpoints.folder)
        if resume:
            self.restore()
        elif overwrite:
            forget_run(self.folder)
        else:
            check_unused(self.folder)

    def begin(self) -> None:
        """Start the clocks, and the history's file."""
        if not all_finite(self._numbers()):
            raise FloatingPointError(f"weights are not finite before the first step; {self._last_good()}")
        if self.folder is not None and self._checkpoints is not None:
            self.history.write_to(self.folder / LORSA_HISTORY)
            self._checkpoints.clock.start()
        self.lorsa.provenance["training"] = asdict(self.settings)
        self.lorsa.train()
        self._start = time.perf_counter()
        self._seconds_before = self.history.records[-1]["seconds"] if self.history.records else 0.0
        self._note_rest()

    def advance(self) -> dict[str, float] | None:
        """The next step; returns its record where it is logged."""
        outcome = self.step(*self.data.batch(batch_index(self.done, self.settings, self.data.n_sequences)))
        is_logged = self.done % self.settings.log_every == 0 or self.done == self.settings.steps
        record = self.record(outcome) if is_logged else None
        self._note_rest()
        return record

    def _note_rest(self) -> None:
        """The state is of one step: all that comes after it follows from what is here now."""
        self._rest = _Rest(_generators(self.lorsa.W_V.device), self.lorsa.threshold.clone(), self.n_skipped)
        self._moving = False

    def step(self, x: Tensor, y: Tensor) -> StepOutcome:
        """One update on (batch_size, n_positions, d_model) input and output of the layer."""
        lorsa, settings = self.lorsa, self.settings
        lorsa.current_k = settings.k_at(self.done, lorsa.cfg.k)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr_at(self.done)
        x, y = self._finite_sequences(x.to(lorsa.W_V), y.to(lorsa.W_V))
        y = y[:, lorsa.cfg.skip_positions :]
        if not len(x):
            self._moving = True
            self.done += 1
            return StepOutcome(y.new_tensor(math.nan), y, torch.zeros(0, dtype=torch.bool))
        y_hat, features, fired = lorsa.reconstruct(x)
        loss = (y_hat - y).square().sum(dim=-1).mean()
        for param in lorsa.parameters():  # all of them: queries and keys get gradients also where they are not trained
            param.grad = None
        loss.backward()
        self._check_gradients(loss)
        self._moving = True
        self.optimizer.step()
        self.silent += y.shape[0] * y.shape[1]
        self.silent[features[fired]] = 0
        self.done += 1
        return StepOutcome(loss.detach(), y, fired)

    def _finite_sequences(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences that hold finite numbers only. On an accelerator this waits, as a step does anyway."""
        good = finite_sequences(x, y, self.lorsa.cfg.skip_positions)
        if good.all():
            return x, y
        n_bad, settings = int((~good).sum()), self.settings
        if not self.n_skipped:
            logger.warning(
                "step %d: %d of %d sequences hold activations that are not finite; such sequences are left out and "
                "counted (n_skipped_tokens)", self.done + 1, n_bad, len(good),
            )  # fmt: skip
        self.n_skipped += n_bad * x.shape[1]
        n_tokens = (self.done + 1) * settings.batch_size * x.shape[1]
        if self.n_skipped > settings.max_skipped_fraction * max(n_tokens, _FIRST_TOKENS):
            raise FloatingPointError(
                f"{self.n_skipped} of {n_tokens} positions lie in sequences with activations that are not finite, more "
                f"than max_skipped_fraction={settings.max_skipped_fraction:g}: look at the model's dtype and at the "
                f"data. {self._last_good()}"
            )
        return x[good], y[good]

    def _check_gradients(self, loss: Tensor) -> None:
        """Scale gradients down to ``max_grad_norm``; raise FloatingPointError where weights would be poisoned."""
        trained = [param for group in self.optimizer.param_groups for param in group["params"]]
        if self.settings.max_grad_norm is not None:
            finite = torch.nn.utils.clip_grad_norm_(trained, self.settings.max_grad_norm).isfinite()
        else:
            finite = all_finite(param.grad for param in trained if param.grad is not None)
        if not (loss.isfinite() & finite):
            raise FloatingPointError(
                f"step {self.done + 1}: the loss ({float(loss.detach()):g}) or its gradient is not finite: set a lower "
                f"lr, or max_grad_norm. {self._last_good()}"
            )

    def _numbers(self) -> Iterator[Tensor]:
        """Weights and moments."""
        yield from self.lorsa.state_dict().values()
        for state in self.optimizer.state.values():
            yield from state.values()

    def _last_good(self) -> str:
        last = None if self._checkpoints is None else self._checkpoints.last_good
        return "no checkpoint was written" if last is None else f"the last good checkpoint is {last}"

    def record(self, outcome: StepOutcome) -> dict[str, float]:
        """Add the last step to the history; returns the record.

        Raises:
            FloatingPointError: for weights or moments that are not finite.
        """
        self._check_numbers()
        y, settings = outcome.y, self.settings
        variance = float((y - y.mean(dim=(0, 1))).square().sum(dim=-1).mean())
        loss, n = float(outcome.loss), y.shape[0] * y.shape[1]
        record = {
            "step": self.done,
            "n_tokens": self.done * settings.batch_size * self.data.n_positions,
            "n_skipped_tokens": self.n_skipped,
            "loss": loss,
            "nmse": loss / variance if variance else math.nan,
            "l0": float(outcome.fired.sum()) / n if n else math.nan,
            "dead_fraction": float((self.silent >= settings.dead_after).float().mean()),
            "lr": settings.lr_at(self.done - 1),
            "k": self.lorsa.current_k,
            "seconds": round(self._seconds_before + time.perf_counter() - self._start, 2),
        }
        try:
            self.history.append(record)
        except OSError as error:
            logger.warning("the history is kept in memory, and written with the next checkpoint: %s", error)
            self.history.keep_in_memory()
        return record

    def _check_numbers(self) -> None:
        if not all_finite(self._numbers()):
            raise FloatingPointError(f"step {self.done}: weights or moments are not finite. {self._last_good()}")

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint when it is time for one; a disk that is full ends no training."""
        if self._checkpoints is not None and self._checkpoints.is_due(self.done):
            self._checkpoint_or_warn()

    def _checkpoint_or_warn(self) -> None:
        try:
            self.checkpoint()
            if self.folder is not None and self.history.path is None:
                self.history.write_to(self.folder / LORSA_HISTORY)
        except DISK_ERRORS as error:
            logger.warning("step %d was not saved (%s); %s", self.done, error, self._last_good())

    def checkpoint(self) -> None:
        """Write all that the run's future depends on below ``folder``, whole or not at all; if there is a folder.

        Raises:
            FloatingPointError: for weights or moments that are not finite.
        """
        if self._checkpoints is None:
            return
        self._check_numbers()
        self.lorsa.provenance["n_skipped_tokens"] = self.n_skipped
        names = self._parameter_names()
        tensors = {
            f"{_MOMENTS}{names[param]}/{key}": value
            for param, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        tensors |= {"silent": self.silent, **self._rest.generators}
        state = RunState(self.lorsa, self.done, self.n_skipped, tensors, self.history.records)
        with self._checkpoints.writing(self.done) as unfinished:
            write_state(unfinished, state, self._facts)

    def _parameter_names(self) -> dict[Tensor, str]:
        return {param: name for name, param in self.lorsa.named_parameters()}

    @cached_property
    def _facts(self) -> RunFacts:
        identity = getattr(self.data, "identity", None)
        data = {
            "n_sequences": self.data.n_sequences,
            "n_positions": self.data.n_positions,
            "layer of the Lorsa": self.lorsa.provenance.get("layer"),
            **(identity() if identity is not None else {}),
        }
        return RunFacts(asdict(self.settings), self.lorsa.cfg.to_dict(), data)

    def restore(self) -> None:
        """Go back to the newest whole checkpoint below ``folder``, if there is one, or to the finished Lorsa.

        Raises:
            ValueError: for a checkpoint of another Lorsa, of other data, or of other settings than those of how often
                something is written; and where all checkpoints are damaged.
        """
        if self.folder is None or self._checkpoints is None:
            return
        facts = self._facts
        state = read_last(self.folder, facts)
        if state is not None:
            self._checkpoints.went_on_from(state.done)
            self._take_tensors(state.tensors, self._checkpoints.path(state.done))
        else:
            state = read_finished(self.folder, facts)
        if state is None:
            logger.info("out=%r holds no checkpoint yet: the run begins", str(self.folder))
            return
        self.lorsa.load_state_dict(state.lorsa.state_dict())
        self.lorsa.provenance = state.lorsa.provenance
        self.done, self.n_skipped = state.done, state.n_skipped
        self.history = History(state.history)
        self.is_finished = self.done == self.settings.steps and is_saved(self.folder)
        if self.is_finished:
            self._put_to_use()

    def _take_tensors(self, tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
        """Moments, positions since features fired, and generators."""
        names = self._parameter_names()
        order = [param for group in self.optimizer.param_groups for param in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for i, param in enumerate(order):
            prefix = f"{_MOMENTS}{names[param]}/"
            moments[i] = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            shapes = {key: value.shape for key, value in moments[i].items()}
            if shapes and shapes != {"step": (), "exp_avg": param.shape, "exp_avg_sq": param.shape}:
                raise ValueError(f"{checkpoint} has no moments that fit {names[param]}: their shapes are {shapes}")
        if tensors.get("silent", torch.empty(0)).shape != self.silent.shape or _CPU not in tensors:
            raise ValueError(f"{checkpoint} lacks counts of silent positions, or the state of a generator")
        fresh = self.optimizer.state_dict()
        state = {i: values for i, values in moments.items() if values}
        self.optimizer.load_state_dict({"state": state, "param_groups": fresh["param_groups"]})
        self.silent = tensors["silent"].to(self.silent.device)
        _set_generators(tensors, self.lorsa.W_V.device)

    def finish(self) -> None:
        """Leave the Lorsa as it is to be used, and write it."""
        self._put_to_use()
        if self.folder is None or self._checkpoints is None:
            return
        if self._checkpoints.saved_steps < self.done:
            self._checkpoint_or_warn()
        self._check_numbers()
        self.lorsa.provenance["n_skipped_tokens"] = self.n_skipped
        save_lorsa(self.lorsa, self.folder)
        if self.history.path is None:
            self.history.write_to(self.folder / LORSA_HISTORY)

    def _put_to_use(self) -> None:
        self.lorsa.current_k = self.lorsa.cfg.k
        self.lorsa.eval()

    def rescue(self, error: BaseException) -> None:
        """Save the last whole step of a run that ends early, where that can be, and say how to go on."""
        if self.folder is None or self._checkpoints is None:
            return
        if self._moving:
            logger.warning("step %d was cut off while weights moved: it is not saved", self.done)
        elif self.done > self._checkpoints.saved_steps and not isinstance(error, FloatingPointError):
            with torch.no_grad():
                self.lorsa.threshold.copy_(self._rest.threshold)
            self.n_skipped = self._rest.n_skipped
            self._checkpoint_or_warn()
        last = self._checkpoints.last_good
        place = "there is no checkpoint, it would begin again" if last is None else f"it goes on from {last}"
        logger.warning(
            "the run stopped after %d of %d steps (%s). To resume it, give train_lorsa out=%r and resume=True: %s",
            self.done, self.settings.steps, type(error).__name__, str(self.folder), place,
        )  # fmt: skip


def _generators(device: torch.device) -> dict[str, Tensor]:
    """torch's global generators, which data may draw from: a model with dropout, for one."""
    states = {_CPU: torch.get_rng_state()}
    if device.type == "cuda":
        states[_CUDA] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[_CPU])
    if device.type == "cuda" and _CUDA in states:
        torch.cuda.set_rng_state(states[_CUDA], device)


def batch_index(step: int, settings: LorsaTraining, n_sequences: int) -> Tensor:
    """(batch_size,) sequences of a step: a function of the step alone, so a resumed run sees the same batches."""
    per_epoch = n_sequences // settings.batch_size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(n_sequences, generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch))
    return order[place * settings.batch_size : (place + 1) * settings.batch_size]
