"""A run of many processes is that of one: its start, selections, losses, gradients, weights and logs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import wandb
from sae_lens import LoggingConfig

from saelens_asi import ActiveSubspaceInit
from saelens_asi.activations.sae_state import shard_of
from saelens_asi.sparse import kernels
from tests.helpers import many, tiny
from tests.helpers.many import Done
from tests.helpers.processes import in_processes

FAMILY = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
FLAGS: dict[str, Any] = {
    "initializer": ActiveSubspaceInit(d_init=5, n_tokens=512),
    "optimizer": "sparse_adam",
    "d_sae": 602,
}
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def _assert_same(found: Done, expected: Done, tolerance: float) -> None:
    for step, (one, other) in enumerate(zip(found.selected, expected.selected, strict=True)):
        assert torch.equal(one, other), f"step {step} selects other features"
    for one, other in zip(found.losses, expected.losses, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)
    # Lengths of 10 and more, of sums in another order.
    assert found.gradient_norms == pytest.approx(expected.gradient_norms, rel=10 * tolerance)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def _compare(n: int, architecture: str, n_steps: int = 12, **settings: Any) -> Done:
    """Train with n processes and with one; returns what the latter did."""
    settings = {**FLAGS, **settings}
    expected = _train(architecture, n_steps, dict(settings))
    for found in in_processes(n, _train, architecture, n_steps, settings):
        _assert_same(found, expected, TOLERANCE[settings.get("dtype", "float32")])
        assert found.n_bytes > 0
    assert expected.n_bytes == 0
    return expected


def _train(architecture: str, n_steps: int, settings: dict[str, Any]) -> Done:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "enabled", settings.pop("kernels", True))
        return many.train(architecture, n_steps, **settings)


@pytest.mark.parametrize(("n", "dtype"), [(2, "float32"), (4, "float64")])
@pytest.mark.parametrize("architecture", FAMILY)
def test_features_spread_over_processes_train_as_in_one(architecture: str, n: int, dtype: str) -> None:
    done = _compare(n, architecture, dtype=dtype)
    assert max(done.gradient_norms) > 1  # all of them clipped by the norm of the whole


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_moments_that_stay_in_silence_are_those_of_one_process(architecture: str) -> None:
    kept = _compare(2, architecture, silent_moments="keep")
    decaying = _train(architecture, 12, {**FLAGS})
    assert not torch.equal(decaying.tensors["W_dec"], kept.tensors["W_dec"])


@pytest.mark.parametrize("architecture", FAMILY)
def test_a_batch_is_split_too(architecture: str) -> None:
    _compare(4, architecture, batch_shards=2, apply_b_dec_to_input=False)


@pytest.mark.parametrize("batch_shards", [1, 2])
@pytest.mark.parametrize("architecture", FAMILY)
def test_dead_features_of_all_processes_take_part_in_the_auxiliary_loss(architecture: str, batch_shards: int) -> None:
    settings: dict[str, Any] = {"initializer": "default", "dead_feature_window": 2, "batch_shards": batch_shards}
    if architecture.startswith("matryoshka"):
        settings["use_matryoshka_aux_loss"] = True
    done = _compare(4, architecture, dtype="float64", **settings)
    assert done.losses[-1]["auxiliary_reconstruction_loss"] > 0
    assert done.losses[0]["auxiliary_reconstruction_loss"] == 0


@pytest.mark.parametrize("architecture", FAMILY)
def test_one_process_has_all_dead_features(architecture: str) -> None:
    """As many of its own as make the whole product cheaper than a screen, and of all features together too few."""
    done = _compare(4, architecture, initializer="default", dead_from=550)
    assert done.losses[-1]["auxiliary_reconstruction_loss"] > 0


@pytest.mark.parametrize("architecture", FAMILY)
def test_ties_across_processes_fall_as_in_one(architecture: str) -> None:
    """Each feature has thirteen equals, of which four processes hold three or four each."""
    done = _compare(4, architecture, n_steps=2, initializer="default", equal_every=43)
    tokens, features = done.selected[0].T
    n_equals = (tokens * 43 + features % 43).unique(return_counts=True)[1]
    assert n_equals.min() < 14  # not all of them were taken


def test_few_features_in_each_process_and_no_kernels() -> None:
    _compare(4, "topk", initializer="default", d_sae=12)
    _compare(2, "batchtopk", kernels=False)


def test_plain_adam_and_scaled_activations() -> None:
    # In float32 Adam moves a row by its whole rate for a gradient that is zero up to rounding.
    _compare(2, "topk", optimizer="adam", dtype="float64", normalize_activations="expected_average_only_in")


@pytest.mark.parametrize("initializer", ["default", FLAGS["initializer"]], ids=["default", "active_subspace"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_the_initial_weights_are_those_of_one_process_to_the_bit(architecture: str, initializer: Any) -> None:
    settings = {**FLAGS, "initializer": initializer}
    expected = many.train(architecture, 1, **settings).initial
    for found in in_processes(3, _train, architecture, 1, settings):
        assert all(torch.equal(found.initial[name], tensor) for name, tensor in expected.items())


def test_a_group_of_one_process_has_the_bits_of_one() -> None:
    (found,) = in_processes(1, _train, "topk", 4, FLAGS)
    expected = many.train("topk", 4, **FLAGS)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def _first_weights(seed_of_first: int) -> torch.Tensor:
    torch.manual_seed(seed_of_first + torch.distributed.get_rank())
    sae = tiny.training_sae("topk", optimizer="sparse_adam")
    return torch.cat(shard_of(sae).features.gather_rows(sae.W_dec.detach()))


def test_processes_with_other_seeds_draw_as_the_first_does() -> None:
    torch.manual_seed(7)
    expected = tiny.training_sae("topk", optimizer="sparse_adam").W_dec
    assert all(torch.equal(found, expected) for found in in_processes(3, _first_weights, 7))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}/{inner}": one for inner, one in nested.items()}
    return flat


def _logged(architecture: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What goes to W&B in a runner's run with evaluations, and what its SAE says of it."""
    torch.manual_seed(0)
    logs: list[dict[str, Any]] = []
    wandb.init = lambda **settings: None  # which would put a log of its own in place
    wandb.log = lambda values, step: logs.append({"at": step, **_flat(values)})
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=2, eval_every_n_wandb_logs=2)
    cfg = tiny.runner_config(
        tiny.sae_config(architecture, **FLAGS),
        "",
        output_path=None,
        logger=logger,
        dead_feature_window=3,
        feature_sampling_window=4,
    )
    trained = tiny.run(cfg, tiny.hooked_transformer(), tiny.tokens())
    return logs, {"l0": trained.cfg.metadata.l0, "dead": trained.cfg.metadata.num_dead_features}


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_what_is_logged_is_of_all_features(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init", "log"):
        monkeypatch.setattr(wandb, name, None)  # put back afterwards
    expected, metadata = _logged(architecture)
    assert any(any("ce_loss_score" in name for name in values) for values in expected)
    (found, found_metadata), _ = in_processes(2, _logged, architecture)
    assert any("metrics/nmse/" in values and "details/gradient_norm/" in values for values in found)
    assert found_metadata == pytest.approx(metadata)
    assert len(found) == len(expected) > 4
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one.get("details/tokens_per_second/", 1) > 0
        numbers = [name for name, value in other.items() if isinstance(value, int | float) and "second" not in name]
        assert [one[name] for name in numbers] == pytest.approx([other[name] for name in numbers], rel=1e-4, abs=1e-5)


def _refused(case: str) -> str:
    settings: dict[str, Any] = dict(FLAGS)
    try:
        if case == "batches":
            rank = torch.distributed.get_rank()
            tiny.trainer("topk", tiny.batches(seed=rank), n_steps=100, **{**settings, "initializer": "default"}).fit()
        elif case == "few features":
            tiny.training_sae("topk", **{**settings, "d_sae": 3, "k": 1})
        elif case == "batch_shards":
            tiny.training_sae("topk", **settings, batch_shards=3)
        else:
            tiny.training_sae("jumprelu", **settings)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("n", "case", "told"),
    [
        (2, "batches", "the processes were given different batches"),
        (4, "few features", "d_sae=3 features cannot be spread over 4 processes"),
        (2, "batch_shards", "batch_shards=3 must divide the 2 processes"),
        (2, "architecture", "JumpReLUTrainingSAE cannot be spread over 2 processes: only the TopK family can"),
    ],
)
def test_what_processes_cannot_do_is_said_in_all_of_them(n: int, case: str, told: str) -> None:
    assert all(told in error for error in in_processes(n, _refused, case))
