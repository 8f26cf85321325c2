"""What a checkpoint tells of dead features: moments by parameter, learning rates, past firings; and files that lie."""

from __future__ import annotations

import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.training.optim import get_lr_scheduler

from saelens_asi import autopsy
from saelens_asi.dead_features.momentum import _feature_moments, load_optimizer_state, silent_drift
from tests.helpers import planted, tiny
from tests.helpers.damage import Hostile


def _checkpoint(folder: Path, architecture: str, **changes: Any) -> tuple[Any, Path]:
    trainer = tiny.trainer(architecture, n_steps=8, **changes)
    trainer.fit()
    trainer.save_checkpoint("end", base_path=folder)
    return trainer, folder / "end"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
@pytest.mark.parametrize("d_sae", [48, tiny.D_MODEL])
def test_moments_are_those_of_their_parameter(architecture, optimizer, d_sae, tmp_path):
    """Also where W_enc and W_dec are square, and shapes tell nothing."""
    trainer, path = _checkpoint(tmp_path, architecture, optimizer=optimizer, d_sae=d_sae)
    training_class: type[TrainingSAE[Any]] = get_sae_training_class(architecture)[0]
    loaded, some = training_class.load_from_disk(path), torch.tensor([0, 3, 11])
    moments = _feature_moments(loaded, load_optimizer_state(path), some)
    assert "W_dec" in moments
    for name, own in moments.items():
        kept = trainer.optimizer.state[trainer.sae.get_parameter(name)]
        expected = kept["exp_avg"][:, some] if name == "W_enc" else kept["exp_avg"][some]
        assert torch.equal(own.first, expected.double()), name
    autopsy(loaded, tiny.activations(500), optimizer_state=path, progress=False)


def test_drift_follows_the_learning_rates_of_the_history(tmp_path):
    """A decayed run, with the weights kept at each feature's last firing: the trace is what they moved since."""
    kept: dict[int, torch.Tensor] = {}
    trainer = tiny.trainer(
        n_steps=120,
        lr=2e-2,
        lr_decay_steps=80,
        total_training_samples=120 * tiny.BATCH,
        checkpoint_path=str(tmp_path),
        save_final_checkpoint=True,
        initializer="active_subspace",
        checkpoint_minutes=0,
        logger=tiny.LoggingConfig(log_to_wandb=False, wandb_log_frequency=5),
    )
    stock = trainer.step

    def step(batch: torch.Tensor) -> Any:
        output = stock(batch)
        fired = (trainer.n_forward_passes_since_fired == 0).nonzero().squeeze(1)
        for feature in fired.tolist():
            kept[feature] = trainer.sae.W_enc.detach()[:, feature].clone()
        return output

    trainer.step = step
    trainer.fit()
    (path,) = tmp_path.glob("final_*")
    state = load_optimizer_state(path)
    assert state.knows_learning_rates
    silent = [i for i in kept if 5 <= float(trainer.n_forward_passes_since_fired[i]) <= 60]
    assert len(silent) >= 3, "no feature fell silent: nothing is shown"
    drift = silent_drift(trainer.sae, state, torch.tensor(silent))
    assert bool(drift.is_traced.all())
    true = torch.stack([trainer.sae.W_enc.detach()[:, i] - kept[i] for i in silent], dim=1)
    traced = drift.moved["W_enc"]
    assert float((traced - true).norm() / true.norm()) < 0.05
    constant = load_optimizer_state({**torch.load(path / "trainer_state.pt", weights_only=True)})
    assert not constant.knows_learning_rates
    assert not silent_drift(trainer.sae, constant, torch.tensor(silent)).is_traced.any()


def test_without_the_rates_there_is_no_verdict_of_momentum_and_the_report_says_why():
    sae, _ = planted.sae("topk", ["norm", "outside"])
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    for _ in range(5):
        for parameter in sae.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
    found = autopsy(sae, planted.activations(2000), optimizer_state=optimizer.state_dict(), progress=False)
    assert "momentum" not in found.counts
    assert "the learning rate changed in training, and no training history" in found.summary()


def test_features_that_fired_seldom_in_training_are_not_called_outside():
    sae, where = planted.sae("topk", ["outside", "norm"])
    x, rare, gone = planted.activations(3000), where["outside"][:4], where["outside"][4:8]
    fired, n_tokens = torch.zeros(sae.cfg.d_sae), 1_000_000
    fired[rare], fired[gone] = 100, 100_000  # one in 10,000 tokens, and one in 10
    optimizer = torch.optim.Adam(sae.parameters())
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "act_freq_scores": fired,
        "n_frac_active_samples": n_tokens,
        "n_forward_passes_since_fired": torch.full((sae.cfg.d_sae,), 9.0),
    }
    found = autopsy(sae, x, optimizer_state=state, progress=False)
    verdicts = dict(zip(found.dead.tolist(), found.verdicts, strict=True))
    assert {verdicts[i] for i in rare.tolist()} == {"starved"}
    assert {verdicts[i] for i in gone.tolist()} == {"outside"}
    assert {verdicts[i] for i in where["outside"][8:].tolist()} == {"outside"}  # silent on a million tokens
    needed = dict(zip(found.dead.tolist(), found.evidence.tokens_needed.tolist(), strict=True))
    assert needed[int(rare[0])] == pytest.approx(30_000)
    assert "30,000 tokens would tell of half of them" in found.summary()
    assert "they fired in training: 27,000 more tokens would tell whether they still do" in found.summary()
    without = autopsy(sae, x, progress=False)
    assert without.rate_excluded == pytest.approx(3 / 3000)
    assert "excludes more than one in 1,000" in without.summary()


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "folder", "missing"])
def test_a_state_that_cannot_be_read_is_named_and_never_executed(damage, tmp_path):
    _, path = _checkpoint(tmp_path, "topk", optimizer="sparse_adam")
    file = path / "trainer_state.pt"
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        file.write_text("no state")
    elif damage == "pickle":
        file.write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
    elif damage == "folder":
        file.mkdir()
    with pytest.raises(ValueError, match=r"optimizer_state='.*end"):
        load_optimizer_state(path)
    assert not (tmp_path / "executed").exists()


def test_damage_anywhere_in_the_state_of_a_kept_run_is_named(tmp_path):
    """Its manifest tells, also where torch would read other numbers without a word."""
    trainer, path = _checkpoint(tmp_path, "topk", optimizer="sparse_adam")
    file, x = path / "trainer_state.pt", tiny.activations(100)
    whole, generator = file.read_bytes(), random.Random(0)
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"optimizer_state=.*trainer_state.pt"):
            autopsy(trainer.sae, x, optimizer_state=path, progress=False)


def test_damage_to_the_state_of_stock_saelens_never_ends_in_an_error_of_a_library(tmp_path):
    """Without a manifest a flipped number cannot be told from another; whatever is refused is named."""
    trainer, path = _checkpoint(tmp_path, "topk")
    file, x = path / "trainer_state.pt", tiny.activations(100)
    whole, generator = file.read_bytes(), random.Random(1)
    refused: list[str] = []
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        try:
            autopsy(trainer.sae, x, optimizer_state=path, progress=False)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) >= 50
    assert all("optimizer" in message for message in refused)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_moments_that_are_not_finite_are_refused(value):
    trainer = tiny.trainer(n_steps=4)
    trainer.fit()
    trainer.optimizer.state[trainer.sae.b_enc]["exp_avg_sq"][5] = value
    with pytest.raises(ValueError, match=r"moments of parameter \d are NaN or infinite"):
        load_optimizer_state(trainer.optimizer.state_dict())


def test_the_state_of_another_kind_of_optimizer_is_refused():
    sae = tiny.training_sae()
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1, momentum=0.9)
    sae(tiny.activations(50)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="not the state of Adam or SparseAdam"):
        load_optimizer_state(optimizer.state_dict())


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b'{"step": 3}\n', b'{"step": 3, "lr": null}\n', b"[1]\n", b"{\n{\n"])
def test_a_damaged_history_is_named(text, tmp_path):
    _, path = _checkpoint(tmp_path, "topk")
    (path / "training_history.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=r"training history .*training_history.jsonl cannot be read"):
        load_optimizer_state(path)


def _gradients_at(steps: set[int], n_steps: int, **schedule: Any) -> tuple[Any, dict[str, Any]]:
    """An SAE whose feature 0 has a gradient at some steps alone, with a schedule as SAELens's trainers have it."""
    sae = tiny.training_sae()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    settings = {"warm_up_steps": 0, "decay_steps": 0, "lr_end": 1e-2, "num_cycles": 1, **schedule}
    scheduler = get_lr_scheduler("constant", optimizer, training_steps=100, lr=1e-2, **settings)
    for step in range(1, n_steps + 1):
        for parameter in sae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if step in steps:
            sae.W_enc.grad[:, 0] = torch.rand(tiny.D_MODEL) + 0.5
        optimizer.step()
        scheduler.step()
    return sae, {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}


def test_a_gradient_within_the_silence_is_seen_and_not_traced():
    """As an auxiliary loss gives one: the feature did not fire, and still was not moved by momentum alone."""
    feature = torch.tensor([0])
    for gradients, is_traced in (({5}, True), ({5, 35}, False)):
        sae, state = _gradients_at(gradients, 40)
        state["n_forward_passes_since_fired"] = torch.full((sae.cfg.d_sae,), 35.0)
        assert silent_drift(sae, load_optimizer_state(state), feature).is_traced.item() is is_traced


def test_a_silence_that_began_in_the_warm_up_is_not_traced_without_a_history():
    for gradient, is_traced in ((5, False), (25, True)):
        sae, state = _gradients_at({gradient}, 40, warm_up_steps=20)
        state["n_forward_passes_since_fired"] = torch.full((sae.cfg.d_sae,), 40.0 - gradient)
        loaded = load_optimizer_state(state)
        assert loaded.knows_learning_rates
        assert silent_drift(sae, loaded, torch.tensor([0])).is_traced.item() is is_traced


def test_a_silence_that_began_before_the_first_record_is_not_traced(tmp_path):
    for gradient, is_traced in ((5, False), (25, True)):
        sae, state = _gradients_at({gradient}, 40, warm_up_steps=20)
        state["n_forward_passes_since_fired"] = torch.full((sae.cfg.d_sae,), 40.0 - gradient)
        torch.save(state, tmp_path / "trainer_state.pt")
        lines = [json.dumps({"step": step, "lr": 1e-2}) for step in (20, 30, 40)]
        (tmp_path / "training_history.jsonl").write_text("\n".join(lines) + "\n")
        assert silent_drift(sae, load_optimizer_state(tmp_path), torch.tensor([0])).is_traced.item() is is_traced
