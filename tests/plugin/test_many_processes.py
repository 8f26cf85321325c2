"""A run of many processes is that of one: what it selects, its losses and gradients, its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saelens_asi import ActiveSubspaceInit
from tests.helpers import many
from tests.helpers.many import Done
from tests.helpers.processes import in_processes

FAMILY = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
INIT = ActiveSubspaceInit(d_init=5, n_tokens=512)
FLAGS: dict[str, Any] = {"initializer": INIT, "optimizer": "sparse_adam"}
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def _assert_same(found: Done, expected: Done, dtype: str, steps_of_selection: int | None = None) -> None:
    tolerance = TOLERANCE[dtype]
    for step, (one, other) in enumerate(zip(found.selected, expected.selected, strict=True)):
        assert torch.equal(one, other), f"step {step} selects other features"
    for one, other in zip(found.losses, expected.losses, strict=True):
        assert one == pytest.approx(other, rel=10 * tolerance, abs=tolerance)
    assert found.gradient_norms == pytest.approx(expected.gradient_norms, rel=20 * tolerance)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(
            found.tensors[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def _compare(n: int, architecture: str, n_steps: int = 12, **settings: Any) -> tuple[list[Done], Done]:
    settings = {"d_sae": 602, **FLAGS, **settings}
    one = {name: value for name, value in settings.items() if name != "batch_shards"}
    return in_processes(n, _train, architecture, n_steps, settings), many.train(architecture, n_steps, **one)


def _train(architecture: str, n_steps: int, settings: dict[str, Any]) -> Done:
    return many.train(architecture, n_steps, **settings)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("architecture", FAMILY)
def test_features_spread_over_processes_train_as_in_one(architecture: str, n: int, dtype: str) -> None:
    found, expected = _compare(n, architecture, dtype=dtype)
    for done in found:
        _assert_same(done, expected, dtype)
