"""One activation that is not finite is left out and counted; weights that are not stop the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from saelens_asi import ActiveSubspaceInit, read_history
from tests.helpers import tiny

FLAGS: dict[str, Any] = {"initializer": ActiveSubspaceInit(d_init=4, n_tokens=256), "optimizer": "sparse_adam"}


def _planted(bad: dict[int, float], n_estimate: int = 8) -> Iterator[torch.Tensor]:
    """Batches whose first row, in the given training steps, holds a number that is not finite."""
    for i, batch in enumerate(tiny.batches()):
        if i - n_estimate in bad:
            batch[0, 3] = bad[i - n_estimate]
        yield batch


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_left_out_and_counted(architecture, value, tmp_path, caplog):
    trainer = tiny.trainer(
        architecture, provider=_planted({2: value, 5: value}), checkpoint_path=str(tmp_path), n_steps=12, **FLAGS
    )
    sae = trainer.fit()
    assert all(bool(weights.isfinite().all()) for weights in sae.parameters())
    records = read_history(tmp_path)
    assert records[-1]["n_skipped_tokens"] == 2
    assert records[-1]["n_tokens"] == 12 * tiny.BATCH
    assert sae.cfg.metadata["n_skipped_tokens"] == 2
    assert caplog.text.count("are not finite: left out and counted") == 1


def test_what_is_left_out_changes_nothing_else():
    """A step on a batch with a bad row is the step on the batch without it."""

    def without(batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for i, batch in enumerate(batches):
            yield batch[1:] if i == 10 else batch

    weights = []
    n = 6 * tiny.BATCH
    for provider, n_samples in ((_planted({2: float("nan")}), n), (without(tiny.batches()), n - 1)):
        torch.manual_seed(0)
        trainer = tiny.trainer(provider=provider, total_training_samples=n_samples, **FLAGS)
        weights.append(trainer.fit().state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_too_many_stop_the_run_and_name_the_last_good_checkpoint(tmp_path):
    bad = {step: float("nan") for step in range(20, 400)}
    trainer = tiny.trainer(
        provider=_planted(bad), n_steps=400, n_checkpoints=20, checkpoint_path=str(tmp_path), **FLAGS
    )
    with pytest.raises(FloatingPointError, match=r"max_skipped_fraction=0.01.*last good checkpoint is .*\d+"):
        trainer.fit()


def test_a_share_can_be_allowed(tmp_path):
    bad = {step: float("nan") for step in range(0, 400)}
    trainer = tiny.trainer(provider=_planted(bad), n_steps=400, max_skipped_fraction=0.05, **FLAGS)
    trainer.fit()
    assert trainer.sae.cfg.metadata["n_skipped_tokens"] == 400


@pytest.mark.parametrize("architecture", ["topk", "standard", "batchtopk"])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec"])
def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(architecture, name, tmp_path):
    def provider() -> Iterator[torch.Tensor]:
        for i, batch in enumerate(tiny.batches()):
            if i == 8 + 60:
                getattr(trainer.sae, name).data[..., 0] = float("nan")
            yield batch

    trainer = tiny.trainer(
        architecture, provider=provider(), n_steps=100, n_checkpoints=10, checkpoint_path=str(tmp_path), **FLAGS
    )
    with pytest.raises(FloatingPointError, match=r"not finite; the last good checkpoint is .*\d+"):
        trainer.fit()
    assert trainer.steps_done() <= 61
    saved = [torch.load(path, weights_only=True) for path in tmp_path.glob("*/trainer_state.pt")]
    assert len(saved) >= 4
    for state in saved:
        for moments in state["optimizer"]["state"].values():
            assert all(bool(value.isfinite().all()) for value in moments.values() if torch.is_tensor(value))


def test_the_count_goes_on_after_a_resume(tmp_path):
    first = tiny.trainer(
        provider=_planted({1: float("nan")}), n_steps=6, n_checkpoints=1, checkpoint_path=str(tmp_path), **FLAGS
    )
    first.fit()
    (checkpoint,) = (path.parent for path in tmp_path.glob("*/manifest.json"))
    second = tiny.trainer(provider=tiny.batches(), n_steps=6, **FLAGS)
    second.load_trainer_state(checkpoint)
    assert second.guard.n_skipped == 1
