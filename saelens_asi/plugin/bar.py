"""SAELens's progress bar, moved by every step (by SAELens every 100): loss, live features, speed, time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from saelens_asi.history import Record
from saelens_asi.plugin.recorder import SILENT_TOKENS

# Nobody reads faster; tqdm draws no more than ten times a second.
_SECONDS_A_TEXT = 0.25


class Standing(NamedTuple):
    """How the training of an SAE stands after a step.

    Attributes:
        loss: a tensor without dimensions.
        live: features that fired within the last 100,000 tokens, or since the run began; NaN where nobody knows.
        d_sae: of how many.
    """

    loss: Tensor
    live: Tensor | float
    d_sae: int


class TrainingBar:
    """Moves a bar with every step. Its text changes a few times a second, and no step waits for an accelerator.

    Attributes:
        began_at: activations with which a resumed run begins, whose time is not part of its speed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.began_at = 0
        self._clock = clock
        self._read_at = -math.inf
        self._reading: _Reading | None = None
        self._bar: Any = None

    def move(self, bar: Any, n_samples: int, standings: Callable[[], Mapping[str, Standing]]) -> None:
        """To be called after each step.

        Args:
            bar: tqdm's. One that is switched off, as in all processes but the first, costs nothing.
            n_samples: activations of the run so far.
            standings: by name, of all SAEs that the step has trained; asked for where the text is due.
        """
        if bar.disable:
            return
        if bar is not self._bar:
            self._take_over(bar)
        is_last = n_samples >= bar.total
        if is_last or (self._reading is None and self._clock() - self._read_at >= _SECONDS_A_TEXT):
            self._reading, self._read_at = _Reading(standings()), self._clock()
        if self._reading is not None and (is_last or self._reading.has_arrived()):
            bar.set_postfix_str(self._reading.text(), refresh=False)
            self._reading = None
        bar.update(min(n_samples, bar.total) - bar.n)

    def _take_over(self, bar: Any) -> None:
        self._bar, bar.unit, bar.unit_scale = bar, " tokens", True
        if bar.n < self.began_at:
            bar.n = bar.initial = bar.last_print_n = self.began_at


class _Reading:
    """Numbers on their way from where they were computed: on an accelerator that is some steps behind."""

    def __init__(self, standings: Mapping[str, Standing]) -> None:
        self._d_sae = {name: one.d_sae for name, one in standings.items()}
        rows = torch.stack([_row(one) for one in standings.values()])
        self._numbers = rows.to("cpu", non_blocking=True)  # into pinned memory, which torch takes for this by itself
        self._copied = torch.cuda.Event() if rows.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def has_arrived(self) -> bool:
        return self._copied is None or self._copied.query()

    def text(self) -> str:
        if self._copied is not None:
            self._copied.synchronize()
        values = zip(self._d_sae.items(), self._numbers.tolist(), strict=True)
        texts = [(name, _text(loss, live, d_sae)) for (name, d_sae), (loss, live) in values]
        return texts[0][1] if len(texts) == 1 else "; ".join(f"{name}: {text}" for name, text in texts)


def _row(standing: Standing) -> Tensor:
    """(2,) loss and live features, where the loss is."""
    loss = standing.loss.detach().float()
    # Filled by the device: a copy of a tensor from here would wait for it.
    live = standing.live if isinstance(standing.live, Tensor) else loss.new_full((), standing.live)
    return torch.stack([loss, live.float()])


def _text(loss: float, live: float, d_sae: int) -> str:
    return f"loss {loss:.4g}" + ("" if math.isnan(live) else f", {int(live):,} of {d_sae:,} features live")


@torch.no_grad()
def standing(trainer: Any, output: TrainStepOutput) -> Standing:
    """How one of SAELens's trainers stands, as far as this process knows."""
    silent, steps = trainer.n_forward_passes_since_fired, trainer.lr_scheduler.last_epoch
    within = min(steps, -(-SILENT_TOKENS[0] // trainer.cfg.train_batch_size_samples))
    return Standing(output.loss, (silent < within).sum(), trainer.sae.cfg.d_sae)


def standing_of_record(output: TrainStepOutput, record: Record | None, d_sae: int) -> Standing:
    """The same where other processes hold features: live ones as of the last record, which counts those of all."""
    if record is None:
        return Standing(output.loss, math.nan, d_sae)
    silent = record["silent_features"].get(str(SILENT_TOKENS[0]), record["never_fired"])
    return Standing(output.loss, record["d_sae"] - silent, record["d_sae"])
