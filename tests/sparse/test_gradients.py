"""Row gradients of TopK autoencoders, by finite differences and against dense twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saelens_asi.sparse.gradients import stack_levels, topk_gradients
from saelens_asi.sparse.rows import Activations, Entries, Workspace
from saelens_asi.sparse.topk import Encoder, Query, TopK, encode_top_k, entries_of
from tests.helpers.reference import encode_batch_top_k

pytestmark = pytest.mark.usefixtures("both_ways")

D_IN, D_SAE, N_TOKENS = 5, 30, 7


def _parameters(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = (N_TOKENS, D_IN), (D_IN, D_SAE), (D_SAE,), (D_SAE, D_IN)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _entries(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Entries:
    encoder = Encoder(W_enc.detach().t().contiguous(), b_enc.detach())
    (found,) = encode_top_k(x.detach(), encoder, [Query(k)], Workspace())
    entries = entries_of(found)
    return entries.where(entries.scores > 0)


class _Autoencoder(torch.autograd.Function):
    """Our forward and backward as one operation that autograd can check; all row gradients made whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int) -> Tensor:
        entries = _entries(x, W_enc, b_enc, k)
        # The same features twice: a second level, as the auxiliary loss and matryoshka have them.
        activations = stack_levels([entries, entries.where(entries.features % 2 == 0)], x.shape[0])
        ctx.activations = activations
        ctx.save_for_backward(x, W_enc, W_dec)
        return activations.decode(W_dec)

    @staticmethod
    def backward(ctx: Any, d_decoded: Tensor) -> Any:
        x, W_enc, W_dec = ctx.saved_tensors
        gradients = topk_gradients(ctx.activations, d_decoded.contiguous(), x, W_enc, W_dec, Workspace())
        whole = gradients.W_enc.to_dense(D_SAE, 1), gradients.b_enc.to_dense(D_SAE), gradients.W_dec.to_dense(D_SAE)
        d_x = torch.zeros_like(x)  # x is data; what reaches b_dec through it is the sum over tokens
        d_x[0] = -gradients.b_dec
        return d_x, *whole, None


def _dense_twin(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int) -> Tensor:
    scores = x @ W_enc + b_enc
    best = scores.topk(k)
    acts = torch.zeros_like(scores).scatter(1, best.indices, best.values.relu())
    even = torch.arange(D_SAE) % 2 == 0
    return torch.cat([acts @ W_dec, (acts * even) @ W_dec])


@pytest.mark.parametrize("k", [1, 4, D_SAE])  # D_SAE: more than are positive
def test_gradients_are_those_of_finite_differences(k):
    x, *weights = _parameters()
    x = x.detach()
    assert torch.autograd.gradcheck(lambda *w: _Autoencoder.apply(x, *w, k), weights)


@pytest.mark.parametrize("k", [1, 4, D_SAE])
def test_outputs_and_gradients_are_those_of_the_dense_twin(k):
    inputs, twins = _parameters(), _parameters()
    upstream = torch.randn(2 * N_TOKENS, D_IN, dtype=torch.float64)
    ours, dense = _Autoencoder.apply(*inputs, k), _dense_twin(*twins, k)
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
    ours.backward(upstream)
    dense.backward(upstream)
    torch.testing.assert_close(inputs[0].grad.sum(0), twins[0].grad.sum(0), rtol=1e-10, atol=1e-12)
    for weight, twin in zip(inputs[1:], twins[1:], strict=True):
        torch.testing.assert_close(weight.grad, twin.grad, rtol=1e-10, atol=1e-12)


def test_an_empty_batch_has_no_gradient():
    _, W_enc, b_enc, W_dec = (param.detach() for param in _parameters())
    nothing = torch.empty(0, D_IN, dtype=torch.float64)
    activations = stack_levels([_entries(nothing, W_enc, b_enc, 3)], 0)
    gradients = topk_gradients(activations, activations.decode(W_dec), nothing, W_enc, W_dec, Workspace())
    assert gradients.W_enc.rows.numel() == gradients.W_dec.rows.numel() == 0
    assert torch.equal(gradients.b_dec, torch.zeros(D_IN, dtype=torch.float64))


def test_levels_are_stacked_token_by_token():
    first = Entries(torch.tensor([2, 0]), torch.tensor([5, 6]), torch.tensor([1.0, 2.0]))
    second = Entries(torch.tensor([1]), torch.tensor([7]), torch.tensor([3.0]))
    stacked = stack_levels([first, second], n_tokens=3)
    assert isinstance(stacked, Activations)
    assert stacked.row_starts.tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert stacked.features.tolist() == [6, 5, 7]
    assert stacked.values.tolist() == [2.0, 1.0, 3.0]


def test_entries_come_token_by_token():
    found = TopK(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[8, 9], [6, 7]]))
    entries = entries_of(found)
    assert entries.tokens.tolist() == [0, 0, 1, 1]
    assert entries.features.tolist() == [8, 9, 6, 7]


@pytest.mark.parametrize("skew", [0.0, 1.0, 30.0])  # 30: one token has nearly all of the largest scores
@pytest.mark.parametrize("n_entries", [0, 3, 21, 200])
def test_batch_topk_finds_the_largest_of_the_whole_batch(skew, n_entries):
    x, W_enc, b_enc, _ = (param.detach() for param in _parameters())
    x[3] *= 1 + skew
    encoder = Encoder(W_enc.t().contiguous(), b_enc)
    entries = encode_batch_top_k(x, encoder, n_entries)
    scores = (x @ W_enc + b_enc).relu()
    expected = scores.flatten().topk(min(n_entries, scores.numel()))
    dense = torch.zeros_like(scores)
    dense[entries.tokens, entries.features] = entries.scores
    kept = torch.zeros_like(scores).flatten().scatter(0, expected.indices, expected.values).view_as(scores)
    torch.testing.assert_close(dense, kept, rtol=1e-12, atol=1e-12)
    assert (entries.scores > 0).all()


def test_batch_topk_keeps_the_first_of_equal_scores():
    x, W_enc = torch.ones(4, 3), torch.ones(3, 10)
    encoder = Encoder(W_enc.t().contiguous(), torch.zeros(10))
    entries = encode_batch_top_k(x, encoder, 13)
    assert entries.scores.tolist() == [3.0] * 13
    assert (entries.tokens * 10 + entries.features).sort().values.tolist() == list(range(13))  # the first


@pytest.mark.parametrize(
    ("starts", "features", "problem"),
    [
        ([0, 1, 2], [3, D_SAE], rf"there is no feature {D_SAE}; features must lie in 0 to {D_SAE - 1}"),
        ([0, 1, 2], [-1, 3], "there is no feature -1"),
        ([0, 1, 3], [1, 3], "row_starts must ascend from 0 to the number of entries, 2"),
        ([0, 3, 2], [1, 3], "row_starts must ascend"),
        ([0, 1, 2, 2], [1, 3], "activations have 3 rows, and d_decoded 2"),
    ],
)
def test_activations_that_do_not_fit_are_refused(starts, features, problem):
    """Loops see memory without bounds: such indices were read, and written, past the end."""
    activations = Activations(torch.tensor(starts), torch.tensor(features), torch.rand(2, dtype=torch.float64))
    x, W_enc, _, W_dec = (param.detach() for param in _parameters())
    with pytest.raises(ValueError, match=problem):
        topk_gradients(activations, x[:2], x[:2], W_enc, W_dec, Workspace())


@pytest.mark.parametrize("feature", [-1, D_SAE])
def test_products_with_features_that_are_not_there_are_refused(feature):
    activations = Activations(torch.tensor([0, 1]), torch.tensor([feature]), torch.rand(1))
    with pytest.raises(ValueError, match=f"there is no feature {feature}"):
        activations.products(torch.rand(1, D_IN), torch.rand(D_SAE, D_IN))
