"""Selection by 8-bit bounds is exact: for whatever activations and weights, also large, tiny, skewed and alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelens_asi.sparse import kernels
from saelens_asi.sparse import screens as module
from saelens_asi.sparse.rows import Workspace
from saelens_asi.sparse.screens import (
    AdaptiveScreen,
    ProjectionScreen,
    QuantizedScreen,
    adds_in_32_bits,
    can_be_quantized,
    choose_screen,
)
from saelens_asi.sparse.topk import Encoder, Query, encode_top_k

D_IN, D_SAE = 48, 1500


def _encoder(d_in: int = D_IN, d_sae: int = D_SAE, scaled: bool = True, seed: int = 0) -> Encoder:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator))
    scale = torch.rand(d_sae, generator=generator) + 0.5 if scaled else None
    return Encoder(rows, 0.1 * torch.randn(d_sae, generator=generator), scale)


pytest.importorskip("numba")

_TORCH_PRODUCT = module._integer_product


def _exact_product(tokens: Tensor, features: Tensor, out: Tensor | None = None) -> Tensor:
    """What the integer product is, in float64, which holds every sum of 8-bit products."""
    product = (tokens.double() @ features.double().t()).int()
    return product if out is None else out.copy_(product)


def _saturating_product(tokens: Tensor, features: Tensor, out: Tensor | None = None) -> Tensor:
    """As instructions without VNNI have it: tokens made unsigned, and two products added in 16 bits."""
    n_tokens, d_in = tokens.shape
    unsigned, signed = (tokens.int() + 128).view(n_tokens, 1, d_in // 2, 2), features.int().view(-1, d_in // 2, 2)
    pairs = (unsigned * signed).sum(dim=3).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(dim=2) - 128 * signed.sum(dim=(1, 2))).int()


@pytest.fixture(scope="module", autouse=True)
def _any_processor():
    """Where the processor does not add exactly, which the screen refuses, the rest of it is tested without."""
    with pytest.MonkeyPatch.context() as patch:
        if not adds_in_32_bits(D_IN):
            patch.setattr(module, "_integer_product", _exact_product)
            adds_in_32_bits.cache_clear()
        yield
    adds_in_32_bits.cache_clear()


@pytest.fixture
def set_product(monkeypatch):
    """Give the processor another integer product."""

    def set_product(product: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(module, "_integer_product", product)
        adds_in_32_bits.cache_clear()

    yield set_product
    adds_in_32_bits.cache_clear()


@pytest.fixture
def cheap(monkeypatch):
    """Costs at which the screen pays off for weights as small as those of a test, on any processor."""
    monkeypatch.setattr(module, "multiplies_integers_fast", lambda: True)
    for name in ("_INTEGER_COMPARE_COST", "_ROUND_COST", "_FIND_COST"):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(module, "_SCORE_COST", 1)


def _assert_same(found: Any, x: Tensor, encoder: Encoder, k: int) -> None:
    (dense,) = encode_top_k(x, encoder, [Query(k)], Workspace())
    assert torch.equal(found.indices.sort(dim=1).values, dense.indices.sort(dim=1).values)
    exact = x @ encoder.rows.t() + encoder.bias
    exact = exact if encoder.scale is None else exact * encoder.scale
    rounding = 1e-6 * float(exact.abs().max())
    torch.testing.assert_close(found.scores, exact.gather(1, found.indices), rtol=1e-5, atol=rounding)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    d_in=st.sampled_from([2, 7, 32, 48, 100]),
    d_sae=st.sampled_from([33, 700, 1500, 4096]),
    k=st.sampled_from([1, 5, 32]),
    scaled=st.booleans(),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    share=st.sampled_from([0.0, 1 / 32, 1.0]),
)
def test_the_selection_is_that_of_the_whole_product(d_in, d_sae, k, scaled, size, share):
    encoder = _encoder(d_in, d_sae, scaled)
    x = size * torch.randn(19, d_in, generator=torch.Generator().manual_seed(1))
    encoder = replace(encoder, bias=size * encoder.bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAX_SCORED_SHARE", share)
        patch.setattr(module, "_TILE_TOKENS", 8)
        patch.setattr(module, "_TILE_ENTRIES", 1)
        _assert_same(QuantizedScreen.of(encoder).top_k(x, encoder, k, Workspace()), x, encoder, k)


@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize("d_in", [7, 48, 576])
def test_bounds_are_never_exceeded_and_nearly_reached(d_in, skew):
    encoder, x = _encoder(d_in), torch.randn(50, d_in) * torch.linspace(0, -skew, d_in).exp()
    scores = (x.double() @ encoder.rows.double().t() + encoder.bias) * encoder.scale
    gap = QuantizedScreen.of(encoder).bounds(x).double() - scores
    assert (gap >= 0).all()
    assert gap.mean() < 0.05 * x.norm(dim=1).mean()  # rows of the encoder are of length 1


def test_no_token_is_given_up_where_scores_spread(monkeypatch):
    encoder, x = _encoder(d_sae=4096), torch.randn(40, D_IN)
    monkeypatch.setattr(module, "encode_top_k", None)  # not to be called
    found = QuantizedScreen.of(encoder).top_k(x, encoder, 4, Workspace())
    monkeypatch.undo()
    _assert_same(found, x, encoder, 4)


def test_features_that_are_all_alike_take_the_whole_product():
    encoder = replace(_encoder(scaled=False), rows=torch.ones(D_SAE, D_IN), bias=torch.zeros(D_SAE))
    x = torch.randn(9, D_IN)
    found = QuantizedScreen.of(encoder).top_k(x, encoder, 60, Workspace())
    torch.testing.assert_close(found.scores, x.sum(dim=1, keepdim=True).expand(9, 60))
    assert all(row.unique().numel() == 60 for row in found.indices)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_activations_and_weights_that_are_not_finite_end_as_in_the_whole_product(bad):
    encoder, x = _encoder(), torch.randn(20, D_IN)
    x[7, 3] = bad
    found = QuantizedScreen.of(encoder).top_k(x, encoder, 4, Workspace())
    (dense,) = encode_top_k(x, encoder, [Query(4)], Workspace())
    assert torch.equal(found.indices.sort(dim=1).values[:7], dense.indices.sort(dim=1).values[:7])
    assert torch.equal(found.indices[7].sort().values, dense.indices[7].sort().values)
    encoder.rows[5, 5] = bad
    x[7, 3] = 1.0
    found = QuantizedScreen.of(encoder).top_k(x, encoder, 4, Workspace())
    (dense,) = encode_top_k(x, encoder, [Query(4)], Workspace())
    assert torch.equal(found.indices.sort(dim=1).values, dense.indices.sort(dim=1).values)


def test_no_tokens():
    found = QuantizedScreen.of(_encoder()).top_k(torch.empty(0, D_IN), _encoder(), 4, Workspace())
    assert found.scores.shape == found.indices.shape == (0, 4)


def test_changed_rows_are_rounded_again_and_the_others_not():
    encoder = _encoder()
    screen = QuantizedScreen.of(encoder)
    before = screen.codes.clone()
    rows = torch.arange(0, D_SAE, 3)
    encoder.rows[rows] += 0.1 * torch.randn(len(rows), D_IN)
    screen.update_(encoder, rows)
    torch.testing.assert_close(screen.terms, QuantizedScreen.of(encoder).terms)
    assert torch.equal(screen.codes, QuantizedScreen.of(encoder).codes)
    others = torch.ones(D_SAE, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(screen.codes[others], before[others])


def test_weights_written_by_someone_else_are_noticed(cheap):
    x, encoder, adaptive = torch.randn(60, D_IN), _encoder(d_sae=4096), AdaptiveScreen()
    adaptive.top_k(x, encoder, 4, Workspace())
    before = adaptive.screen
    assert isinstance(before, QuantizedScreen)
    assert before.describes(encoder)
    encoder.rows.mul_(-1)
    assert not before.describes(encoder)
    _assert_same(adaptive.top_k(x, encoder, 4, Workspace()), x, encoder, 4)
    assert adaptive.screen is not before


@pytest.mark.parametrize(
    "encoder",
    [
        replace(_encoder(), magnitude=True),
        replace(_encoder(), matmul_dtype=torch.bfloat16),
        replace(_encoder(), rows=_encoder().rows.double()),
        _encoder(d_in=1),
        replace(_encoder(), rows=_encoder().rows.t().contiguous().t()),
    ],
)
def test_what_bounds_do_not_cover_is_not_rounded(encoder):
    assert not can_be_quantized(encoder)


def test_the_screen_is_chosen_where_it_is_cheapest(cheap, monkeypatch):
    x, encoder = torch.randn(100, D_IN), _encoder(d_sae=4096)
    assert isinstance(choose_screen(x, encoder, 4), QuantizedScreen)
    monkeypatch.setattr(module, "_INTEGER_COMPARE_COST", 10**9)
    assert not isinstance(choose_screen(x, encoder, 4), QuantizedScreen)
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "enabled", False)
    assert isinstance(choose_screen(x, encoder, 4), ProjectionScreen | None)


def test_the_screen_is_not_chosen_where_the_processor_is_slow_at_it(cheap, monkeypatch):
    x, encoder = torch.randn(100, D_IN), _encoder(d_sae=4096)
    monkeypatch.setattr(module, "multiplies_integers_fast", lambda: False)
    assert can_be_quantized(encoder)
    assert isinstance(choose_screen(x, encoder, 4), ProjectionScreen | None)


def test_a_processor_that_adds_in_16_bits_is_refused(cheap, set_product):
    x, encoder = torch.randn(100, D_IN), _encoder(d_sae=4096)
    set_product(_saturating_product)
    assert not can_be_quantized(encoder)
    assert isinstance(choose_screen(x, encoder, 4), ProjectionScreen | None)


def test_the_product_of_this_processor_is_exact_or_refused(set_product):
    codes = torch.randint(-127, 128, (40, 576), dtype=torch.int8)
    set_product(_TORCH_PRODUCT)
    assert torch.equal(_TORCH_PRODUCT(codes, codes), _exact_product(codes, codes)) or not adds_in_32_bits(576)


def test_rows_so_long_that_32_bits_overflow_are_refused():
    assert adds_in_32_bits(133_144)
    assert not adds_in_32_bits(133_145)


def test_results_do_not_depend_on_the_number_of_threads():
    encoder, x, found = _encoder(d_sae=4096), torch.randn(90, D_IN), []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        screen = QuantizedScreen.of(encoder)
        found.append((*screen.top_k(x, encoder, 8, Workspace()), screen.codes, screen.terms))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
