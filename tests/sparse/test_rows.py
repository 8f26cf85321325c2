"""Sparse activations and row gradients against the dense matrices they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelens_asi.sparse import rows as module
from saelens_asi.sparse.rows import (
    Activations,
    RowGradient,
    Workspace,
    row_norms,
    total_norm,
    update_row_norms_,
    weighted_row_sum,
)

D_SAE, D_IN = 40, 6


def _activations(counts: list[int], dtype: torch.dtype = torch.float64) -> Activations:
    """Random features, distinct within a row; rows have the given numbers of them."""
    starts = torch.tensor([0, *counts]).cumsum(0)
    features = [torch.randperm(D_SAE)[:count] for count in counts]
    values = torch.randn(int(starts[-1]), dtype=dtype)
    return Activations(starts, torch.cat([*features, torch.empty(0, dtype=torch.int64)]), values)


def _dense(activations: Activations, values: Tensor | None = None) -> Tensor:
    values = activations.values if values is None else values
    dense = torch.zeros(activations.n_rows, D_SAE, dtype=values.dtype)
    dense[activations.row_of_entry(), activations.features] = values
    return dense


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, D_SAE), min_size=1, max_size=9), chunk=st.sampled_from([1, 3, 2048]))
def test_products_and_sums_are_those_of_dense_matrices(counts, chunk):
    torch.manual_seed(len(counts))
    activations, table = _activations(counts), torch.randn(D_SAE, D_IN, dtype=torch.float64)
    left = torch.randn(len(counts), D_IN, dtype=torch.float64)
    torch.testing.assert_close(activations.decode(table), _dense(activations) @ table)
    products = activations.products(left, table)
    torch.testing.assert_close(_dense(activations, products), (left @ table.t()) * (_dense(activations) != 0))
    order = activations.by_feature()
    active = (_dense(activations) != 0).any(dim=0).nonzero().squeeze(1)
    weights = torch.rand(activations.features.numel(), dtype=torch.float64) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ROWS", chunk)
        sums = order.weighted_sums(weights, left, "test", Workspace())
    assert torch.equal(order.active, active)
    assert torch.equal(sums.rows, active)
    torch.testing.assert_close(sums.to_dense(D_SAE), _dense(activations, weights).t() @ left)
    torch.testing.assert_close(order.sums(weights).to_dense(D_SAE), _dense(activations, weights).sum(dim=0))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("counts", [[0], [1], [0, 3, 0, 40, 0], [7] * 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_of_a_feature_stay_in_order(counts, dtype):
    activations = _activations(counts, dtype)
    order = activations.by_feature()
    features, positions = torch.sort(activations.features, stable=True)
    active, n_entries = torch.unique_consecutive(features, return_counts=True)
    assert torch.equal(order.order, positions)
    assert torch.equal(order.rows, activations.row_of_entry()[positions])
    assert torch.equal(order.active, active)
    assert torch.equal(order.starts, torch.cat([torch.tensor([0]), n_entries.cumsum(0)]))


@pytest.mark.parametrize("n_rows", [3, 200])
def test_norms_of_changed_rows_are_renewed(n_rows):
    table = torch.randn(400, 8)
    norms, rows = row_norms(table), torch.randperm(400)[:n_rows].sort().values
    table[rows] *= 3
    update_row_norms_(norms, table, rows)
    torch.testing.assert_close(norms, table.norm(dim=1))


def test_rows_of_the_source_repeat_level_by_level():
    activations, source = _activations([3, 5, 2, 4]), torch.randn(2, D_IN, dtype=torch.float64)
    sums = activations.by_feature().weighted_sums(activations.values, source, "test", Workspace())
    torch.testing.assert_close(sums.to_dense(D_SAE), _dense(activations).t() @ source.repeat(2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_exact_as_its_inputs(dtype):
    activations = _activations([7] * 9, dtype)
    table, left = torch.randn(D_SAE, D_IN).to(dtype), torch.randn(9, D_IN).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 3e-2}
    exact = _dense(activations).double() @ table.double()
    torch.testing.assert_close(activations.decode(table).double(), exact, **tolerance)
    products = activations.products(left, table)
    exact = (left.double() @ table.double().t())[activations.row_of_entry(), activations.features]
    torch.testing.assert_close(products.double(), exact, rtol=1e-5, atol=1e-5)  # float32 inside, as in float32


def test_a_row_gradient_names_its_dimension():
    gradient = RowGradient(torch.tensor([1, 3]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(2.0))
    expected = torch.tensor([[0, 0], [0.5, 1], [0, 0], [1.5, 2]])
    assert torch.equal(gradient.to_dense(4), expected)
    assert torch.equal(gradient.to_dense(4, row_dim=1), expected.t())


def test_the_total_norm_is_that_of_torch():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,))]
    for param in parameters:
        param.grad = torch.randn_like(param)
    norm = total_norm([param.grad for param in parameters])
    torch.testing.assert_close(norm.float(), torch.nn.utils.clip_grad_norm_(parameters, 1.0))


@pytest.mark.parametrize("n", [0, 1, 600])
def test_a_weighted_sum_of_rows(n):
    table, rows = torch.randn(700, D_IN, dtype=torch.float64), torch.randperm(700)[:n]
    weights = torch.randn(n, dtype=torch.float64)
    torch.testing.assert_close(weighted_row_sum(table, RowGradient(rows, weights)), weights @ table[rows])
