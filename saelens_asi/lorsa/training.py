"""Train a Lorsa on sequences: schedule, history on disk, checkpoints, resume."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.history import LORSA_HISTORY, History, read_history
from saelens_asi.lorsa.config import from_dict
from saelens_asi.lorsa.io import load_lorsa, save_lorsa
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.lorsa.sequences import Sequences
from saelens_asi.resume import differences, written_whole
from saelens_asi.sparse_adam import SparseAdam

CHECKPOINTS = "checkpoints"
_OPTIMIZER, _STATE = "optimizer.pt", "state.json"


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
        checkpoint_every: steps between two checkpoints; 0: only the last.
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
    checkpoint_every: int = 0
    dead_after: int = 100_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in (("steps", 1), ("batch_size", 1), ("log_every", 1), ("dead_after", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("lr_warm_up_steps", "lr_decay_steps", "k_warm_up_steps", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
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
) -> list[dict[str, float]]:
    """Train in place on mean squared error to the layer's output; returns the history.

    Args:
        lorsa: initialized.
        data: sequences; each epoch goes through all of them in an order of its own.
        settings: of the run.
        out: folder for the history (``history.jsonl``, a line every ``log_every`` steps), checkpoints, and at the end
            the Lorsa itself; nothing is written when None.
        resume: go on from the last checkpoint in ``out``, bit-exactly, if there is one.
        progress: show a progress bar.

    Returns:
        One record a line of the history: step, positions seen, loss, normalized MSE of the batch (against its own
        variance), l0, share of dead features, learning rate, k, seconds.

    Raises:
        ValueError: for sequences longer than the Lorsa's context, or a checkpoint of other settings.
    """
    _check(lorsa, data, settings, out, resume)
    run = TrainingRun(lorsa, settings, data.n_positions, None if out is None else Path(out))
    if resume:
        run.restore()
    run.begin()
    steps = range(run.done, settings.steps)
    bar = tqdm(steps, initial=run.done, total=settings.steps, disable=not progress, desc="Lorsa")
    for step in bar:
        outcome = run.step(*data.batch(batch_index(step, settings, data.n_sequences)))
        if run.done % settings.log_every == 0 or run.done == settings.steps:
            record = run.record(outcome)
            bar.set_postfix(nmse=f"{record['nmse']:.3f}", dead=f"{record['dead_fraction']:.1%}")
        if settings.checkpoint_every and run.done % settings.checkpoint_every == 0:
            run.checkpoint()
    run.finish()
    return run.history.records


class StepOutcome(NamedTuple):
    """What the history needs of a step.

    Attributes:
        loss: () mean over positions of the squared error's sum.
        y: (batch_size, n_positions - skip_positions, d_model) the layer's output at the positions that count.
        fired: (m,) bool of the selected features, True where they fired at such a position.
    """

    loss: Tensor
    y: Tensor
    fired: Tensor


class TrainingRun:
    """The state of a run: all that a checkpoint holds, and how a step changes it.

    Attributes:
        lorsa: trained in place.
        settings: of the run.
        n_positions: of a sequence, the skipped ones included.
        folder: of the history, the checkpoints and the finished Lorsa; None: nothing is written.
        optimizer: of ``make_optimizer``.
        silent: (n_ov_heads,) int64 positions since each feature last fired.
        history: a record each logged step.
        done: steps that are finished.
    """

    def __init__(self, lorsa: Lorsa, settings: LorsaTraining, n_positions: int, folder: Path | None = None) -> None:
        self.lorsa, self.settings, self.n_positions, self.folder = lorsa, settings, n_positions, folder
        self.optimizer = make_optimizer(lorsa, settings)
        self.silent = torch.zeros(lorsa.cfg.n_ov_heads, dtype=torch.int64, device=lorsa.W_V.device)
        self.history = History()
        self.done = 0
        self._start, self._seconds_before = time.perf_counter(), 0.0

    def begin(self) -> None:
        """Start the clock, and the history's file."""
        if self.folder is not None:
            self.history.write_to(self.folder / LORSA_HISTORY)
        self.lorsa.provenance["training"] = asdict(self.settings)
        self.lorsa.train()
        self._start = time.perf_counter()
        self._seconds_before = self.history.records[-1]["seconds"] if self.history.records else 0.0

    def step(self, x: Tensor, y: Tensor) -> StepOutcome:
        """One update on (batch_size, n_positions, d_model) input and output of the layer."""
        lorsa, settings = self.lorsa, self.settings
        lorsa.current_k = settings.k_at(self.done, lorsa.cfg.k)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr_at(self.done)
        x, y = x.to(lorsa.W_V), y.to(lorsa.W_V)[:, lorsa.cfg.skip_positions :]
        y_hat, features, fired = lorsa.reconstruct(x)
        loss = (y_hat - y).square().sum(dim=-1).mean()
        for param in lorsa.parameters():  # all of them: queries and keys get gradients also where they are not trained
            param.grad = None
        loss.backward()
        if settings.max_grad_norm is not None:
            trained = [param for group in self.optimizer.param_groups for param in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        self.optimizer.step()
        self.silent += y.shape[0] * y.shape[1]
        self.silent[features[fired]] = 0
        self.done += 1
        return StepOutcome(loss.detach(), y, fired)

    def record(self, outcome: StepOutcome) -> dict[str, float]:
        """Add the last step to the history; returns the record."""
        y, settings = outcome.y, self.settings
        variance = (y - y.mean(dim=(0, 1))).square().sum(dim=-1).mean()
        loss = float(outcome.loss)
        record = {
            "step": self.done,
            "n_tokens": self.done * settings.batch_size * self.n_positions,
            "loss": loss,
            "nmse": loss / float(variance),
            "l0": float(outcome.fired.sum()) / (y.shape[0] * y.shape[1]),
            "dead_fraction": float((self.silent >= settings.dead_after).float().mean()),
            "lr": settings.lr_at(self.done - 1),
            "k": self.lorsa.current_k,
            "seconds": round(self._seconds_before + time.perf_counter() - self._start, 2),
        }
        self.history.append(record)
        return record

    def checkpoint(self) -> None:
        """Write Lorsa, optimizer, silent positions and settings, each file whole, below ``folder``; if there is one."""
        if self.folder is None:
            return
        folder = self.folder / CHECKPOINTS / f"step_{self.done:08d}"
        save_lorsa(self.lorsa, folder)
        with written_whole(folder / _OPTIMIZER) as unfinished:
            torch.save({"optimizer": self.optimizer.state_dict(), "silent": self.silent}, unfinished)
        state = {"step": self.done, "settings": asdict(self.settings)}
        with written_whole(folder / _STATE) as unfinished:  # last: it marks the checkpoint as finished
            unfinished.write_text(json.dumps(state, indent=2))

    def restore(self) -> None:
        """Go back to the last checkpoint below ``folder``, if there is one.

        Raises:
            ValueError: for a checkpoint of another Lorsa, or of other settings than ``log_every``.
        """
        checkpoint = None if self.folder is None else last_checkpoint(self.folder)
        if self.folder is None or checkpoint is None:
            return
        state = json.loads((checkpoint / _STATE).read_text())
        saved = load_lorsa(checkpoint)
        self._check_settings(checkpoint, saved, state["settings"])
        self.lorsa.load_state_dict(saved.state_dict())
        self.lorsa.provenance = saved.provenance
        # torch.load, unlike a mapped file, reads into memory that torch allocates: moments continue to equal bits.
        extra = torch.load(checkpoint / _OPTIMIZER, map_location=self.lorsa.W_V.device, weights_only=True)
        self.optimizer.load_state_dict(extra["optimizer"])
        self.silent = extra["silent"]
        self.done = int(state["step"])
        self.history = History(record for record in read_history(self.folder) if record["step"] <= self.done)

    def _check_settings(self, checkpoint: Path, saved: Lorsa, settings: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(asdict(self.settings)))
        changed = [name for name in now if now[name] != settings.get(name) and name != "log_every"]
        if changed:
            detail = differences({name: settings.get(name) for name in changed}, {name: now[name] for name in changed})
            raise ValueError(f"{checkpoint} was written with other settings {changed} ({detail}): resume with the same")
        if saved.cfg != self.lorsa.cfg:
            detail = differences(saved.cfg.to_dict(), self.lorsa.cfg.to_dict())
            raise ValueError(f"{checkpoint} was written with other settings of the Lorsa ({detail}): resume the same")

    def finish(self) -> None:
        """Leave the Lorsa as it is to be used, and write it."""
        self.lorsa.current_k = self.lorsa.cfg.k
        self.lorsa.eval()
        if self.folder is not None:
            save_lorsa(self.lorsa, self.folder)


def batch_index(step: int, settings: LorsaTraining, n_sequences: int) -> Tensor:
    """(batch_size,) sequences of a step: a function of the step alone, so a resumed run sees the same batches."""
    per_epoch = n_sequences // settings.batch_size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(n_sequences, generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch))
    return order[place * settings.batch_size : (place + 1) * settings.batch_size]


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest finished checkpoint of a run's folder: one with its ``state.json``. None where there is none."""
    finished = sorted((Path(folder) / CHECKPOINTS).glob(f"step_*/{_STATE}"))
    return finished[-1].parent if finished else None


def _check(lorsa: Lorsa, data: Sequences, settings: LorsaTraining, out: str | Path | None, resume: bool) -> None:
    if data.n_positions > lorsa.cfg.n_ctx:
        raise ValueError(f"sequences of {data.n_positions} positions exceed n_ctx={lorsa.cfg.n_ctx} of the Lorsa")
    if data.n_positions <= lorsa.cfg.skip_positions:
        raise ValueError(f"sequences of {data.n_positions} positions have none beyond the skipped ones")
    if data.n_sequences < settings.batch_size:
        raise ValueError(f"batch_size={settings.batch_size} exceeds the {data.n_sequences} sequences there are")
    if settings.k_start is not None and not lorsa.cfg.k <= settings.k_start <= lorsa.cfg.n_ov_heads:
        raise ValueError(f"k_start={settings.k_start} must lie between k={lorsa.cfg.k} and {lorsa.cfg.n_ov_heads}")
    if out is None:
        if settings.checkpoint_every or resume:
            raise ValueError("checkpoint_every and resume need out=, the folder of the run")
    elif not resume and last_checkpoint(out) is not None:
        raise ValueError(f"{out} holds the checkpoints of another run: set resume=True, or give another folder")
