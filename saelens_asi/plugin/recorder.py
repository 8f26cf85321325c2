"""The training history of runs with the flags, whether or not W&B is on: measured on the step's own tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.synthetic import SyntheticSAERunnerConfig
from torch import Tensor

from saelens_asi.history import TRAINING_HISTORY, History, Record, read_history
from saelens_asi.sparse.shards import ALONE, Group

logger = logging.getLogger(__name__)

# Of a run without checkpoints, until it has ended.
UNFINISHED_HISTORY = "training_history.unfinished.jsonl"

# Within how many tokens a feature has to fire; arXiv 2508.16929 counts over the last of them.
SILENT_TOKENS = (100_000, 1_000_000, 10_000_000)

RUNNER_CONFIGS = (LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig, SyntheticSAERunnerConfig)


@dataclass(frozen=True)
class StepFacts:
    """What a record tells of a step beside its output.

    Attributes:
        step: steps done, this one included.
        n_tokens: activations trained on so far.
        lr: learning rate of this step.
        gradient_norm: before clipping; None where SAELens keeps it to itself.
        coefficients: of the losses, by SAELens's names.
        l0: features that fired on a token, the mean over the batch; a tensor without dimensions.
        n_skipped: activations of the run so far that were left out, because they were not finite.
        n_revived: features that were revived before this step; None in a run without revival.
    """

    step: int
    n_tokens: int
    lr: float
    gradient_norm: Tensor | None
    coefficients: Mapping[str, float]
    l0: Tensor
    n_skipped: int
    n_revived: int | None = None


@dataclass(frozen=True)
class Silence:
    """How long features have been silent.

    Attributes:
        steps: (n_features,), since each feature fired, of those that lie in this process.
        dead: (n_features,) bool, as SAELens counts.
        dead_window: steps after which SAELens counts a feature as dead.
        batch: activations a step.
        features: the processes that hold the other features.
    """

    steps: Tensor
    dead: Tensor
    dead_window: int
    batch: int
    features: Group = ALONE


class Recorder:
    """Keeps the history of a run: in memory, and in a file in the run's folder where it has one.

    A record costs a few reductions over (batch, d_in) and (d_sae,); no forward pass, and nothing of batch x d_sae.

    Attributes:
        tokens_per_second: between the last two records, or since this process began to train.
    """

    def __init__(self) -> None:
        self._history = History()
        self._live: Path | None = None
        self._output_folder: Path | None = None
        self._is_resumed = False
        self._clock: float | None = None
        self._seconds_before = 0.0
        self._last: tuple[int, float] = (0, 0.0)  # tokens and seconds of the record before
        self.tokens_per_second = 0.0

    @property
    def records(self) -> list[Record]:
        """Those of the run so far; always the same list."""
        return self._history.records

    def place(self, checkpoint_path: str | Path | None, output_path: str | Path | None) -> None:
        """Say where the history goes: it grows with the checkpoints, and is copied beside the finished SAE.

        Without checkpoints it grows beside where the SAE will be, under a name of its own: an earlier SAE may lie there
        until this run has ended, with its own history.
        """
        self._live = None
        if checkpoint_path is not None:
            self._live = Path(checkpoint_path) / TRAINING_HISTORY
        elif output_path is not None:
            self._live = Path(output_path) / UNFINISHED_HISTORY
        self._output_folder = None if output_path is None else Path(output_path)

    @property
    def folder(self) -> Path | None:
        """Where the history grows."""
        return None if self._live is None else self._live.parent

    def start_clock(self, n_tokens: int = 0) -> None:
        """To be called before the first step; the clock that runs already goes on.

        Args:
            n_tokens: activations trained on before.
        """
        if self._clock is None:
            self._clock = time.perf_counter()
            self._last = (n_tokens, self._seconds_before)

    def record(self, output: TrainStepOutput, facts: StepFacts, silence: Silence) -> None:
        """Add the record of a step."""
        seconds = self._seconds_before + time.perf_counter() - (self._clock or 0.0)
        n_before, seconds_before = self._last
        self.tokens_per_second = (facts.n_tokens - n_before) / max(seconds - seconds_before, 1e-9)
        self._last = (facts.n_tokens, seconds)
        self._append(
            {
                "step": facts.step,
                "n_tokens": facts.n_tokens,
                "n_skipped_tokens": facts.n_skipped,
                "seconds": round(seconds, 3),
                "lr": float(facts.lr),
                "grad_norm": None if facts.gradient_norm is None else float(facts.gradient_norm),
                "coefficients": {name: float(value) for name, value in facts.coefficients.items()},
                **_measured(output),
                "l0": float(facts.l0),
                **_counted(silence, facts),
                **({} if facts.n_revived is None else {"revived_features": facts.n_revived}),
            }
        )

    def _append(self, record: Record) -> None:
        if self._live is None and not self._history.records:
            logger.info("this run has no folder: its training history is kept in memory, as trainer.history")
        try:
            self._history.append(record)
            if self._history.path is None and self._live is not None:
                self._set_aside_other_runs(self._live)
                self._history.write_to(self._live)
        except OSError as error:
            logger.warning("the training history goes on in memory only (trainer.history): %s", error)
            self._history.keep_in_memory()
            self._live = None

    def _set_aside_other_runs(self, path: Path) -> None:
        """The history of a run that wrote to this folder before keeps its lines, under a name with its time."""
        if path.exists() and not self._is_resumed:
            ended = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
            aside = path.with_name(f"{path.stem}.{ended}{path.suffix}")
            path.replace(aside)
            logger.info("the history of an earlier run is now %s", aside)

    def copy_to(self, folder: Path) -> None:
        """Write the history so far into a folder, such as that of a checkpoint; a failure is no more than logged."""
        try:
            self._history.copy_to(folder / TRAINING_HISTORY)
        except OSError as error:
            logger.warning("the training history is not in %s: %s", folder, error)

    def finish(self) -> None:
        """Copy the history to where the finished SAE goes."""
        if self._output_folder is None:
            return
        self.copy_to(self._output_folder)
        if self._live is not None and self._live.name == UNFINISHED_HISTORY:
            self._history.keep_in_memory()
            self._live.unlink(missing_ok=True)

    def resume(self, checkpoint: Path, steps_done: int) -> None:
        """Go on with the history of a checkpoint; what came after it is dropped."""
        self._is_resumed = True
        path = checkpoint / TRAINING_HISTORY
        records = read_history(path) if path.exists() else []
        self._history.restart(record for record in records if record["step"] <= steps_done)
        self._clock = None
        self._seconds_before = self.records[-1]["seconds"] if self.records else 0.0


@torch.no_grad()
def _measured(output: TrainStepOutput) -> Record:
    """Losses and errors of a step's batch, in the space that the SAE is trained in."""
    x = output.sae_in.detach()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    error = torch.linalg.vector_norm(output.sae_out.detach() - x).square()
    nmse = float(error / (len(x) * x.var(dim=0, correction=0).sum()))
    return {
        "loss": float(output.loss.detach()),
        "losses": {name: _number(value) for name, value in output.losses.items()},
        "metrics": {name: _number(value) for name, value in output.metrics.items()},
        "nmse": nmse,
        "explained_variance": 1 - nmse,
    }


def _number(value: Tensor | float | Callable[[], Tensor | float]) -> float:
    return float(value() if callable(value) else value)


@torch.no_grad()
def _counted(silence: Silence, facts: StepFacts) -> Record:
    """Counts of features that are silent, over all processes."""
    reached = [n for n in SILENT_TOKENS if n <= facts.n_tokens]
    silent = [(silence.steps * silence.batch >= n).sum() for n in reached]
    never_fired = (silence.steps >= facts.step).sum()
    here = torch.stack([torch.full_like(never_fired, len(silence.steps)), silence.dead.sum(), never_fired, *silent])
    d_sae, dead, never, *of_reached = silence.features.sum_(here).tolist()
    return {
        "d_sae": d_sae,
        "dead_features": dead,
        "dead_fraction": dead / d_sae,
        "dead_window_tokens": silence.dead_window * silence.batch,
        "silent_features": {str(n): count for n, count in zip(reached, of_reached, strict=True)},
        "never_fired": never,
    }


def count_firings(act_freq_scores: Tensor) -> Tensor:
    """Sum of (d_sae,) counts, wide enough to stay exact over a run; a tensor without dimensions."""
    dtype = torch.float32 if act_freq_scores.device.type == "mps" else torch.float64
    return act_freq_scores.sum(dtype=dtype)


def output_folder(save_checkpoint_fn: object) -> Path | None:
    """Where SAELens's runner writes the finished SAE. A trainer knows it only through its runner's own method."""
    cfg = getattr(getattr(save_checkpoint_fn, "__self__", None), "cfg", None)
    if not isinstance(cfg, RUNNER_CONFIGS) or cfg.output_path is None:
        return None
    return Path(cfg.output_path)
