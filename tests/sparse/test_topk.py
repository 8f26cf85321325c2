"""Exact TopK by groups and by tiles against torch.topk over everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelens_asi.sparse import topk as module
from saelens_asi.sparse.rows import Workspace
from saelens_asi.sparse.topk import Encoder, Query, encode_top_k, top_k


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and several blocks of features, the last ones incomplete."""
    monkeypatch.setattr(module, "TILE_FEATURES", 300)
    monkeypatch.setattr(module, "TILE_ENTRIES", 300 * 7)


def _encoder(d_sae: int = 1000, d_in: int = 12, dtype: torch.dtype = torch.float64, **options) -> Encoder:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(d_sae, generator=generator, dtype=torch.float64).to(dtype)
    return Encoder(rows, bias, **options)


def _dense(x: Tensor, encoder: Encoder) -> Tensor:
    scores = x @ encoder.rows.t() + encoder.bias
    return scores if encoder.scale is None else scores * encoder.scale


def _sorted(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    indices, order = found[1].sort(dim=1)
    return found[0].gather(1, order), indices


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(0, 5),
    n_columns=st.integers(1, 400),
    k=st.integers(1, 40),
    sizes=st.sampled_from([(16, 8), (3, 2), (2,)]),
)
def test_groups_find_what_topk_finds(n_rows, n_columns, k, sizes):
    k = min(k, n_columns)
    scores = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(n_columns))
    expected, found = scores.topk(k, dim=1), top_k(scores, k, sizes)
    for a, b in zip(_sorted(found), _sorted(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n_values", [2, 3, 40])
def test_of_equal_scores_those_in_the_lower_columns_are_taken(n_values):
    scores = torch.randint(0, n_values, (50, 640)).float()
    found, expected = top_k(scores, 5), scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.indices.sort().values, expected.indices[:, :5].sort().values)
    assert torch.equal(scores.gather(1, found.indices), found.scores)


def test_infinities_and_nans_are_ranked_as_by_torch():
    scores = torch.randn(3, 640)
    scores[0, 7], scores[1, 600], scores[2, 3] = torch.inf, -torch.inf, torch.nan
    for found, expected in zip(top_k(scores, 4), scores.topk(4), strict=True):
        assert torch.equal(found.sort().values.nan_to_num(9), expected.sort().values.nan_to_num(9))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_tiles_and_blocks_find_what_the_whole_product_holds(small_tiles, scaled, magnitude):
    x = torch.randn(20, 12, dtype=torch.float64)
    encoder = _encoder(scale=torch.rand(1000, dtype=torch.float64) + 0.5 if scaled else None, magnitude=magnitude)
    dense = _dense(x, encoder)
    some = torch.tensor([3, 299, 300, 301, 650, 651, 999])
    everything, subset = encode_top_k(x, encoder, [Query(9), Query(4, some)], Workspace())
    for found, k, columns in ((everything, 9, torch.arange(1000)), (subset, 4, some)):
        ranked = dense[:, columns].abs() if magnitude else dense[:, columns]
        expected = columns[ranked.topk(k).indices].sort().values
        assert torch.equal(found.indices.sort().values, expected)
        torch.testing.assert_close(found.scores, dense.gather(1, found.indices), rtol=1e-12, atol=1e-12)


def test_more_wanted_than_a_block_holds(small_tiles):
    x, encoder = torch.randn(3, 12, dtype=torch.float64), _encoder(d_sae=700)
    (found,) = encode_top_k(x, encoder, [Query(650)], Workspace())
    assert torch.equal(found.indices.sort().values, _dense(x, encoder).topk(650).indices.sort().values)


def test_an_empty_batch_has_an_empty_answer():
    (found,) = encode_top_k(torch.empty(0, 12, dtype=torch.float64), _encoder(), [Query(4)], Workspace())
    assert found.scores.shape == found.indices.shape == (0, 4)


def test_a_product_in_low_precision_keeps_bias_and_scale_outside():
    x = torch.randn(30, 12)
    encoder = _encoder(dtype=torch.float32, scale=torch.rand(1000) + 0.5, matmul_dtype=torch.bfloat16)
    product = (x.bfloat16() @ encoder.rows.bfloat16().t()).float()
    dense = (product + encoder.bias) * encoder.scale
    (found,) = encode_top_k(x, encoder, [Query(5)], Workspace())
    assert torch.equal(found.scores.sort().values, dense.topk(5).values.sort().values)


def test_no_product_is_held_whole(small_tiles):
    workspace = Workspace()
    encode_top_k(torch.randn(50, 12, dtype=torch.float64), _encoder(), [Query(4)], workspace)
    assert sum(buffer.numel() for buffer in workspace._buffers.values()) <= 300 * 7 + 300 * 13
