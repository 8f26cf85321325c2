"""Train a Lorsa on sequences: schedule, history on disk, checkpoints, resume."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.history import LORSA_HISTORY, History
from saelens_asi.interrupts import Interrupts
from saelens_asi.lorsa.attention import attention_module
from saelens_asi.lorsa.checkpoints import Checkpoints, check_folder
from saelens_asi.lorsa.config import from_dict
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
from saelens_asi.lorsa.sequences import ModelSequences, Sequences, finite_sequences
from saelens_asi.resume import DISK_ERRORS, one_writer, remove_unfinished
from saelens_asi.sparse.finite import all_finite
from saelens_asi.sparse_adam import SparseAdam

logger = logging.getLogger(__name__)

# Positions before which a share of them says little.
_FIRST_TOKENS = 10_000

# Names of tensors in a checkpoint.
_MOMENTS, _CPU, _CUDA = "optimizer/", "generator/cpu", "generator/cuda"


@dataclass(frozen=True, kw_only=True)
class LorsaTraining:
    """Settings of a training run. Frozen and inert.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences a step.
        lr: learning rate after warm-up.
        lr_warm_up_steps: first steps, in which the learning rate rises linearly from zero.
        lr_decay_steps: last steps, in which it falls linearly to zero.
        optimizer: ``"adam"``, or ``"sparse_adam"``: features that do not fire in a step keep their rows of W_V and
            W_O, b_V and all moments.
        betas: decay of the optimizer's first and second moments in a step.
        train_qk: whether queries and keys are trained too.
        k_start: features active at a position in the first step; it falls linearly to the config's k. None: k itself.
        k_warm_up_steps: steps in which it falls from ``k_start``; 0 without one.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        seed: of the order of the sequences.
        log_every: steps between two lines of the history.
        checkpoint_minutes: minutes between two checkpoints, and longer where they would take over 1 % of the time;
            0: none by time.
        checkpoint_every: steps between two checkpoints, beside those by time; 0: none by steps.
        max_skipped_fraction: share of positions that may be left out because their sequence holds a number that is
            not finite. Above it the run stops.
        dead_after: positions after which a feature that has not fired counts as dead in the history.
    """

    steps: int
    batch_size: int = 8
    lr: float = 4e-4
    lr_warm_up_steps: int = 20
    lr_decay_steps: int = 0
    optimizer: Literal["adam", "sparse_adam"] = "sparse_adam"
    betas: tuple[float, float] = (0.9, 0.999)
    train_qk: bool = True
    k_start: int | None = None
    k_warm_up_steps: int = 0
    max_grad_norm: float | None = None
    seed: int = 0
    log_every: int = 10
    checkpoint_minutes: float = 10.0
    checkpoint_every: int = 0
    max_skipped_fraction: float = 0.01
    dead_after: int = 100_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in (("steps", 1), ("batch_size", 1), ("log_every", 1), ("dead_after", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("lr_warm_up_steps", "lr_decay_steps", "k_warm_up_steps", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise ValueError(f"checkpoint_minutes={self.checkpoint_minutes} must be a number of at least 0")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(f"max_skipped_fraction={self.max_skipped_fraction} must lie in [0, 1]")
        if self.lr_warm_up_steps + self.lr_decay_steps > self.steps:
            raise ValueError(
                f"lr_warm_up_steps={self.lr_warm_up_steps} and lr_decay_steps={self.lr_decay_steps} exceed "
                f"steps={self.steps}: shorten them"
            )
        if self.optimizer not in ("adam", "sparse_adam"):
            raise ValueError(f"optimizer={self.optimizer!r} must be 'adam' or 'sparse_adam'")
        if (self.k_start is None) != (self.k_warm_up_steps == 0):
            raise ValueError("k_start and k_warm_up_steps go together: give both, or neither")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.lr_warm_up_steps) if self.lr_warm_up_steps else 1.0
        decay = min(1.0, (self.steps - step) / self.lr_decay_steps) if self.lr_decay_steps else 1.0
        return self.lr * min(warm, decay)

    def k_at(self, step: int, k: int) -> int:
        """Features active at a position in a step, for a Lorsa with this ``k``."""
        if self.k_start is None or step >= self.k_warm_up_steps:
            return k
        return round(self.k_start + (k - self.k_start) * step / self.k_warm_up_steps)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LorsaTraining:
        """From plain values, as JSON has them. Raises ValueError for a setting that does not exist."""
        return from_dict(cls, values)


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


def train_lorsa(
    lorsa: Lorsa,
    data: Sequences,
    settings: LorsaTraining,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    overwrite: bool = False,
) -> list[dict[str, float]]:
    """Train in place on mean squared error to the layer's output; returns the history.

    With ``out``, a run can be stopped at any moment and resumed to the same bits: weights, moments, history (apart from
    ``seconds``), torch's global generators and the place in the data. Checkpoints are whole or not there, and the
    newest two stay. One is written every ``checkpoint_minutes``, every ``checkpoint_every`` steps, at the end, and when
    the run stops early: on SIGINT or SIGTERM after the step that is under way, after which the signal does what it
    would have done (KeyboardInterrupt, SystemExit(143), the program's own handler); on any other exception, of the last
    whole step. A checkpoint that cannot be written, on a full disk, leaves the one before, and the run goes on.

    Sequences with a number that is not finite are left out and counted.

    Args:
        lorsa: initialized.
        data: sequences; each epoch goes through all of them in an order of its own.
        settings: of the run.
        out: folder for the history (``history.jsonl``, a line every ``log_every`` steps), checkpoints, and at the end
            the Lorsa itself; nothing is written when None.
        resume: go on from the newest whole checkpoint in ``out``, bit-exactly; begin where there is none. A finished
            run is returned as it is.
        progress: show a progress bar.
        overwrite: replace the run that ``out`` holds.

    Returns:
        One record a line of the history: step, positions seen, those of them that were left out, loss, normalized MSE
        of the batch (against its own variance), l0, share of dead features, learning rate, k, seconds.

    Raises:
        ValueError: before training, for sequences that do not fit the Lorsa, a folder that cannot be written, is too
            small, is being written by another run or holds one (neither ``resume`` nor ``overwrite`` set), and for a
            checkpoint of another Lorsa, other settings or other data.
        FloatingPointError: for a loss, gradient or weights that are not finite, or too many such activations; names the
            last good checkpoint.
    """
    _check(lorsa, data, settings)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: set one of them")
    if out is None and (settings.checkpoint_every or resume or overwrite):
        raise ValueError("checkpoint_every, resume and overwrite need out=, the folder of the run")
    run, signals = TrainingRun(lorsa, settings, data, None if out is None else Path(out)), Interrupts()
    with signals.held_back(), run.folder_held():
        run.prepare(resume, overwrite)
        if not run.is_finished:
            _train(run, signals, progress)
    return run.history.records


def _train(run: TrainingRun, signals: Interrupts, progress: bool) -> None:
    run.begin()
    steps = range(run.done, run.settings.steps)
    bar = tqdm(steps, initial=run.done, total=run.settings.steps, disable=not progress, desc="Lorsa")
    try:
        for _ in bar:
            signals.deliver()
            record = run.advance()
            if record is not None:
                bar.set_postfix(nmse=f"{record['nmse']:.3f}", dead=f"{record['dead_fraction']:.1%}")
            run.checkpoint_if_due()
        run.finish()
    except BaseException as error:
        run.rescue(error)
        raise


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


def _check(lorsa: Lorsa, data: Sequences, settings: LorsaTraining) -> None:
    if data.n_positions > lorsa.cfg.n_ctx:
        raise ValueError(f"sequences of {data.n_positions} positions exceed n_ctx={lorsa.cfg.n_ctx} of the Lorsa")
    if data.n_positions <= lorsa.cfg.skip_positions:
        raise ValueError(f"sequences of {data.n_positions} positions have none beyond the skipped ones")
    if data.n_sequences < settings.batch_size:
        raise ValueError(f"batch_size={settings.batch_size} exceeds the {data.n_sequences} sequences there are")
    if settings.k_start is not None and not lorsa.cfg.k <= settings.k_start <= lorsa.cfg.n_ov_heads:
        raise ValueError(f"k_start={settings.k_start} must lie between k={lorsa.cfg.k} and {lorsa.cfg.n_ov_heads}")
    if isinstance(data, ModelSequences):
        attention_module(data.model, data.layer)  # raises for a layer that is not there
