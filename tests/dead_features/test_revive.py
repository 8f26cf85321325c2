"""Which features are revived, where to, and with what weights: on planted silence and planted residuals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_asi.dead_features.revive import (
    MAX_COSINE,
    Sample,
    Scoring,
    Silence,
    apart,
    dead_features,
    forgetting,
    largest_cosines,
    missed,
    placed,
    residual_directions,
    start_has_failed,
)
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

BATCH, D_SAE, MEAN_RATE = 1024, 8192, 32 / 8192


def _is_dead(age: int, fired: int, silent: int, batch: int = BATCH, mean_rate: float = MEAN_RATE) -> bool:
    silence = Silence(*(torch.tensor([n]) for n in (age, fired, silent)))
    return bool(dead_features(silence, batch, mean_rate, D_SAE))


def _steps(rate: float) -> int:
    """Steps of silence that rule a rate out."""
    return math.ceil(math.log(0.01 / D_SAE) / math.log1p(-rate) / BATCH)


def test_a_feature_that_never_fired_waits_until_a_tenth_of_the_mean_rate_is_ruled_out():
    steps = _steps(MEAN_RATE / 10)
    assert 30 < steps < 40
    assert not _is_dead(steps - 1, 0, steps - 1)
    assert _is_dead(steps + 1, 0, steps + 1)


def test_a_feature_that_fired_waits_until_a_hundredth_is_ruled_out():
    steps = _steps(MEAN_RATE / 100)
    assert not _is_dead(1000 + steps - 1, 900, steps - 1)
    assert _is_dead(1000 + steps + 1, 900, steps + 1)


def test_a_rare_feature_waits_the_longer_the_rarer_it_has_been():
    usual = _steps(MEAN_RATE / 100)
    rare = _steps(MEAN_RATE / 1000)
    fired = 20  # at a thousandth of the mean rate
    age = round(fired / (MEAN_RATE / 1000) / BATCH)
    assert not _is_dead(age + 2 * usual, fired, 2 * usual)
    assert not _is_dead(age + rare // 2, fired, rare // 2)
    assert _is_dead(age + 2 * rare, fired, 2 * rare)


@given(
    rate=st.floats(MEAN_RATE / 100, 0.5),
    early_rate=st.floats(1e-4, 1.0),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_a_feature_that_still_fires_is_not_taken_for_dead_whatever_its_past(rate, early_rate, seed):
    """Also where it fired much more often in the first 100 steps."""
    torch.manual_seed(seed)
    n_steps = 2000
    by_step = torch.full((n_steps,), 1 - (1 - rate) ** BATCH)
    by_step[:100] = max(float(by_step[0]), 1 - (1 - early_rate) ** BATCH)
    fires = torch.rand(n_steps) < by_step
    steps = torch.arange(1, n_steps + 1)
    last = torch.where(fires, steps, 0).cummax(0).values
    silence = Silence(steps, fires.long().cumsum(0), steps - last)
    has_fired = silence.fired > 0
    assert not dead_features(silence, BATCH, MEAN_RATE, D_SAE)[has_fired].any()


def _sample(n: int = 2048, d: int = 24, rank: int = 6, k: float = 4) -> tuple[Sample, torch.Tensor]:
    """Residuals along a few planted directions, each on some tokens, with noise in all dimensions."""
    torch.manual_seed(1)
    planted = torch.linalg.qr(torch.randn(d, rank))[0].T
    which = torch.randint(0, rank, (n,))
    residual = planted[which] * (1 + torch.rand(n, 1)) + 0.02 * torch.randn(n, d)
    x = residual + 0.5 * torch.randn(n, d)
    return Sample(x, residual, torch.full((n,), 0.2)), planted


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_directions_are_those_of_the_residual():
    sample, planted = _sample()
    drawn = residual_directions(sample, forgetting(None, sample.residual), 64, _generator())
    assert drawn.shape == (64, 24)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(64))
    inside = (drawn @ planted.T).norm(dim=1)
    assert inside.min() > 0.99
    # Centred: the mean of all residuals is for the decoder's bias.
    centred = torch.nn.functional.normalize(planted - sample.residual.mean(0) @ planted.T @ planted, dim=1)
    assert (drawn @ centred.T).amax(dim=1).min() > 0.95


def test_the_same_generator_draws_the_same_directions():
    sample, _ = _sample()
    moments = forgetting(None, sample.residual)
    first, again = (residual_directions(sample, moments, 32, _generator()) for _ in range(2))
    assert torch.equal(first, again)


def test_nothing_is_drawn_where_nothing_is_left_to_explain():
    sample, _ = _sample()
    nothing = torch.zeros_like(sample.residual)
    drawn = residual_directions(sample._replace(residual=nothing), forgetting(None, nothing), 8, _generator())
    assert len(drawn) == 0


@pytest.mark.parametrize("magnitude", [False, True])
def test_no_two_directions_are_duplicates_of_one_another_or_of_a_live_row(magnitude):
    sample, planted = _sample()
    drawn = residual_directions(sample, forgetting(None, sample.residual), 512, _generator())
    dead_row = torch.nn.functional.normalize(drawn[3:4], dim=1)
    W_dec, live = torch.cat([7 * planted[:2] - sample.residual.mean(0), dead_row]), torch.tensor([True, True, False])
    if magnitude:
        W_dec = -W_dec
    cosines = largest_cosines(drawn, W_dec, live, magnitude)
    kept = drawn[apart(drawn, cosines > MAX_COSINE, magnitude)]
    assert 3 <= len(kept) < 512
    for rows in (torch.nn.functional.normalize(W_dec[:2], dim=1), kept):
        among = kept @ rows.T
        among = among.abs() if magnitude else among
        among = among.fill_diagonal_(0) if rows is kept else among
        assert among.max() <= MAX_COSINE
    # What is left out has a duplicate that stays, or a live one.
    near = kept @ drawn.T
    near = torch.maximum((near.abs() if magnitude else near).amax(dim=0), cosines)
    assert near.min() > MAX_COSINE


@pytest.mark.parametrize("by_norm", [False, True])
def test_a_feature_enters_on_as_many_tokens_as_an_average_one_and_lowers_their_error(by_norm):
    sample, planted = _sample()
    scoring = Scoring(k=4, d_sae=200, by_norm=by_norm, magnitude=False)
    revived, gain = placed(planted, sample, scoring)
    weights = revived.directions * revived.norm[:, None]
    activations = sample.x @ weights.T + revived.bias
    scores = activations * revived.norm if by_norm else activations
    enters = scores >= sample.lowest[:, None] - 1e-5
    n = scoring.n_firings(len(sample.x))
    assert n == 41
    assert enters.sum(dim=0).tolist() == pytest.approx([n] * len(planted), abs=1)
    assert gain.min() > 0
    for i in range(len(planted)):
        explained = (activations[:, i] * enters[:, i])[:, None] * weights[i]
        lowered = sample.residual.square().sum() - (sample.residual - explained).square().sum()
        torch.testing.assert_close(lowered, gain[i], rtol=1e-2, atol=1e-2)


def test_of_two_signs_an_abstopk_has_one_feature():
    sample, planted = _sample()
    revived, _ = placed(planted, sample, Scoring(k=4, d_sae=200, by_norm=True, magnitude=True))
    assert not revived.bias.any()
    scores = (sample.x @ planted.T * revived.norm.square()).abs()
    assert (scores >= sample.lowest[:, None] - 1e-6).sum(dim=0).tolist() == [41] * len(planted)


def test_a_round_is_bounded():
    scoring = Scoring(k=32, d_sae=8192, by_norm=True, magnitude=False)
    assert scoring.most_at_once(2048) == 512
    # Of more features than the sample tells apart, by how many of the k of a token they would take.
    many = Scoring(k=32, d_sae=1_000_000, by_norm=True, magnitude=False)
    assert many.most_at_once(2048) * many.n_firings(2048) <= 2048 * 32 / 16
    assert Scoring(k=1, d_sae=4, by_norm=True, magnitude=False).most_at_once(2048) == 1


def test_nothing_is_placed_of_no_directions():
    sample, planted = _sample()
    revived, gain = placed(planted[:0], sample, Scoring(k=4, d_sae=200, by_norm=True, magnitude=False))
    assert len(revived.directions) == len(revived.norm) == len(revived.bias) == len(gain) == 0


def test_moments_forget():
    old, new = torch.randn(1000, 3).double() + 5, torch.randn(1000, 3).double()
    moments: RunningMoments | None = None
    for x in (old, *[new] * 12):
        moments = forgetting(moments, x)
    assert moments is not None
    torch.testing.assert_close(moments.mean, new.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(moments.covariance(), new.T.cov(), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("shares", "gamma", "failed"),
    [
        ((0.3, 0.3, 0.3), 1.0, True),  # of a hundred firings each, a quarter is enough
        ((0.0, 0.0, 0.95), 1.0, True),  # of ten, nearly all
        ((0.0, 0.6, 0.7), 1.0, True),  # of thirty, a half
        ((0.2, 0.45, 0.85), 1.0, False),
        ((1.0, 1.0, 1.0), 0.4, False),  # no mean that could be the cause
    ],
)
def test_a_start_has_failed_where_features_miss_their_firings_and_the_mean_is_long(shares, gamma, failed):
    seen = Spectrum(torch.tensor([gamma, 0.0]).double(), torch.diag(torch.tensor([0.75, 0.25]).double()), 1000)
    assert seen.gamma == pytest.approx(gamma)
    assert start_has_failed(shares, seen) is failed


def test_firings_are_missed_by_the_tokens_of_the_silence():
    silent = torch.tensor([0, 9, 10, 99, 100])
    silence = Silence(age=silent, fired=0 * silent, silent=silent)
    found = [missed(silence, batch=64, mean_rate=1 / 64, firings=firings).tolist() for firings in (10, 100)]
    assert found == [[False, False, True, True, True], [False, False, False, False, True]]
