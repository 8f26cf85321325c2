"""The update of some rows against that of all, and against Adam as it is defined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saelens_asi import sparse_adam as module
from saelens_asi.sparse_adam import AdamSettings, adam_update_, adam_update_rows_

pytestmark = pytest.mark.usefixtures("both_ways")

SETTINGS = AdamSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8)


def _adam(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor | float, s: AdamSettings) -> list[Tensor]:
    """Algorithm 1 of arXiv 1412.6980, without regard to speed."""
    grad = grad if s.grad_divisor is None else grad / s.grad_divisor
    m, v = s.beta1 * m + (1 - s.beta1) * grad, s.beta2 * v + (1 - s.beta2) * grad**2
    return [param - s.lr * (m / (1 - s.beta1**step)) / ((v / (1 - s.beta2**step)).sqrt() + s.eps), m, v]


def _tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    param, m = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    return [param, m, torch.rand(shape, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divisor", [None, 2.5])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(50, 12), (50,), (50, 3, 4)])
def test_rows_move_by_the_definition_and_the_others_not_at_all(monkeypatch, dtype, divisor, per_row, share, shape):
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 84)  # several chunks, the last one incomplete
    torch.manual_seed(0)
    tensors = _tensors(shape, dtype)
    rows = torch.randperm(50)[: int(50 * share)].sort().values
    grad = torch.randn(len(rows), *shape[1:], dtype=dtype)
    step: Tensor | float = torch.arange(1, len(rows) + 1, dtype=dtype) if per_row else 7.0
    own = step.view(-1, *[1] * (len(shape) - 1)) if isinstance(step, Tensor) else step
    settings = SETTINGS._replace(grad_divisor=None if divisor is None else torch.tensor(divisor))
    param, m, v = (tensor[rows] for tensor in tensors)
    expected = _adam(param, grad, m, v, own, settings)
    before = [tensor.clone() for tensor in tensors]
    adam_update_rows_(tensors, rows, grad, step, settings)
    silent = torch.ones(50, dtype=torch.bool).index_fill_(0, rows, False)
    for tensor, old, new in zip(tensors, before, expected, strict=True):
        assert torch.equal(tensor[silent], old[silent])
        torch.testing.assert_close(tensor[rows], new)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_rows_of_a_transposed_matrix(share):
    torch.manual_seed(0)
    tensors = _tensors((50, 12), torch.float64)
    across = [tensor.t().contiguous() for tensor in tensors]
    rows = torch.randperm(50)[: int(50 * share)].sort().values
    grad = torch.randn(len(rows), 12, dtype=torch.float64)
    adam_update_rows_(tensors, rows, grad, 3.0, SETTINGS)
    adam_update_rows_([tensor.t() for tensor in across], rows, grad, 3.0, SETTINGS)
    for tensor, other in zip(tensors, across, strict=True):
        torch.testing.assert_close(tensor, other.t())


def test_moments_may_be_wider_than_the_parameter():
    torch.manual_seed(0)
    param, m, v = _tensors((5, 4), torch.float32)
    low, grad = param.bfloat16(), torch.randn(5, 4)
    expected = _adam(low.float(), grad, m, v, 3.0, SETTINGS)
    adam_update_(low, grad, m, v, 3.0, SETTINGS)
    torch.testing.assert_close(low.float(), expected[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(m, expected[1])
    torch.testing.assert_close(v, expected[2])


def test_silent_neighbours_survive_gradients_that_are_not_finite():
    tensors = _tensors((40, 6), torch.float32)
    before = [tensor.clone() for tensor in tensors]
    rows = torch.arange(1, 40)
    adam_update_rows_(tensors, rows, torch.full((39, 6), torch.nan), 1.0, SETTINGS)
    assert all(torch.equal(tensor[0], old[0]) for tensor, old in zip(tensors, before, strict=True))
    assert tensors[0][1:].isnan().all()
