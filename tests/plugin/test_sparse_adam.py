"""SparseAdam in SAELens's training step: who moves, the schedule, clipping, logging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import wandb
from sae_lens import LoggingConfig
from torch import Tensor

from saelens_asi import ActiveSubspaceInit, SparseAdam
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.plugin.sparse_steps import feature_row_groups
from tests.helpers import third_party, tiny

WIDE = {"d_sae": 256, "k": 2}  # few of many features fire


def _features(sae: Any) -> dict[str, Tensor]:
    """Every per-feature parameter with the features first."""
    return {"W_dec": sae.W_dec.detach(), "W_enc": sae.W_enc.detach().T, "b_enc": sae.b_enc.detach()[:, None]}


def _moved(before: dict[str, Tensor], sae: Any) -> dict[str, Tensor]:
    return {name: (after != before[name]).any(dim=1) for name, after in _features(sae).items()}


def _fired(output: Any) -> Tensor:
    return output.feature_acts.to_dense().bool().any(dim=0)


def _steps(trainer: Any, n: int) -> Any:
    for _ in range(n):
        output = trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    return output


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "abstopk"])
@pytest.mark.parametrize("rescale", [True, False])
def test_silent_features_stay_bit_identical_and_fired_ones_move(architecture, rescale):
    trainer = tiny.trainer(architecture, optimizer="sparse_adam", rescale_acts_by_decoder_norm=rescale, **WIDE)
    _steps(trainer, 3)  # so that moments exist
    before = {name: value.clone() for name, value in _features(trainer.sae).items()}
    fired = _fired(_steps(trainer, 1))
    assert 0 < fired.sum() < 200
    for name, moved in _moved(before, trainer.sae).items():
        assert torch.equal(moved, fired), name


def test_silent_features_do_move_under_adam():
    """What the optimizer is there to prevent."""
    trainer = tiny.trainer(initializer=ActiveSubspaceInit(d_init=5, n_tokens=128), **WIDE)
    outputs = [_steps(trainer, 1) for _ in range(3)]
    once = torch.stack([_fired(output) for output in outputs]).any(dim=0)
    before = {name: value.clone() for name, value in _features(trainer.sae).items()}
    fired = _fired(_steps(trainer, 1))
    silent = once & ~fired
    assert silent.any()
    assert _moved(before, trainer.sae)["W_dec"][silent].all()


def test_silent_features_keep_their_moments():
    trainer = tiny.trainer(optimizer="sparse_adam", **WIDE)
    _steps(trainer, 3)
    state = trainer.optimizer.state[trainer.sae.W_dec]
    before = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    fired = _fired(_steps(trainer, 1))
    for name, old in before.items():
        assert torch.equal((state[name] != old).any(dim=1), fired), name


def test_the_decoder_bias_moves_as_under_adam():
    """b_dec belongs to no feature: it takes every step."""
    biases = []
    for optimizer in ("adam", "sparse_adam"):
        torch.manual_seed(0)
        trainer = tiny.trainer(optimizer=optimizer)
        _steps(trainer, 1)
        biases.append(trainer.sae.b_dec.detach().clone())
    torch.testing.assert_close(biases[0], biases[1])
    assert biases[1].all()


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, third_party.ARCHITECTURE])
@pytest.mark.parametrize("d_sae", [48, tiny.D_MODEL])
def test_every_parameter_is_split_along_its_features(architecture, d_sae):
    trainer = tiny.trainer(architecture, d_sae=d_sae, optimizer="sparse_adam")
    names = {id(param): name for name, param in trainer.sae.named_parameters()}
    dims = {
        names[id(param)]: group["row_dim"] for group in feature_row_groups(trainer.sae) for param in group["params"]
    }
    expected = {name: 0 for name in names.values()} | {"b_dec": None}
    if "W_enc" in dims:
        expected["W_enc"] = 1
    assert dims == expected


@pytest.mark.parametrize("schedule", ["constant", "cosineannealing", "cosineannealingwarmrestarts"])
def test_learning_rates_follow_saelens_schedule(schedule):
    rates: dict[str, list[float]] = {}
    for optimizer in ("adam", "sparse_adam"):
        settings = {"lr_scheduler_name": schedule, "lr_warm_up_steps": 4, "lr_decay_steps": 6, "n_steps": 16}
        if schedule == "cosineannealingwarmrestarts":
            settings["n_restart_cycles"] = 2
        trainer = tiny.trainer(optimizer=optimizer, **settings)
        rates[optimizer] = []
        for _ in range(16):
            groups = {group["lr"] for group in trainer.optimizer.param_groups}
            assert len(groups) == 1, "parameter groups have different rates"
            rates[optimizer] += groups
            _steps(trainer, 1)
    assert rates["sparse_adam"] == rates["adam"]
    assert len(set(rates["adam"])) > 5, "a schedule that never changes proves nothing"


def test_betas_come_from_the_trainer_config():
    trainer = tiny.trainer(optimizer="sparse_adam", adam_beta1=0.5, adam_beta2=0.75)
    assert all(group["betas"] == (0.5, 0.75) for group in trainer.optimizer.param_groups)


def test_gradients_are_clipped_before_the_step():
    norms = []
    trainer = tiny.trainer(provider=(batch * 1000 for batch in tiny.batches()), optimizer="sparse_adam")
    stock_step = trainer.optimizer.step

    def step(*args: Any) -> Any:
        rows = trainer.optimizer.row_gradients
        grads = [rows[param].to_dense(48) if param in rows else param.grad for param in trainer.sae.parameters()]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        return stock_step(*args)

    trainer.optimizer.step = step
    _steps(trainer, 2)
    assert norms == pytest.approx([1, 1], rel=1e-4)


def test_training_metrics_are_those_of_saelens():
    logs = {}
    for optimizer in ("adam", "sparse_adam"):
        torch.manual_seed(0)
        trainer = tiny.trainer(optimizer=optimizer, lr_warm_up_steps=4)
        output = _steps(trainer, 1)
        logs[optimizer] = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    # Of the first step: before the optimizers differ. SAELens adds in another order.
    assert logs["sparse_adam"] == pytest.approx(logs["adam"], rel=1e-6)
    assert logs["adam"]["details/current_learning_rate"] > 0
    assert {"losses/overall_loss", "metrics/l0", "sparsity/dead_features"} <= logs["adam"].keys()


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_run_that_logs_and_evaluates(prefetch, model, dataset, tmp_path, monkeypatch):
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    monkeypatch.setattr(wandb, "log", lambda values, step: logged.append({**values, "step": step}))
    monkeypatch.setattr(LoggingConfig, "log", lambda *args, **kwargs: None)
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=2, eval_every_n_wandb_logs=2)
    flags = {"initializer": ActiveSubspaceInit(d_init=4, n_tokens=256), "optimizer": "sparse_adam"}
    options = {"logger": logger, "prefetch_llm_batches": prefetch, "n_eval_batches": 1, "feature_sampling_window": 5}
    cfg = tiny.runner_config(tiny.sae_config(**flags), tmp_path, eval_batch_size_prompts=4, **options)
    sae = tiny.run(cfg, model, dataset)
    assert METADATA_KEY in sae.cfg.metadata
    keys = set().union(*logged)
    assert {"losses/mse_loss", "metrics/explained_variance", "model_performance_preservation"} <= keys
    assert [entry["step"] for entry in logged if "losses/mse_loss" in entry] == [1, 3, 5, 7, 9]


def test_dead_features_of_the_auxiliary_loss_are_updated_too():
    """Features that only the auxiliary loss reaches have a gradient: they are not frozen."""
    trainer = tiny.trainer(optimizer="sparse_adam", dead_feature_window=1, **WIDE)
    _steps(trainer, 4)
    dead = trainer.dead_neurons.clone()
    assert dead.any()
    before = {name: value.clone() for name, value in _features(trainer.sae).items()}
    fired = _fired(_steps(trainer, 1))
    assert _moved(before, trainer.sae)["W_dec"][dead & ~fired].any()


def test_the_optimizer_is_ours():
    assert isinstance(tiny.trainer(optimizer="sparse_adam").optimizer, SparseAdam)
