"""The progress bar of runs with the flags: it moves with every step, and nothing waits for what it says."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from sae_lens import LoggingConfig
from sae_lens.training import multi_sae_trainer, sae_trainer
from sae_lens.training.sae_trainer import SAETrainer
from tqdm import tqdm

from saelens_asi import ActiveSubspaceInit
from saelens_asi.plugin.bar import Standing, TrainingBar
from tests.helpers import tiny
from tests.helpers.processes import in_processes

FLAGS: dict[str, Any] = {"initializer": ActiveSubspaceInit(d_init=4, n_tokens=256), "optimizer": "sparse_adam"}


class Watched(tqdm):
    """A bar that draws into memory, each time it moves, and notes where it was."""

    made: list[Watched] = []  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "file": io.StringIO(), "mininterval": 0, "ncols": 200})
        self.places: list[int] = []
        self.made.append(self)

    def update(self, n: float | None = 1) -> bool | None:
        done = super().update(n)
        self.places.append(int(self.n))
        return done

    @property
    def lines(self) -> list[str]:
        return self.fp.getvalue().split("\r")


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    Watched.made = []
    for module in (sae_trainer, multi_sae_trainer):
        monkeypatch.setattr(module, "tqdm", Watched)
    return Watched.made


def test_it_moves_with_every_step_and_says_how_training_stands(bars: list[Watched]) -> None:
    trainer = tiny.trainer(**FLAGS)
    trainer._bar = TrainingBar(clock=iter(range(100)).__next__)  # every text is due
    losses: list[float] = []
    stock = trainer.step
    trainer.step = lambda batch: losses.append(float((output := stock(batch)).loss)) or output
    trainer.fit()
    (bar,) = bars
    assert bar.places == [tiny.BATCH * step for step in range(1, 11)]
    live = int((trainer.n_forward_passes_since_fired < 10).sum())
    assert f"loss {losses[-1]:.4g}, {live} of 48 features live]" in bar.lines[-1]
    assert "320/320" in bar.lines[-1]
    assert " tokens/s" in bar.lines[-1]
    shown = [line for line in bar.lines if "loss" in line]
    assert all(f"loss {loss:.4g}" in line for loss, line in zip(losses, shown, strict=False))


def test_the_text_is_read_a_few_times_a_second() -> None:
    now, asked, bar = [0.0], [], tqdm(total=100, file=io.StringIO())

    def standings() -> dict[str, Standing]:
        asked.append(now[0])
        return {"": Standing(torch.tensor(1.0), float("nan"), 4)}

    shown = TrainingBar(clock=lambda: now[0])
    for step in range(1, 101):
        now[0] = step / 100
        shown.move(bar, step, standings)
    assert asked == [0.01, 0.26, 0.51, 0.76, 1.0]
    assert bar.n == 100
    assert bar.postfix == "loss 1"


def test_numbers_that_have_not_arrived_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = [False]
    monkeypatch.setattr("saelens_asi.plugin.bar._Reading.has_arrived", lambda self: arrived[0])
    bar, shown, asked = tqdm(total=100, file=io.StringIO()), TrainingBar(), []

    def standings() -> dict[str, Standing]:
        asked.append(len(asked))
        return {"": Standing(torch.tensor(float(len(asked))), torch.tensor(3), 4)}

    shown.move(bar, 10, standings)
    shown.move(bar, 20, standings)
    assert (bar.n, bar.postfix, len(asked)) == (20, None, 1)
    arrived[0] = True
    shown.move(bar, 30, standings)
    assert (bar.n, bar.postfix, len(asked)) == (30, "loss 1, 3 of 4 features live", 1)


def test_the_last_text_is_of_the_last_step(bars: list[Watched]) -> None:
    trainer = tiny.trainer(n_steps=7, **FLAGS)
    trainer._bar = TrainingBar(clock=lambda: 0.0)
    stock, losses = trainer.step, []
    trainer.step = lambda batch: losses.append(float((output := stock(batch)).loss)) or output
    trainer.fit()
    assert f"loss {losses[-1]:.4g}, " in bars[0].lines[-1]


def test_batches_that_do_not_fill_the_total_leave_no_bar_beyond_its_end(bars: list[Watched]) -> None:
    trainer = tiny.trainer(total_training_samples=100, n_steps=4, **FLAGS)
    trainer.fit()
    assert trainer.n_training_samples == 128
    assert bars[0].places[-1] == 100
    assert "100%" in bars[0].lines[-1]


def test_a_stock_run_has_saelens_own_bar(bars: list[Watched]) -> None:
    trainer = tiny.trainer(n_steps=120)
    trainer.fit()
    assert type(trainer) is SAETrainer
    assert bars[0].places == [100 * tiny.BATCH]
    assert bars[0].unit == "it"


def test_a_bar_of_the_users_own_stays(bars: list[Watched]) -> None:
    seen: list[int] = []

    class Mine(SAETrainer[Any, Any]):
        def _update_pbar(self, step_output: Any, pbar: Any, update_interval: int = 100) -> None:
            seen.append(update_interval)

    tiny.trainer(trainer_class=Mine, **FLAGS).fit()
    assert seen == [100] * 10
    assert bars[0].places == []


def test_a_resumed_run_goes_on_where_it_was(bars: list[Watched], tmp_path: Any) -> None:
    settings = {"checkpoint_path": str(tmp_path), "n_checkpoints": 1, "logger": LoggingConfig(log_to_wandb=False)}
    tiny.trainer(**settings, **FLAGS).fit()
    checkpoint = next(path.parent for path in tmp_path.glob("*/trainer_state.pt"))
    trainer = tiny.trainer(**settings, **FLAGS, resume=str(checkpoint))
    trainer.fit()
    assert bars[1].initial == int(checkpoint.name)
    assert bars[1].places[0] == int(checkpoint.name) + tiny.BATCH
    assert bars[1].places[-1] == 10 * tiny.BATCH


def test_several_saes_share_a_bar(bars: list[Watched]) -> None:
    saes = {"flag": tiny.training_sae(**FLAGS), "stock": tiny.training_sae()}
    hooks = dict.fromkeys(saes, tiny.ATTN_OUT)
    data = ({tiny.ATTN_OUT: batch} for batch in tiny.batches())
    cfg = tiny.trainer(n_steps=6).cfg
    trainer = multi_sae_trainer.MultiSAETrainer(cfg, saes, hooks, data)
    trainer.fit()
    (bar,) = bars
    assert bar.places == [tiny.BATCH * step for step in range(1, 7)]
    line = bar.lines[-1]
    assert all(f"{name}: loss " in line for name in saes)
    assert line.count(" of 48 features live") == 2


def _bar_here() -> tuple[list[int], str]:
    torch.manual_seed(0)
    Watched.made = []
    sae_trainer.tqdm = Watched
    trainer = tiny.trainer(logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=5), **FLAGS)
    trainer._bar = TrainingBar(clock=iter(range(100)).__next__)
    trainer.fit()
    (bar,) = Watched.made
    return bar.places, bar.lines[-1] if hasattr(bar, "fp") else ""  # which a bar that is switched off has not


def test_of_many_processes_the_first_alone_shows_one_of_all_features() -> None:
    (places, line), (others, _) = in_processes(2, _bar_here)
    assert places == [tiny.BATCH * step for step in range(1, 11)]
    assert others == []
    assert " of 48 features live" in line
