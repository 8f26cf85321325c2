"""The selection is exact, to the bit and whatever the approximation: for activations and weights of every kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
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
    Approximation,
    EightBit,
    LowRank,
    Whole,
    adds_in_32_bits,
    can_be_quantized,
    can_be_screened,
    leading_directions,
    screened_top_k,
)
from saelens_asi.sparse.shards import Shard
from saelens_asi.sparse.topk import Encoder, Query, TopK, encode_top_k
from tests.helpers import tiny

pytest.importorskip("numba")

D_IN, D_SAE, K = 48, 4096, 4

_TORCH_PRODUCT = module._integer_product


def _exact_product(tokens: Tensor, features: Tensor, out: Tensor) -> None:
    """What the integer product is, in float64, which holds every sum of 8-bit products."""
    out.copy_((tokens.double() @ features.double().t()).int())


def _saturating_product(tokens: Tensor, features: Tensor, out: Tensor) -> None:
    """As instructions without VNNI have it: tokens made unsigned, and two products added in 16 bits."""
    n_tokens, d_in = tokens.shape
    unsigned, signed = (tokens.int() + 128).view(n_tokens, 1, d_in // 2, 2), features.int().view(-1, d_in // 2, 2)
    pairs = (unsigned * signed).sum(dim=3).clamp(-(2**15), 2**15 - 1)
    out.copy_((pairs.sum(dim=2) - 128 * signed.sum(dim=(1, 2))).int())


@pytest.fixture(scope="module", autouse=True)
def _any_processor() -> Iterator[None]:
    """Where the processor does not add exactly, and 8 bits are refused, they are tested with another product."""
    with pytest.MonkeyPatch.context() as patch:
        if not adds_in_32_bits(D_IN):
            patch.setattr(module, "_integer_product", _exact_product)
            adds_in_32_bits.cache_clear()
        yield
    adds_in_32_bits.cache_clear()


@pytest.fixture
def set_product(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Give the processor another integer product."""

    def set_product(product: Callable[..., None]) -> None:
        monkeypatch.setattr(module, "_integer_product", product)
        adds_in_32_bits.cache_clear()

    yield set_product
    adds_in_32_bits.cache_clear()


def _vectors(n: int, d_in: int, rank: int, noise: float, seed: int) -> Tensor:
    basis = torch.linalg.qr(torch.randn(d_in, min(rank, d_in), generator=torch.Generator().manual_seed(9)))[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, basis.shape[1], generator=generator) @ basis.t() + noise * torch.randn(
        n, d_in, generator=generator
    )


def _tokens(n: int = 60, d_in: int = D_IN, rank: int = 6, noise: float = 0.02) -> Tensor:
    return _vectors(n, d_in, rank, noise, seed=0)


def _encoder(d_in: int = D_IN, d_sae: int = D_SAE, rank: int = 6, noise: float = 0.02, **options: Any) -> Encoder:
    rows = torch.nn.functional.normalize(_vectors(d_sae, d_in, rank, noise, seed=1))
    generator = torch.Generator().manual_seed(2)
    options = {"scale": torch.rand(d_sae, generator=generator) + 0.5, **options}
    return Encoder(rows, 0.1 * torch.randn(d_sae, generator=generator), **options)


def _every(encoder: Encoder, x: Tensor) -> list[Approximation]:
    directions = leading_directions(x)
    ranks = sorted({1, 4, min(24, x.shape[1]), x.shape[1]})
    low = [LowRank.of(encoder, directions[:, :rank].contiguous()) for rank in ranks]
    return [Whole.of(encoder), *([EightBit.of(encoder)] if can_be_quantized(encoder) else []), *low]


def _by_rank(found: TopK, magnitude: bool = False) -> TopK:
    """By feature, what is missing first."""
    missing = found.scores == 0
    indices, order = found.indices.masked_fill(missing, -1).sort(dim=1)
    return TopK(found.scores.gather(1, order), indices)


def _expected(x: Tensor, encoder: Encoder, k: int, above: float = 0.0) -> TopK:
    (dense,) = encode_top_k(x, encoder, [Query(k)], Workspace())
    ranked = dense.scores.abs() if encoder.magnitude else dense.scores
    return _by_rank(TopK(dense.scores.masked_fill(ranked <= above, 0), dense.indices))


def _assert_same(found: TopK, x: Tensor, encoder: Encoder, k: int, above: float = 0.0) -> None:
    ours, dense = _by_rank(found), _expected(x, encoder, k, above)
    torch.testing.assert_close(ours.scores, dense.scores, rtol=1e-5, atol=1e-6 * float(dense.scores.abs().max()))
    # Scores that differ by rounding alone may fall either way.
    differing = ours.indices != dense.indices
    assert float(differing.float().mean()) < 1e-3


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    d_in=st.sampled_from([2, 7, 32, 48, 100]),
    d_sae=st.sampled_from([33, 1499, 4096]),
    k=st.sampled_from([1, 5, 32, 70]),
    noise=st.sampled_from([0.0, 0.02, 0.5]),
    scaled=st.booleans(),
    magnitude=st.booleans(),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    room=st.sampled_from([1, 3, 32]),
)
def test_the_selection_is_exact_and_its_bits_are_those_of_every_approximation(
    d_in, d_sae, k, noise, scaled, magnitude, size, room
):
    k = min(k, d_sae)
    encoder = _encoder(d_in, d_sae, noise=noise, magnitude=magnitude)
    encoder = replace(encoder, bias=size * encoder.bias, scale=encoder.scale if scaled else None)
    x = size * _tokens(19, d_in, noise=noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE_TOKENS", 8)
        patch.setattr(module, "_TILE_FEATURES", 1000)
        patch.setattr(module, "_ROOM", room)
        found = [_by_rank(screened_top_k(x, encoder, k, one, Workspace())[0]) for one in _every(encoder, x)]
    _assert_same(found[0], x, encoder, k)
    for other in found[1:]:
        assert torch.equal(other.indices, found[0].indices)
        assert torch.equal(other.scores, found[0].scores)


@pytest.mark.parametrize("magnitude", [False, True])
def test_only_scores_above_a_number_are_looked_for(magnitude):
    x, encoder = _tokens(), _encoder(magnitude=magnitude)
    above = float(_expected(x, encoder, K).scores.abs().median()) + 1e-4  # no score itself
    for one in _every(encoder, x):
        found, _ = screened_top_k(x, encoder, K, one, Workspace(), above)
        _assert_same(found, x, encoder, K, above)
        assert (found.scores == 0).any()


@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize("d_in", [7, 48, 576])
def test_no_score_lies_outside_its_bounds(d_in, skew):
    x = torch.randn(50, d_in) * torch.linspace(0, -skew, d_in).exp()
    encoder = _encoder(d_in, 500, rank=5, noise=0.3)
    scores = (x.double() @ encoder.rows.double().t() + encoder.bias) * encoder.scale
    for one in _every(encoder, x):
        factors, t = one.see(x)
        products = torch.empty(50, 500, dtype=one.product_dtype)
        one.multiply(encoder, slice(0, 500), factors, products)
        f, t = one.terms.double(), t.double()
        middle = t[0][:, None] * (f[0] * products) + f[1]
        room = t[1][:, None] * f[2] + t[2][:, None] * f[3] + module._slack(1) * f[1].abs().max()
        assert ((scores - middle).abs() <= room).all(), one.name
        if isinstance(one, EightBit):
            assert room.mean() < 0.05 * x.norm(dim=1).mean()  # rows of the encoder are of length 1


def test_equal_scores_go_to_the_lower_feature():
    rows = _encoder().rows.repeat(3, 1)
    encoder = Encoder(rows, torch.zeros(len(rows)))
    x = _tokens()
    scores = x.double() @ rows.double().t()
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :5].sort(dim=1).values
    for one in _every(encoder, x):
        found, _ = screened_top_k(x, encoder, 5, one, Workspace())
        assert torch.equal(found.indices.sort(dim=1).values, expected)
    wide = Encoder(rows.double(), torch.zeros(len(rows), dtype=torch.float64))
    (whole,) = encode_top_k(x.double(), wide, [Query(5)], Workspace())
    assert torch.equal(whole.indices.sort(dim=1).values, expected)


def test_features_that_are_all_alike_take_the_first():
    encoder = Encoder(torch.ones(D_SAE, D_IN), torch.zeros(D_SAE))
    x = torch.rand(9, D_IN)
    for one in _every(encoder, x):
        found, _ = screened_top_k(x, encoder, 60, one, Workspace())
        torch.testing.assert_close(found.scores, x.sum(dim=1, keepdim=True).expand(9, 60))
        assert torch.equal(found.indices.sort(dim=1).values, torch.arange(60).expand(9, 60))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_ends_as_in_the_whole_product(bad):
    x, encoder = _tokens(20), _encoder(rank=D_IN)
    x[7, 3] = bad
    dense = _expected(x, encoder, K)
    for one in _every(encoder, torch.randn(60, D_IN)):
        found = _by_rank(screened_top_k(x, encoder, K, one, Workspace())[0])
        torch.testing.assert_close(found.scores, dense.scores, equal_nan=True)
        assert torch.equal(found.indices[:7], dense.indices[:7])
    x = _tokens(20)
    encoder.rows[5, 5] = bad
    dense = _expected(x, encoder, K)
    for one in _every(encoder, torch.randn(60, D_IN)):
        found = _by_rank(screened_top_k(x, encoder, K, one, Workspace())[0])
        torch.testing.assert_close(found.scores, dense.scores, equal_nan=True)


def test_no_tokens():
    encoder, adaptive = _encoder(), AdaptiveScreen()
    for found in (
        screened_top_k(torch.empty(0, D_IN), encoder, K, Whole.of(encoder), Workspace())[0],
        adaptive.top_k(torch.empty(0, D_IN), encoder, K, Workspace()),
    ):
        assert found.scores.shape == found.indices.shape == (0, K)
    assert adaptive.approximation is None  # nothing was learnt, and the next step is the first


def test_results_do_not_depend_on_the_number_of_threads():
    encoder, x, found = _encoder(), _tokens(90), []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        found.append([t for one in _every(encoder, x) for t in screened_top_k(x, encoder, 8, one, Workspace())[0]])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rows_that_changed_are_brought_up_to_date_and_the_others_are_left():
    x, encoder = _tokens(), _encoder()
    kept = _every(encoder, x)
    rows = torch.arange(0, D_SAE, 3)
    before = next(one.codes.clone() for one in kept if isinstance(one, EightBit))
    encoder.rows[rows] += 0.1 * torch.randn(len(rows), D_IN)
    for one, anew in zip(kept, _every(encoder, x), strict=True):
        one.update_(encoder, rows)
        torch.testing.assert_close(one.terms, anew.terms, rtol=1e-4, atol=1e-5)
        _assert_same(screened_top_k(x, encoder, K, one, Workspace())[0], x, encoder, K)
        if isinstance(one, EightBit):
            assert isinstance(anew, EightBit)
            assert torch.equal(one.codes, anew.codes)
            others = torch.ones(D_SAE, dtype=torch.bool).index_fill_(0, rows, False)
            assert torch.equal(one.codes[others], before[others])


@pytest.mark.parametrize("kind", [Whole, EightBit, LowRank])
def test_rows_that_someone_else_writes_are_seen_in_the_next_step(kind):
    x, encoder, adaptive, workspace = _tokens(), _encoder(), _settled_on(kind), Workspace()
    adaptive.top_k(x, encoder, K, workspace)
    assert type(adaptive.approximation) is kind
    rows = torch.arange(100, 164)
    for tensor, values in (
        (encoder.rows, 30 * torch.nn.functional.normalize(x[torch.arange(64) % 60])),
        (encoder.bias, torch.full((64,), 5.0)),
        (encoder.scale, torch.full((64,), 9.0)),
    ):
        assert isinstance(tensor, Tensor)
        tensor[rows] = values
        found = adaptive.top_k(x, encoder, K, workspace)
        _assert_same(found, x, encoder, K)
        assert torch.isin(found.indices, rows).any()
    assert type(adaptive.approximation) is kind


@pytest.mark.parametrize("kind", [EightBit, LowRank])
def test_rows_written_behind_the_versions_are_seen_when_told_and_soon_when_not(kind):
    for told in (True, False):
        x, encoder, adaptive, workspace = _tokens(), _encoder(), _settled_on(kind), Workspace()
        adaptive.top_k(x, encoder, K, workspace)
        rows = torch.arange(100, 164)
        encoder.rows.data[rows] = 30 * torch.nn.functional.normalize(x[torch.arange(64) % 60])
        if told:
            adaptive.invalidate()
        for _ in range(1 if told else module._STRIPES):
            found = adaptive.top_k(x, encoder, K, workspace)
        _assert_same(found, x, encoder, K)


def test_rows_moved_by_the_optimizer_count_as_known():
    x, encoder, adaptive, workspace = _tokens(), _encoder(), _settled_on(LowRank), Workspace()
    adaptive.top_k(x, encoder, K, workspace)
    updates: list[int] = []
    assert isinstance(adaptive.approximation, LowRank)
    adaptive._steps_left = 10**6
    rows = torch.arange(0, D_SAE, 5)
    encoder.rows[rows] *= 1.1
    adaptive.rows_changed(encoder, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRank, "update_", lambda *args: updates.append(1))
        for _ in range(2 * module._STRIPES):
            adaptive.top_k(x, encoder, K, workspace)
    assert not updates
    _assert_same(adaptive.top_k(x, encoder, K, workspace), x, encoder, K)


def _settled_on(kind: type[Approximation]) -> AdaptiveScreen:
    """A screen whose clock lets one kind win."""
    adaptive = AdaptiveScreen(clock=lambda: 0.0)
    made = adaptive._approximations
    adaptive._approximations = lambda *args: itertools.islice(  # type: ignore[method-assign]
        (one for one in made(*args) if type(one[0]) is kind), 1
    )
    return adaptive


def _clock(costs: dict[str, float], adaptive: AdaptiveScreen, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let time pass by the names of approximations; returns those that were used."""
    now, used = [0.0], []
    stock = module._by_bounds

    def timed(x: Tensor, encoder: Encoder, k: int, approximation: Approximation, *args: Any) -> Any:
        now[0] += costs.get(approximation.name, 9.0) * len(x)
        used.append(approximation.name)
        return stock(x, encoder, k, approximation, *args)

    monkeypatch.setattr(module, "_by_bounds", timed)
    adaptive._clock = lambda: now[0]
    return used


def test_the_fastest_is_taken_and_all_answers_of_the_trial_count(monkeypatch):
    x, encoder = _tokens(400), _encoder()
    for costs, expected in (
        ({"8 bits": 1.0}, "8 bits"),
        ({"whole": 1.0}, "whole"),
        ({"rank 16": 3.0, "rank 8": 2.0}, "rank 8"),
    ):
        with monkeypatch.context() as patch:
            adaptive = AdaptiveScreen()
            used = _clock(costs, adaptive, patch)
            _assert_same(adaptive.top_k(x, encoder, K, Workspace()), x, encoder, K)
            assert adaptive.approximation is not None
            assert adaptive.approximation.name == expected
            used.clear()
            adaptive.top_k(x, encoder, K, Workspace())
            assert used == [expected]


def test_all_are_timed_again_after_some_steps_and_when_candidates_multiply(monkeypatch):
    x, encoder, adaptive, workspace = _tokens(200), _encoder(), AdaptiveScreen(), Workspace()
    used = _clock({"rank 16": 1.0}, adaptive, monkeypatch)
    adaptive.top_k(x, encoder, K, workspace)
    used.clear()
    for _ in range(module._STEPS):
        adaptive.top_k(x, encoder, K, workspace)
    assert set(used) == {"rank 16"}
    adaptive.top_k(x, encoder, K, workspace)
    assert {"whole", "rank 16"} <= set(used)
    used.clear()
    for _ in range(3):
        adaptive.top_k(torch.randn(200, D_IN), encoder, K, workspace)  # of full rank
    assert "whole" in used


def test_a_token_that_is_not_a_number_does_not_end_the_screen():
    x, encoder, adaptive = _tokens(), _encoder(), AdaptiveScreen()
    x[7, 3] = torch.nan
    found = adaptive.top_k(x, encoder, K, Workspace())
    assert adaptive.approximation is not None
    assert found.scores[7].isnan().any()
    finite = torch.arange(60) != 7
    _assert_same(TopK(found.scores[finite], found.indices[finite]), x[finite], encoder, K)


@pytest.mark.parametrize(
    "encoder",
    [
        _encoder(matmul_dtype=torch.bfloat16),
        replace(_encoder(), rows=_encoder().rows.double()),
        replace(_encoder(), rows=_encoder().rows.t().contiguous().t()),
        _encoder(d_sae=100),
    ],
)
def test_what_bounds_do_not_cover_takes_the_whole_product(encoder):
    assert not can_be_screened(encoder, K)
    x, adaptive = _tokens().to(encoder.rows.dtype), AdaptiveScreen()
    _assert_same(adaptive.top_k(x, encoder, K, Workspace()), x, encoder, K)
    assert adaptive.approximation is None


@pytest.mark.parametrize("d_sae", [4096, 4097, 5003])
@pytest.mark.parametrize("magnitude", [False, True])
def test_any_number_of_features_and_either_ranking_is_covered(d_sae, magnitude):
    encoder = _encoder(d_sae=d_sae, magnitude=magnitude)
    assert can_be_screened(encoder, K)
    assert can_be_quantized(encoder)


def test_without_kernels_there_is_no_screen(monkeypatch):
    monkeypatch.setattr(kernels, "enabled", False)
    assert not can_be_screened(_encoder(), K)


@pytest.mark.parametrize("n_entries", [1, 200, 60 * D_SAE])
def test_a_whole_batch_starts_at_the_last_threshold(n_entries):
    encoder, adaptive, workspace = _encoder(), AdaptiveScreen(), Workspace()
    cuts = []
    stock = adaptive.top_k
    adaptive.top_k = lambda *args: cuts.append(args[4] if len(args) > 4 else 0.0) or stock(*args)  # type: ignore
    for step, size in enumerate((1.0, 1.0, 0.3)):  # the last batch has fewer above the threshold of the one before
        x = size * torch.roll(_tokens(), step, dims=0)
        found = adaptive.batch_top_k(x, encoder, n_entries, workspace, Shard.whole(D_SAE), len(x)).entries
        scores = ((x @ encoder.rows.t() + encoder.bias) * encoder.scale).relu().flatten()
        expected = scores.topk(min(n_entries, int((scores > 0).sum()))).values.sort().values
        torch.testing.assert_close(found.scores.sort().values, expected, rtol=1e-5, atol=1e-6)
    if n_entries == 200:
        assert max(cuts) > 0


def test_a_processor_that_adds_in_16_bits_is_refused(set_product):
    set_product(_saturating_product)
    assert not can_be_quantized(_encoder())


def test_the_product_of_this_processor_is_exact_or_refused(set_product):
    codes = torch.randint(-127, 128, (40, 576), dtype=torch.int8)
    set_product(_TORCH_PRODUCT)
    ours, exact = torch.empty(2, 40, 40, dtype=torch.int32)
    _TORCH_PRODUCT(codes, codes, ours)
    _exact_product(codes, codes, exact)
    assert torch.equal(ours, exact) or not adds_in_32_bits(576)


def test_rows_so_long_that_32_bits_overflow_are_refused():
    assert adds_in_32_bits(133_144)
    assert not adds_in_32_bits(133_145)


@pytest.mark.parametrize("n_dead", [0, 40])
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "batchtopk", "matryoshka_batchtopk"])
def test_a_training_run_has_the_same_bits_with_each_approximation(architecture, n_dead, monkeypatch):
    runs = []
    for kind in (Whole, EightBit, LowRank):
        torch.manual_seed(0)
        monkeypatch.setattr("saelens_asi.plugin.sparse_steps.AdaptiveScreen", lambda kind=kind: _settled_on(kind))
        trainer = tiny.trainer(
            architecture, d_sae=2048, k=4, optimizer="sparse_adam", initializer="active_subspace", n_steps=40
        )
        trainer.n_forward_passes_since_fired[:n_dead] = 10**6
        trainer.fit()
        runs.append(trainer)
    for other in runs[1:]:
        for name, param in runs[0].sae.named_parameters():
            assert torch.equal(other.sae.get_parameter(name), param), name
