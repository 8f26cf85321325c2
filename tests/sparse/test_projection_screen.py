"""Screened selection is exact: for whatever activations, weights and screens, also stale and useless ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelens_asi.sparse import screens as module
from saelens_asi.sparse.rows import Workspace
from saelens_asi.sparse.screens import AdaptiveScreen, ProjectionScreen, can_be_screened, choose_screen
from saelens_asi.sparse.topk import Encoder, Query, encode_top_k
from tests.helpers import tiny

D_IN, D_SAE = 48, 4096


@pytest.fixture
def cheap(monkeypatch):
    """Costs at which screens pay off for weights as small as those of a test."""
    for name, cost in {"_SCORE_COST": 1, "_FIND_COST": 0, "_COMPARE_COST": 0}.items():
        monkeypatch.setattr(module, name, cost)


def _low_rank(n: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D_IN, rank, generator=torch.Generator().manual_seed(9)))[0]
    return torch.randn(n, rank, generator=generator) @ basis.t() + noise * torch.randn(n, D_IN, generator=generator)


def _encoder(rank: int = 6, noise: float = 0.02, d_sae: int = D_SAE, **options: Any) -> Encoder:
    rows = torch.nn.functional.normalize(_low_rank(d_sae, rank, noise, seed=1))
    generator = torch.Generator().manual_seed(2)
    options = {"scale": torch.rand(d_sae, generator=generator) + 0.5, **options}
    return Encoder(rows, 0.1 * torch.randn(d_sae, generator=generator), **options)


def _assert_same(found: Any, x: Tensor, encoder: Encoder, k: int) -> None:
    (dense,) = encode_top_k(x, encoder, [Query(k)], Workspace())
    assert torch.equal(found.indices.sort(dim=1).values, dense.indices.sort(dim=1).values)
    torch.testing.assert_close(found.scores.sort(dim=1).values, dense.scores.sort(dim=1).values)


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, D_IN),
    screen_rank=st.sampled_from([1, 4, 8, 24, D_IN]),
    noise=st.sampled_from([0.0, 0.02, 0.5]),
    k=st.sampled_from([1, 5, 32]),
    scaled=st.booleans(),
)
def test_the_selection_is_that_of_the_whole_product(rank, screen_rank, noise, k, scaled):
    x, encoder = _low_rank(20, rank, noise), _encoder(rank, noise)
    encoder = encoder if scaled else replace(encoder, scale=None)
    basis = torch.linalg.qr(torch.randn(D_IN, D_IN))[0][:, :screen_rank]  # a screen need not suit the activations
    _assert_same(ProjectionScreen.of(encoder, basis).top_k(x, encoder, k, Workspace()), x, encoder, k)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_bounds_are_never_exceeded(noise):
    x, encoder = 100 * _low_rank(50, 6, noise), _encoder(noise=noise)
    basis = torch.linalg.qr(torch.randn(D_IN, 6))[0]
    scores = (x.double() @ encoder.rows.double().t() + encoder.bias) * encoder.scale
    assert (ProjectionScreen.of(encoder, basis).bounds(x).double() >= scores).all()


def test_few_candidates_are_left_where_the_screen_suits(cheap):
    x, encoder = _low_rank(200, 6, 0.01), _encoder(noise=0.01)
    screen = choose_screen(x, encoder, k=4)
    assert screen is not None
    assert screen.rank < D_IN / 2
    (dense,) = encode_top_k(x, encoder, [Query(4)], Workspace())
    candidates = (screen.bounds(x) >= dense.scores.amin(dim=1, keepdim=True)).sum(dim=1).float().mean()
    assert candidates < 40


def test_no_screen_where_the_whole_product_is_cheaper():
    x, encoder = torch.randn(200, D_IN), replace(_encoder(), rows=torch.randn(D_SAE, D_IN))
    assert choose_screen(x, encoder, k=4) is None


def test_too_many_candidates_send_a_tile_to_the_whole_product(monkeypatch):
    x, encoder = torch.randn(30, D_IN), replace(_encoder(), rows=torch.randn(D_SAE, D_IN))
    screen = ProjectionScreen.of(encoder, torch.eye(D_IN)[:, :1])
    calls = []
    dense = module.encode_top_k
    monkeypatch.setattr(module, "encode_top_k", lambda *args: calls.append(1) or dense(*args))
    _assert_same(screen.top_k(x, encoder, 8, Workspace()), x, encoder, 8)
    assert calls


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_end_as_without_a_screen(cheap, bad):
    x, encoder, adaptive = _low_rank(60, 6, 0.01), _encoder(noise=0.01), AdaptiveScreen()
    adaptive.top_k(x, encoder, 4, Workspace())
    assert adaptive.screen is not None
    x[7, 3] = bad
    found = adaptive.top_k(x, encoder, 4, Workspace())
    (dense,) = encode_top_k(x, encoder, [Query(4)], Workspace())
    finite = torch.arange(60) != 7
    assert torch.equal(found.indices[finite].sort(dim=1).values, dense.indices[finite].sort(dim=1).values)
    assert torch.equal(found.scores[7].isfinite(), dense.scores[7].isfinite())
    assert choose_screen(x, encoder, k=4) is None


@pytest.mark.parametrize(
    "encoder",
    [
        _encoder(magnitude=True),
        _encoder(d_sae=4097),
        _encoder(matmul_dtype=torch.bfloat16),
        replace(_encoder(), rows=_encoder().rows.bfloat16()),
    ],
)
def test_what_bounds_do_not_cover_is_not_screened(encoder):
    assert not can_be_screened(encoder)
    assert choose_screen(torch.randn(8, D_IN), encoder, 4) is None


def test_changed_rows_are_projected_again(cheap):
    x, encoder, adaptive = _low_rank(60, 6, 0.01), _encoder(noise=0.01), AdaptiveScreen()
    adaptive.top_k(x, encoder, 4, Workspace())
    screen = adaptive.screen
    assert screen is not None
    rows = torch.arange(0, D_SAE, 3)
    encoder.rows[rows] += 0.1 * torch.randn(len(rows), D_IN)
    adaptive.rows_changed(encoder, rows)
    torch.testing.assert_close(screen.rows, ProjectionScreen.of(encoder, screen.basis).rows)
    _assert_same(adaptive.top_k(x, encoder, 4, Workspace()), x, encoder, 4)
    assert adaptive.screen is screen


def test_weights_written_by_someone_else_are_noticed(cheap):
    x, encoder, adaptive = _low_rank(60, 6, 0.01), _encoder(noise=0.01), AdaptiveScreen()
    adaptive.top_k(x, encoder, 4, Workspace())
    before = adaptive.screen
    encoder.rows.mul_(-1)
    _assert_same(adaptive.top_k(x, encoder, 4, Workspace()), x, encoder, 4)
    assert adaptive.screen is not before


def test_the_screen_is_chosen_again_and_may_be_dropped(cheap):
    encoder, adaptive, workspace = _encoder(noise=0.01), AdaptiveScreen(), Workspace()
    seen = []
    for step in range(60):
        x = _low_rank(60, 6, 0.01) if step < 30 else torch.randn(60, D_IN)
        _assert_same(adaptive.top_k(x, encoder, 4, workspace), x, encoder, 4)
        seen.append(adaptive.screen)
    assert seen[0] is not None
    assert seen[0] is seen[24] is not seen[25]
    assert seen[-1] is None


@pytest.mark.parametrize("n_dead", [0, 40])
def test_a_training_run_selects_the_same_features_with_and_without(n_dead, monkeypatch):
    runs = []
    for screened in (True, False):
        torch.manual_seed(0)
        trainer = tiny.trainer(d_sae=2048, k=4, optimizer="sparse_adam", initializer="active_subspace", n_steps=40)
        used = []
        stock = AdaptiveScreen.top_k

        def top_k(self: Any, *args: Any, stock=stock, used=used) -> Any:
            found = stock(self, *args)
            used.append(self.screen is not None)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(AdaptiveScreen, "top_k", top_k)
            patch.setattr(module, "_FIND_COST", 0)
            patch.setattr(module, "_SCORE_COST", 0)
            patch.setattr(module, "_COMPARE_COST", 0 if screened else 10**9)
            trainer.n_forward_passes_since_fired[:n_dead] = 10**6
            trainer.fit()
        assert any(used) == screened
        runs.append(trainer)
    for name, param in runs[1].sae.named_parameters():
        torch.testing.assert_close(runs[0].sae.get_parameter(name), param, rtol=1e-3, atol=1e-4)
    assert torch.equal(runs[0].act_freq_scores, runs[1].act_freq_scores)
