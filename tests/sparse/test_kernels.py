"""The seam between compiled kernels and torch's operations."""

from __future__ import annotations

import importlib
import inspect
import logging

import numpy as np
import pytest
import torch

from saelens_asi.sparse import kernels
from saelens_asi.sparse.gradients import squared_error_, stack_levels, topk_gradients
from saelens_asi.sparse.kernels import kernels_take, load_kernels
from saelens_asi.sparse.rows import Activations, Entries, Workspace, row_norms
from saelens_asi.sparse_adam import AdamSettings, adam_update_rows_


@pytest.fixture
def unloaded():
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


def test_without_numba_there_are_none(unloaded, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        assert not kernels_take(torch.zeros(3))
    assert not caplog.records


def test_a_numba_that_fails_is_named_and_left_alone(unloaded, monkeypatch, caplog):
    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 2.1 or less")

    pytest.importorskip("numba")
    monkeypatch.setattr(importlib, "import_module", refuse)
    with caplog.at_level(logging.WARNING):
        assert not kernels_take(torch.zeros(3))
        assert not kernels_take(torch.zeros(3))
    (record,) = caplog.records
    assert "Numba needs NumPy 2.1 or less" in record.message


def test_loading_is_said_once(unloaded, caplog):
    pytest.importorskip("numba")
    with caplog.at_level(logging.INFO):
        assert kernels_take(torch.zeros(3))
        assert kernels_take(torch.zeros(3))
    assert len(caplog.records) == 2


def test_what_kernels_take(monkeypatch):
    pytest.importorskip("numba")
    single, double = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.float64)
    assert kernels_take(single, single)
    assert kernels_take(double)
    assert not kernels_take(single, double)
    assert not kernels_take(single.bfloat16())
    assert not kernels_take(single.t())
    assert not kernels_take(single.to("meta"))
    monkeypatch.setattr(kernels, "enabled", False)
    assert not kernels_take(single)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("n_tokens", [0, 1, 50])
def test_gradients_and_their_norm_are_those_of_torch(dtype, tolerance, n_tokens, monkeypatch):
    pytest.importorskip("numba")
    d_in, d_sae, k = 21, 60, 7
    features = torch.rand(n_tokens, d_sae).argsort(dim=1)[:, :k]
    features[:, 0] = 11  # one feature of every token; others of few
    tokens = torch.arange(n_tokens).repeat_interleave(k)
    entries = Entries(tokens, features.flatten(), torch.rand(n_tokens * k, dtype=dtype))
    activations = stack_levels([entries, entries.where(entries.features % 2 == 1)], n_tokens)
    x, d_decoded = torch.randn(n_tokens, d_in, dtype=dtype), torch.randn(2 * n_tokens, d_in, dtype=dtype)
    W_enc, W_dec = torch.randn(d_sae, d_in, dtype=dtype).t(), torch.randn(d_sae, d_in, dtype=dtype)
    compiled = topk_gradients(activations, d_decoded, x, W_enc, W_dec, Workspace())
    assert compiled.squares is not None
    monkeypatch.setattr(kernels, "enabled", False)
    by_torch = topk_gradients(activations, d_decoded, x, W_enc, W_dec, Workspace())
    assert by_torch.squares is None
    for name in ("W_enc", "b_enc", "W_dec"):
        ours, theirs = getattr(compiled, name), getattr(by_torch, name)
        assert torch.equal(ours.rows, theirs.rows)
        torch.testing.assert_close(ours.values, theirs.values, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(compiled.b_dec, by_torch.b_dec, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(compiled.row_square(), by_torch.row_square(), rtol=2 * tolerance, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_squared_error_and_its_gradients_are_those_of_autograd(dtype, tolerance):
    pytest.importorskip("numba")
    decoded, target = torch.randn(2, 50, 21, dtype=dtype)
    bias = torch.randn(21, dtype=dtype)
    inputs = [decoded.clone().requires_grad_(), bias.clone().requires_grad_()]
    loss = (inputs[0] + inputs[1] - target).square().sum(dim=1).mean()
    loss.backward()
    found, *gradients = squared_error_(decoded, bias, target, Workspace())
    torch.testing.assert_close(found, loss.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(decoded, (inputs[0] + bias).detach(), rtol=0, atol=0)
    for gradient, expected in zip(gradients, inputs, strict=True):
        torch.testing.assert_close(gradient, expected.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("width", [1, 7, 64, 576])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_norms_of_updated_rows_are_renewed(dtype, tolerance, width):
    rows, tensors = torch.arange(0, 200, 3), [torch.rand(200, width, dtype=dtype) for _ in range(3)]
    norms = row_norms(tensors[0])
    settings = AdamSettings(1e-2, 0.9, 0.99, 1e-8)
    adam_update_rows_(tensors, rows, torch.randn(67, width, dtype=dtype), 3.0, settings, norms)
    torch.testing.assert_close(norms, tensors[0].double().norm(dim=1).to(dtype), rtol=tolerance, atol=0)
    assert torch.equal(norms, row_norms(tensors[0]))  # or a resumed run would not be that which was interrupted


def test_results_do_not_depend_on_the_number_of_threads():
    rows, grad, results = torch.arange(0, 200, 3), torch.randn(67, 30), []
    initial = [torch.rand(200, 30) for _ in range(3)]
    settings = AdamSettings(1e-2, 0.9, 0.99, 1e-8, torch.tensor(2.0))
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        tensors = [tensor.clone() for tensor in initial]
        adam_update_rows_(tensors, rows, grad, 3.0, settings)
        results.append(tensors)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_error_in_another_thread_is_raised():
    def fail(out: np.ndarray, lo: int, hi: int) -> None:
        if lo > 0:
            raise RuntimeError("broken")

    torch.set_num_threads(3)
    with pytest.raises(RuntimeError, match="broken"):
        kernels._run_rows(fail, 100, [torch.zeros(100)])
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("norms", "problem"),
    [
        (torch.zeros(4, dtype=torch.float64), r"float64 \(4,\) on cpu"),
        (torch.zeros(5), r"float32 \(5,\) on cpu"),
        (torch.zeros(4, device="meta"), r"float32 \(4,\) on meta"),
        (torch.zeros(4, 2)[:, 0], r"float32 \(4,\) on cpu, not contiguous"),
    ],
)
def test_what_does_not_fit_a_kernel_is_refused_by_name(norms, problem):
    # The annotations, which are checked while tests run, would refuse most of these first.
    unchecked = inspect.unwrap(kernels.row_lengths)
    with pytest.raises(ValueError, match=rf"row_lengths: norms is torch.{problem}; it must be torch.float32 \(4,\)"):
        unchecked(torch.zeros(4, 3), norms)


def test_a_kernel_without_numba_names_what_to_install(monkeypatch):
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)
    with pytest.raises(RuntimeError, match=r'pip install "saelens_asi\[fast\]"'):
        kernels.row_lengths(torch.zeros(4, 3), torch.zeros(4))


def _sorted(features: list[int], row_starts: list[int], n_features: int = 5) -> None:
    sizes = (n_features + 2, len(features), len(features))
    starts, order, rows = (torch.zeros(size, dtype=torch.int64) for size in sizes)
    kernels.sort_by_feature(torch.tensor(features), torch.tensor(row_starts), starts=starts, order=order, rows=rows)


@pytest.mark.parametrize(
    ("features", "row_starts", "problem"),
    [
        ([0, 5, 1], [0, 3], r"features\[1\] is 5; it must lie in 0 to 4"),
        ([0, 1, -2], [0, 3], r"features\[2\] is -2; it must lie in 0 to 4"),
        ([0, 1, 2], [0, 4], "row_starts must ascend from 0 to the number of entries, 3"),
        ([0, 1, 2], [1, 3], "row_starts must ascend from 0"),
        ([0, 1, 2], [0, 2, 1, 3], "row_starts must ascend from 0"),
    ],
)
def test_entries_that_are_not_there_are_refused_before_they_are_sorted(features, row_starts, problem):
    pytest.importorskip("numba")
    with pytest.raises(ValueError, match=f"sort_by_feature: {problem}"):
        _sorted(features, row_starts)
    _sorted([0, 4, 2], [0, 0, 1, 3])
    with pytest.raises(ValueError, match="is -9"):
        Activations(torch.tensor([0, 2]), torch.tensor([-7, -9]), torch.rand(2)).by_feature()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"active": [1, 5]}, r"active\[1\] is 5; it must lie in 0 to 4"),
        ({"active": [-1, 2]}, r"active\[0\] is -1"),
        ({"rows": [0, 3, 1]}, r"rows\[1\] is 3; it must lie in 0 to 2"),
        ({"starts": [0, 2, 4]}, "starts must ascend from 0 to the number of entries, 3"),
        ({"starts": [0, 4, 3]}, "starts must ascend"),
    ],
)
def test_features_that_are_not_there_are_refused_before_their_gradients_are_made(changed, problem):
    pytest.importorskip("numba")
    given = {"active": [1, 2], "starts": [0, 2, 3], "rows": [0, 2, 1], **changed}
    indices = [torch.tensor(given[name]) for name in ("active", "starts", "rows")]
    inputs = (torch.rand(3, 4), torch.rand(3, 4), torch.rand(5, 4), *indices, torch.rand(3))
    shapes = {"d_encoder": (2, 4), "d_decoder": (2, 4), "d_bias": (2,), "squares": (2,)}
    with pytest.raises(ValueError, match=f"feature_gradients: {problem}"):
        kernels.feature_gradients(*inputs, **{name: torch.empty(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("row", [-1, 4])
def test_rows_that_are_not_there_are_refused_before_they_are_moved(row):
    pytest.importorskip("numba")
    tensors, ones = [torch.zeros(4, 3) for _ in range(3)], torch.ones(1)
    with pytest.raises(ValueError, match=rf"adam_rows: rows\[0\] is {row}; it must lie in 0 to 3"):
        kernels.adam_rows(
            *tensors,
            torch.ones(1, 3),
            torch.tensor([row]),
            None,
            *[ones] * 3,
            (ones, ones),
            grad_shares=(0.1, 0.1),
            grad_scale=1.0,
        )


def test_what_kernels_write_counts_as_written():
    pytest.importorskip("numba")
    table, norms = torch.rand(4, 3), torch.zeros(4)
    before = norms._version
    kernels.row_lengths(table, norms)
    assert norms._version > before
    decoded, gradient, errors = torch.rand(4, 3), torch.rand(4, 3), torch.rand(4)
    versions = [tensor._version for tensor in (decoded, gradient, errors)]
    kernels.squared_errors_(decoded, torch.rand(3), table, gradient=gradient, errors=errors, scale=1.0)
    assert all(t._version > v for t, v in zip((decoded, gradient, errors), versions, strict=True))
